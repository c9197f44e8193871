"""What the verbs share: where the cluster is, data on stdout, words for people on stderr, exit codes."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar
from urllib.parse import urlsplit

import msgspec
import typer

from cluster.config import find_file
from cluster.state import NotRunningError, read_state
from contracts.budgets import COMMAND_ANSWER, COMMAND_CONNECT, PROGRESS
from contracts.errors import (
    ClusterUnavailableError,
    DefiniteError,
    FiError,
    NotAppliedError,
    ProofError,
    SettingsError,
    ShardCorruptError,
)
from contracts.settings import ResolvedSettings, Settings, SettingsFile, hide_credentials, resolve_settings
from contracts.subjects import STAGES, Stage
from contracts.wire import plain, plain_lines
from stages.runtime.access import Servers, access_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text

    from stages.runtime.api import Api
    from stages.runtime.client import GuardedClient

T = TypeVar("T")

FAILED: Final = 1
USAGE: Final = 2
NOT_READY: Final = 3
CORRUPT: Final = 4

DEFAULT_DIRECTORY = Path(".fi")
REDIRECTED_WIDTH: Final = 160
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AGO: Final = re.compile(r"(\d{1,9})([smhd])")


DirectoryOption = Annotated[Path, typer.Option("--dir", help="Use what `fictl up --dir DIR` started.")]
NatsOption = Annotated[
    list[str] | None, typer.Option("--nats", metavar="URL", help="Server URL; repeatable. Instead of --dir.")
]
StoreArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="A shards directory, or the directory of `fictl up`.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
PublicKeyOption = Annotated[
    list[str] | None,
    typer.Option("--public-key", metavar="FILE|HEX", help="Key that signatures must be by; repeatable."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting, e.g. replicas=1; repeatable. Stronger than FI_NAME."),
]


def finite(value: float | None) -> float | None:
    """For the `callback` of options that take a number: ``nan`` is neither below `min` nor above `max`.

    Raises:
        typer.BadParameter: nan or inf.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number that can be used here")
    return value


def above_zero(value: float | None) -> float | None:
    """For the `callback` of options that take a measured number.

    Raises:
        typer.BadParameter: 0 or less, nan or inf.
    """
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is not above 0")
    return value


def not_empty(value: str | None) -> str | None:
    """For the `callback` of options that filter: a script's unset variable must not choose everything.

    Raises:
        typer.BadParameter: empty.
    """
    if value == "":
        raise typer.BadParameter("is empty; leave it out for all")
    return value


config_option: ContextVar[str | None] = ContextVar("config_option", default=None)
"""What `--config` names in this command; None without it."""


_has_bar: ContextVar[bool] = ContextVar("has_bar", default=False)

answered: ContextVar[bool] = ContextVar("answered", default=False)
"""Whether this command has printed its answer as JSON."""


class NotReadyError(DefiniteError):
    """The cluster is there but cannot be used yet."""


def exit_code(error: FiError) -> int:
    """The exit code that stands for `error`."""
    if isinstance(error, SettingsError):
        return USAGE
    if isinstance(error, (ClusterUnavailableError, NotAppliedError, NotReadyError, NotRunningError)):
        return NOT_READY
    return CORRUPT if isinstance(error, (ShardCorruptError, ProofError)) else FAILED


def find_servers(directory: Path, nats: list[str] | None, chosen: list[str] | None = None) -> Servers:
    """Those at `nats` when given, spoken to as the settings say, else those of the run in `directory`.

    Raises:
        SettingsError: a URL that is none; or as `given_settings`.
        NotRunningError: nothing runs in `directory`.
        NotReadyError: what runs there has no servers yet.
    """
    if nats:
        for url in nats:
            if not _is_server_url(url):
                raise SettingsError(f"--nats {hide_credentials(url)}: a server URL looks like nats://127.0.0.1:4222")
        return Servers(tuple(nats), access_of(given_settings(chosen).settings))
    urls = read_state(directory).urls
    if not urls:
        raise NotReadyError(f"what runs in {directory} is still starting; try again in a few seconds")
    return Servers(urls)


