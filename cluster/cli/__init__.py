"""The command line `fictl`: one module for each group of verbs, registered here by name.

The script is there as `fi` too, for callers by path: as a bare word that is a keyword of every shell.
Data goes to stdout, everything else to stderr. Exit codes: 0 ok, 1 failed, 2 usage, 3 not ready, 4 corruption found.
A verb imports what is heavy when it runs, so that ``fictl --help`` stays quick.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from cluster.cli import config, dlq, keys, members, partitions, policy, proof, store, topology
from cluster.cli.capacity import capacity
from cluster.cli.common import FAILED, USAGE, config_option, exit_code, say
from cluster.cli.demo import demo
from cluster.cli.export import export
from cluster.cli.flush import flush
from cluster.cli.health import health
from cluster.cli.metrics import metrics
from cluster.cli.publish import publish
from cluster.cli.run import run
from cluster.cli.schema import schema
from cluster.cli.status import status
from cluster.cli.top import top
from cluster.cli.up import down, up
from contracts.errors import FiError

app = typer.Typer(
    name="fictl",
    help="Carries medical-consultation events through NATS JetStream into HDF5 shards, each exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Settings: where each comes from, and whether they hold.", no_args_is_help=True)
key_app = typer.Typer(help="Keys that persist signs receipts and seal records with.", no_args_is_help=True)
partitions_app = typer.Typer(help="Partitions: who owns which, and moving one.", no_args_is_help=True)
cluster_app = typer.Typer(help="The streams of a cluster: what they should be, and how they are.", no_args_is_help=True)
policy_app = typer.Typer(help="The rules that segment holds events to: look, change, look back.", no_args_is_help=True)
dlq_app = typer.Typer(help="Dead letters: events that were refused, with the reason.", no_args_is_help=True)


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
    logging.basicConfig(level=level, stream=sys.stderr, format="fi: %(message)s", force=True)


for verb in (demo, up, down, run, publish, store.events, export, store.verify, store.shards, schema):
    app.command()(verb)
for running in (members.members, members.scale, members.restart, members.pause, members.resume, members.drain, flush):
    app.command()(running)
for watching in (status, top, health, metrics, capacity):
    app.command()(watching)
for proving in (proof.prove, proof.check_proof, proof.consistency):
    app.command()(proving)
config_app.command("show")(config.show)
config_app.command("check")(config.check)
config_app.command("budgets")(config.budgets)
key_app.command("new")(keys.new)
key_app.command("public")(keys.public)
app.command()(partitions.rebuild)
partitions_app.command("ls")(partitions.list_partitions)
partitions_app.command("move")(partitions.move)
for verb in (topology.plan, topology.apply, topology.status):
    cluster_app.command()(verb)
policy_app.command("show")(policy.show)
policy_app.command("set")(policy.set_)
policy_app.command("history")(policy.history)
for dlq_verb in (dlq.ls, dlq.show, dlq.replay, dlq.drop):
    dlq_app.command()(dlq_verb)
app.add_typer(cluster_app, name="cluster")
app.add_typer(config_app, name="config")
app.add_typer(dlq_app, name="dlq")
app.add_typer(key_app, name="key")
app.add_typer(partitions_app, name="partitions")
app.add_typer(policy_app, name="policy")


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


def main(arguments: list[str] | None = None) -> None:
    """Runs the verb that `arguments` (the process's own when None) name, and exits with its code."""
    _open_closed_streams()
    # numpy's OpenBLAS starts a thread for each core when it is loaded, and nothing here multiplies matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        app(arguments)
    except UnicodeEncodeError:
        # A file may have any name; what is sent, stored or printed as JSON is text.
        for argument in sys.argv[1:] if arguments is None else arguments:
            if any("\ud800" <= char <= "\udfff" for char in argument):
                say(f"fi: the argument {argument!a} is not UTF-8, and cannot be used here")
                sys.exit(USAGE)
        raise
    except FiError as error:
        say(f"fi: {error}")
        sys.exit(exit_code(error))
    except OSError as error:
        say(f"fi: {error.filename}: {error.strerror}" if error.filename else f"fi: {error}")
        sys.exit(FAILED)
