"""The command line `fictl`: one module for each group of verbs, named here.

The script is there as `fi` too, for callers by path: as a bare word that is a keyword of every shell.
Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 1 failed, 2 usage, 3 not ready, 4 corruption found.
With --json stdout has JSON in any case: the verb's answer, or where there is none, `error` and `exit_code`.
A process runs one verb, and each stage is one: the verb's module is imported and its command built when it is asked
for. A verb imports what is heavy when it runs, so that ``fictl --help`` stays quick.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections import UserDict
from functools import cache
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from cluster.cli.common import FAILED, USAGE, answered, config_option, exit_code, print_error, say
from contracts.errors import FiError
from contracts.wire import plain_lines


class Group(NamedTuple):
    """Verbs under one word.

    Attributes:
        help: what the verbs are about.
        verbs: name → the function's place, as in `VERBS`.
    """

    help: str
    verbs: dict[str, str]


VERBS: Final[dict[str, str | Group]] = {
    "demo": "demo:demo",
    "up": "up:up",
    "down": "up:down",
    "run": "run:run",
    "publish": "publish:publish",
    "events": "store:events",
    "export": "export:export",
    "verify": "store:verify",
    "shards": "store:shards",
    "schema": "schema:schema",
    "members": "members:members",
    "scale": "members:scale",
    "restart": "members:restart",
    "pause": "members:pause",
    "resume": "members:resume",
    "drain": "members:drain",
    "flush": "flush:flush",
    "status": "status:status",
    "top": "top:top",
    "health": "health:health",
    "metrics": "metrics:metrics",
    "capacity": "capacity:capacity",
    "prove": "proof:prove",
    "check-proof": "proof:check_proof",
    "consistency": "proof:consistency",
    "rebuild": "partitions:rebuild",
    "backup": "backup:backup",
    "cluster": Group(
        "The streams of a cluster: what they should be, and how they are.",
        {"plan": "topology:plan", "apply": "topology:apply", "status": "topology:status"},
    ),
    "config": Group(
        "Settings: where each comes from, and whether they hold.",
        {"show": "config:show", "check": "config:check", "budgets": "config:budgets"},
    ),
    "dlq": Group(
        "Dead letters: events that were refused, with the reason.",
        {"ls": "dlq:ls", "show": "dlq:show", "replay": "dlq:replay", "drop": "dlq:drop"},
    ),
    "key": Group(
        "Keys that persist signs receipts and seal records with.",
        {"new": "keys:new", "public": "keys:public"},
    ),
    "partitions": Group(
        "Partitions: who owns which, moving one, and writing lost receipts again.",
        {"ls": "partitions:list_partitions", "move": "partitions:move", "restore": "partitions:restore"},
    ),
    "policy": Group(
        "The rules that segment holds events to: look, change, look back.",
        {"show": "policy:show", "set": "policy:set_", "history": "policy:history"},
    ),
}
"""Every verb by its name, in the order of `fictl --help`: the module of this package, and the function in it."""


@cache
def _command(name: str) -> Any:
    """What typer makes of the verb or group `name` of `VERBS`."""
    found = VERBS[name]
    if isinstance(found, Group):
        group = typer.Typer(name=name, help=found.help, no_args_is_help=True)
        for verb, place in found.verbs.items():
            _add(group, verb, place)
        return typer.main.get_group(group)
    alone = typer.Typer(add_completion=False)
    _add(alone, name, found)
    return typer.main.get_command(alone)


def _add(verbs: typer.Typer, name: str, place: str) -> None:
    module, _, function_name = place.partition(":")
    function = getattr(import_module(f"{__name__}.{module}"), function_name)
    # Each paragraph as one line: it is the terminal that breaks it.
    paragraphs = (" ".join(text.split()) for text in (function.__doc__ or "").split("\n\n"))
    verbs.command(name, cls=_Verb, help="\n\n".join(paragraphs))(function)


class _Verb(TyperCommand):
    """A verb that takes no empty path: what a script's unset variable gives would be the working directory."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb.

        Raises:
            typer.BadParameter: a path is empty.
        """
        for parameter in self.params:
            if parameter.type.name == "path" and ctx.params.get(parameter.name or "") == "":
                raise typer.BadParameter("is empty; name a file or directory", ctx=ctx, param=parameter)
        return super().invoke(ctx)


class _Commands(UserDict[str, Any]):
    """The verbs' commands by name, each made when it is first asked for."""

    def __getitem__(self, name: str) -> Any:
        return _command(name)


class _Verbs(TyperGroup):
    """`fictl` itself."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands = _Commands(VERBS)


app = typer.Typer(
    name="fictl",
    cls=_Verbs,
    help="Carries medical-consultation events through NATS JetStream into HDF5 shards, each exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain_lines(super().format(record))


@app.callback()
def options(
    context: typer.Context,
    config_file: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="Settings file. Default: FI_CONFIG, else fi.toml if it is here."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False,
) -> None:
    """Options of every verb."""
    before = config_option.set(config_file)
    context.call_on_close(lambda: config_option.reset(before))
    level = logging.DEBUG if verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("fi: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _open_closed_streams() -> None:
    """Opens what is closed of stdin, stdout and stderr on nothing: the next file opened would be taken for it."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest one that is free is this one. Processes that are started get it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))


def _print_any_text() -> None:
    """Has stdout escape what its encoding does not have, as stderr does: no sign in an answer may cost the answer."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main(arguments: list[str] | None = None) -> None:
    """Runs the verb that `arguments` (the process's own when None) name, and exits with its code."""
    _open_closed_streams()
    _print_any_text()
    # numpy's OpenBLAS starts a thread for each core when it is loaded, and nothing here multiplies matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # The interpreter's end would look for garbage in all that was imported: a seventh of a short verb's CPU.
    atexit.register(gc.freeze)
    given = sys.argv[1:] if arguments is None else arguments
    answered.set(False)
    code, error = _run(given)
    if error and "--json" in given:
        print_error(error, code)
    sys.exit(code)


def _run(arguments: list[str]) -> tuple[int, str]:
    """Runs the verb and tells what went wrong on stderr. Gives its exit code, and the error in words; "" without."""
    try:
        return app(arguments, prog_name="fictl", standalone_mode=False) or 0, ""
    except typer.Abort:
        # The end of input where something was asked.
        return _failed("aborted", FAILED)
    except UnicodeEncodeError:
        # A file may have any name; what is sent, stored or printed as JSON is text.
        for argument in arguments:
            if any("\ud800" <= char <= "\udfff" for char in argument):
                return _failed(f"the argument {argument!a} is not UTF-8, and cannot be used here", USAGE)
        raise
    except FiError as error:
        return _failed(str(error), exit_code(error))
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error), FAILED)
    except Exception as error:
        # Of the class of what typer says about usage only this is the same in all its versions.
        if not hasattr(error, "format_message"):
            raise
        from typer.rich_utils import rich_format_error

        rich_format_error(error)  # type: ignore[arg-type]
        return USAGE, error.format_message()


def _failed(error: str, code: int) -> tuple[int, str]:
    say(f"fi: {error}")
    return code, error