def _is_server_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("nats", "tls", "ws", "wss") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def check_directory(option: str, path: Path) -> None:
    """Holds that `path`, given for `option`, is a directory or can become one. Raises `SettingsError`."""
    if path.exists() and not path.is_dir():
        raise SettingsError(f"{option} {path}: is no directory; choose another place")


def given_file() -> SettingsFile | None:
    """The settings file of this command. See `cluster.config.find_file`."""
    return find_file(config_option.get(), os.environ)


def given_settings(chosen: list[str] | None = None, *, defaults: Settings | None = None) -> ResolvedSettings:
    """Settings from `chosen` (``NAME=VALUE``), else the environment, else the settings file, else `defaults`.

    Raises:
        SettingsError: an unknown name, a value out of range, or a settings file that cannot be read.
    """
    return resolve_settings(os.environ, _parse_set(chosen), file=given_file(), defaults=defaults)


def find_settings(directory: Path, nats: list[str] | None, chosen: list[str] | None) -> Settings:
    """As `given_settings`, with what the run in `directory` was started with for defaults, unless `nats` is given.

    Raises:
        SettingsError: as `given_settings`.
        NotRunningError: neither `nats` nor a run in `directory`.
    """
    defaults = None if nats else read_state(directory).settings
    return given_settings(chosen, defaults=defaults).settings


def named_stage(text: str) -> Stage:
    """The stage of that name. Raises `SettingsError`: there is none."""
    for stage in STAGES:
        if stage == text:
            return stage
    raise SettingsError(f"no stage is called {text!r}; use one of {', '.join(STAGES)}")


def parse_when(option: str, text: str, now_ns: int) -> int:
    """A time, or a time ago, as nanoseconds since the epoch.

    Raises:
        SettingsError: neither. Names the option.
    """
    from contracts.events import parse_rfc3339

    if (ago := _AGO.fullmatch(text)) is not None:
        return now_ns - int(ago[1]) * _UNITS_S[ago[2]] * 1_000_000_000
    try:
        return parse_rfc3339(text)
    except (ValueError, OverflowError) as error:
        raise SettingsError(f"{option} {text}: {error}; write 2026-01-31T08:00:00Z, or 90s, 30m, 2h, 3d") from None


def check_partitions(option: str, chosen: Iterable[int], partitions: int) -> None:
    """Holds that a cluster of so many `partitions` has all that were `chosen`. Raises `SettingsError` naming them."""
    if unknown := [partition for partition in chosen if partition >= partitions]:
        raise SettingsError(f"{option} {', '.join(map(str, unknown))}: the cluster has 0 to {partitions - 1}")


def _parse_set(chosen: list[str] | None) -> dict[str, str]:
    values = {}
    for text in chosen or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingsError(f"--set {text}: write NAME=VALUE, e.g. --set replicas=1")
        values[name] = value
    return values


@asynccontextmanager
async def connected(servers: Servers, *, beside: str | None = None) -> AsyncIterator[GuardedClient]:
    """A connection to any of `servers`, closed at the end; where `beside` is given, to one that does not lead it.

    Raises:
        ClusterUnavailableError: none answered within `COMMAND_CONNECT`.
    """
    from stages.runtime.connection import connect, connect_beside

    with progress_bar("connecting"):
        if beside is None:
            client = await connect(servers.urls, "fi", access=servers.access, wait_s=COMMAND_CONNECT.s)
        else:
            client = await connect_beside(servers.urls, beside, "fi", access=servers.access, wait_s=COMMAND_CONNECT.s)
    try:
        yield client
    finally:
        await client.close()


