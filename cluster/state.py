"""What runs in a directory: a small file the supervisor keeps, and the way other commands find it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from contracts.errors import DefiniteError
from contracts.settings import Settings
from contracts.wire import UNREADABLE
from stages.runtime.pids import process_lives

STATE_FILE = "cluster.json"


class NotRunningError(DefiniteError):
    """Nothing runs in the directory."""


class EndedError(NotRunningError):
    """What ran in the directory runs no more."""


class ProcessState(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a run.

    Attributes:
        name: such as ``n1`` or ``segment-0``.
        kind: ``server`` or the stage.
        pid: None while it is down.
    """

    name: str
    kind: str
    pid: int | None


class State(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="cluster.1"):
    """What the supervisor of a directory tells others.

    Attributes:
        status: where it is in its life. Publishers may start at ``ready``.
        supervisor_pid: its process id.
        supervisor_started: clock ticks between boot and its start, which tell it from a later process with the same id;
            None where the system does not say.
        urls: client URLs of the servers; empty until they run.
        processes: all it looks after.
        settings: everything the run was started with.
        control: path of the socket that takes requests; empty while none are taken.
    """

    status: Literal["starting", "ready", "stopping", "stopped"]
    supervisor_pid: int
    supervisor_started: int | None
    urls: tuple[str, ...]
    processes: tuple[ProcessState, ...]
    settings: Settings
    control: str = ""


def write_state(directory: Path, state: State) -> None:
    """Replaces the state file in one step: a reader sees the old or the new one, never a part."""
    temporary = directory / f"{STATE_FILE}.tmp"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state)) + b"\n")
    temporary.replace(directory / STATE_FILE)


def read_state(directory: Path) -> State:
    """The state of the run in `directory`, whose supervisor is alive.

    Raises:
        EndedError: there is none any more; the message says how to start it again.
        NotRunningError: there never was one, or it cannot be told.
    """
    path = directory / STATE_FILE
    try:
        state = msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        raise NotRunningError(f"nothing runs in {directory}; start it with `fictl up --dir {directory}`") from None
    except UNREADABLE as error:
        raise NotRunningError(f"{path} cannot be read ({error}); was it written by another version?") from error
    if state.status == "stopped" or not process_lives(state.supervisor_pid, state.supervisor_started):
        how = "was stopped" if state.status == "stopped" else "ended without stopping"
        raise EndedError(f"what ran in {directory} {how}; start it again with `fictl up --dir {directory}`")
    return state
