"""`fictl up` and `fictl down`: a whole pipeline on this machine, kept running."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, TypeVar

import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    FAILED,
    DirectoryOption,
    SetOption,
    check_directory,
    config_option,
    given_settings,
    progress_bar,
    run_async,
    say,
)
from contracts.budgets import UP_POLL, UP_START, UP_STOP
from contracts.errors import DefiniteError, FiError, SettingsError
from contracts.settings import Settings
from contracts.subjects import STAGES, Stage

if TYPE_CHECKING:
    from cluster.supervisor import Supervisor

T = TypeVar("T")

SHOWN_LINES_MAX: Final = 20


def up(
    directory: Annotated[Path, typer.Option("--dir", help="State, logs, stores, shards.")] = DEFAULT_DIRECTORY,
    scale: Annotated[
        str | None, typer.Option(help="Processes of each stage, e.g. ingest=1,segment=2. Default: one each.")
    ] = None,
    servers: Annotated[int, typer.Option(min=1, max=9, help="nats-server processes; more than before, not fewer.")] = 3,
    chosen: SetOption = None,
    after_stores: Annotated[
        bool, typer.Option("--after-stores", help="If the servers lost all streams: go on with what the store holds.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return when it is ready and leave it running.")] = False,
) -> None:
    """Starts servers and stages in DIR and keeps them running until Ctrl-C or `fictl down`.

    A process that dies is started again. A second Ctrl-C kills at once, and so does one while it starts. `fictl config
    show` shows the settings it would get; only health_port is 0 here unless it is set.

    Example: fictl up --dir /var/lib/fi --scale segment=2,hash=2 --detach
    """
    counts = parse_scale("--scale", scale)
    check_directory("--dir", directory)
    settings = given_settings(chosen, defaults=Settings(health_port=0)).settings
    if detach:
        with progress_bar("starting"):
            _detach(directory, scale, servers, chosen, after_stores=after_stores)
        return

    from cluster.supervisor import Supervisor
    from stages.runtime.logs import configure_logging

    configure_logging("supervisor")

    async def serve() -> None:
        supervisor = Supervisor(directory, settings, counts, servers, after_stores=after_stores)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, supervisor.request_stop)
        try:
            await unless_interrupted(supervisor, supervisor.start())
            typer.echo(
                f"ready: {' '.join(supervisor.urls)}  (stop with Ctrl-C or `fictl down --dir {directory}`)", err=True
            )
            await supervisor.wait_stop_requested()
        except KeyboardInterrupt:
            say(f"stopped what was starting in {directory}")
        finally:
            await supervisor.stop()

    run_async(serve())


async def unless_interrupted(supervisor: Supervisor, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; once a stop is requested of `supervisor`, it is ended and `KeyboardInterrupt` raised."""
    from stages.runtime.tasks import end_tasks

    task = asyncio.create_task(work)
    interrupted = asyncio.create_task(supervisor.wait_stop_requested())
    try:
        await asyncio.wait((task, interrupted), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise KeyboardInterrupt
        return task.result()
    finally:
        await end_tasks(task, interrupted)


def parse_scale(option: str, text: str | None) -> dict[Stage, int]:
    """``ingest=1,segment=2``, given for `option` → counts by stage.

    Raises:
        SettingsError: an unknown stage, or not a count.
    """
    counts: dict[Stage, int] = {}
    for part in filter(None, (text or "").split(",")):
        name, _, count = part.partition("=")
        stage = next((stage for stage in STAGES if stage == name.strip()), None)
        if stage is None or not count.strip().isdecimal():
            raise SettingsError(f"{option} {part!r}: write STAGE=COUNT with a stage of {', '.join(STAGES)}")
        counts[stage] = int(count)
    return counts


def _detach(directory: Path, scale: str | None, servers: int, chosen: list[str] | None, *, after_stores: bool) -> None:
    from cluster.state import NotRunningError, read_state

    directory.mkdir(parents=True, exist_ok=True)
    log_path = directory / "supervisor.log"
    config = config_option.get()
    command = [sys.executable, "-P", "-m", "cluster", *(["--config", config] if config is not None else [])]
    command += ["up", "--dir", str(directory), "--servers", str(servers), *(["--scale", scale] if scale else [])]
    command += ["--after-stores"] if after_stores else []
    command += [part for text in chosen or [] for part in ("--set", text)]
    with log_path.open("ab") as log:
        told_before_bytes = log.tell()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline_s = time.monotonic() + UP_START.s
    try:
        while time.monotonic() < deadline_s:
            if child.poll() is not None:
                _tell_end(log_path, told_before_bytes, child.returncode)
            try:
                state = read_state(directory)
            except NotRunningError:
                state = None
            if state is not None and state.status == "ready" and state.supervisor_pid == child.pid:
                say(f"ready: {' '.join(state.urls)}  (stop with `fictl down --dir {directory}`)")
                return
            time.sleep(UP_POLL.s)
        raise FiError(f"not ready after {UP_START.s:.0f} s; see {log_path}")
    except BaseException:
        if child.poll() is None:
            child.terminate()
            child.wait(UP_STOP.s)
        raise


def _tell_end(log_path: Path, told_before_bytes: int, code: int) -> NoReturn:
    """Shows the end of what a start that failed added to its log, and leaves with its exit code."""
    with log_path.open("rb") as log:
        log.seek(told_before_bytes)
        added = log.read().decode(errors="replace").splitlines()
    for line in added[-SHOWN_LINES_MAX:]:
        say(line)
    say(f"fi: it did not start (exit code {code}); see {log_path}")
    raise typer.Exit(code if code > 0 else FAILED)


def _runs(directory: Path) -> bool:
    from cluster.state import NotRunningError, read_state

    try:
        read_state(directory)
    except NotRunningError:
        return False
    return True


def down(
    directory: DirectoryOption = DEFAULT_DIRECTORY,
) -> None:
    """Stops what `fictl up` started in DIR: stages in flow order, then the servers.

    Exits 0 when nothing of it is left, also when it had ended before; 3 when nothing was ever started in DIR.

    Example: fictl down --dir /var/lib/fi
    """
    from cluster.state import EndedError, read_state

    try:
        pid = read_state(directory).supervisor_pid
    except EndedError as error:
        say(str(error))
        return
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        # It ended at this moment.
        pass
    except PermissionError:
        raise DefiniteError(f"process {pid}, which runs {directory}, is another user's: stop it as that user") from None
    deadline_s = time.monotonic() + UP_STOP.s
    with progress_bar("stopping"):
        while (runs := _runs(directory)) and time.monotonic() < deadline_s:
            time.sleep(UP_POLL.s)
    if not runs:
        say(f"stopped what ran in {directory}")
        return
    raise FiError(f"process {pid} still runs after {UP_STOP.s:.0f} s; kill -9 {pid} loses nothing that was accepted")