def command_api(client: GuardedClient, settings: Settings | None = None) -> Api:
    """What a command reads and changes streams with: unlike a stage it gives up what is not answered in time."""
    from stages.runtime.api import Api

    return Api(client, settings or Settings(), give_up_s=COMMAND_ANSWER.s)


async def with_api(servers: Servers, work: Callable[[Api], Awaitable[T]]) -> T:
    """What `work` gives with `command_api` of any of `servers`. Raises as `connected`, and as `work`."""
    async with connected(servers) as client:
        return await work(command_api(client))


def trusted_keys(chosen: list[str] | None) -> tuple[str, ...]:
    """The public keys that were chosen, as 64 hex digits each. Raises `SettingsError` for what is none."""
    from stages.persist.keys import read_public_key

    return tuple(read_public_key(text) for text in chosen or ())


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float, float], None]]:
    """A terminal's stderr shows a bar after `PROGRESS`. Gives what to tell (done, total) to; until told, it pulses.

    Within another one it shows nothing: a terminal has room for one.
    """
    if _has_bar.get() or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import Progress

    bar = Progress(console=console(stderr=True), transient=True)
    task = bar.add_task(title, total=None)
    starting = threading.Timer(PROGRESS.s, bar.start)
    starting.daemon = True
    starting.start()
    before = _has_bar.set(True)
    try:
        yield lambda done, total: bar.update(task, completed=done, total=total)
    finally:
        _has_bar.reset(before)
        starting.cancel()
        starting.join()
        bar.stop()


def login_name() -> str:
    """Who runs this command."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container may run under a user id that has no name.
        return f"uid {os.getuid()}"


def login_place() -> str:
    """Who runs this command, and on which machine, for records of what was asked for."""
    return f"{login_name()}@{socket.gethostname()}"


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end in an event loop of its own; Ctrl-C cancels it and raises `KeyboardInterrupt`."""
    make_loop: Callable[[], asyncio.AbstractEventLoop] | None = None
    # A Ctrl-C may come before the loop takes `work` up, which must not be told of then.
    with closing(work):
        if sys.platform != "win32":
            import uvloop

            make_loop = uvloop.new_event_loop
        with asyncio.Runner(loop_factory=make_loop) as runner:
            return runner.run(work)


def print_json(value: Any) -> None:
    """One JSON value on one line of stdout: the answer of a verb with --json."""
    text = msgspec.json.encode(value).decode()
    if not text.isprintable():
        # Only strings hold such signs, and JSON has another form for each.
        text = "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
    answered.set(True)
    sys.stdout.buffer.write(text.encode() + b"\n")
    sys.stdout.buffer.flush()


def print_error(error: str, code: int) -> None:
    """Why a verb with --json has no answer, as JSON on stdout. Nothing after an answer, which `code` is about then."""
    # Where the error is that stdout cannot be written, it was told on stderr.
    with suppress(OSError):
        if not answered.get():
            print_json({"error": error, "exit_code": code})


def say(text: str) -> None:
    """A line for people, on stderr; or several, as of a log."""
    print(plain_lines(text), file=sys.stderr)


def print_lines(*lines: str) -> None:
    """Lines for people, on stdout. Each is one line, whatever is in it: names out of files can be anything."""
    print(*map(plain, lines), sep="\n")


def console(*, stderr: bool = False) -> Console:
    """A rich console; on stderr for what is not data. A file or pipe gets wide lines, so that nothing is cut off.

    Text is text: neither rich's markup in it counts, nor what a terminal would obey.
    """
    from rich.console import Console

    class PlainConsole(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            # Before its width is measured.
            return super().render_str(plain_lines(text), **how)

        def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=plain_lines(segment.text))

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal else REDIRECTED_WIDTH
    return PlainConsole(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def make_table(*titles: str, title: str | None = None) -> Table:
    """A table that cuts nothing off: what is wider than its column goes on in the next line."""
    from rich.table import Column, Table

    columns = (Column(name, overflow="fold") for name in titles)
    return Table(*columns, title=title, title_justify="left")
