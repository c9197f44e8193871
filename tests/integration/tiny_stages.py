"""A supervisor whose stages are tiny real processes, which only write down when they start and stop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from cluster.keeper import ProcessEvent
from cluster.supervisor import Supervisor
from contracts.settings import Settings
from contracts.subjects import STAGES, Stage

SETTINGS = Settings(replicas=1, partitions=4, drain_s=30)

STAGE = """
import os, signal, sys, time
home, name = sys.argv[1:]

def note(what):
    with open(f"{home}/journal", "a") as journal:
        journal.write(f"{what} {name} {os.environ.get('FI_PARTITIONS')}\\n")

def stop(number, frame):
    if not os.path.exists(f"{home}/stubborn"):
        note("stop")
        sys.exit(0)
    note("ignored")

signal.signal(signal.SIGTERM, stop)
if os.path.exists(f"{home}/broken-{name}"):
    print("the disk is on fire", file=sys.stderr)
    sys.exit(3)
note("start")
print("some chatter")
print("READY", flush=True)
while True:
    time.sleep(60)
"""


def fake(home: Path) -> Callable[[Stage, str], list[str]]:
    """A command for stages that only write down when they start and stop."""

    def command(stage: Stage, name: str) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", STAGE, str(home), name]

    return command


def journal(home: Path, what: str) -> list[str]:
    """Names of the processes that noted `what`, in order."""
    lines = (home / "journal").read_text().splitlines() if (home / "journal").exists() else []
    return [line.split()[1] for line in lines if line.split()[0] == what]


def make(home: Path, events: list[ProcessEvent] | None = None, **scale: int) -> Supervisor:
    on_event = (events if events is not None else []).append
    stages: dict[Stage, int] = {stage: scale.get(stage, 1) for stage in STAGES}
    return Supervisor(home, SETTINGS, stages, servers=1, on_event=on_event, command=fake(home))


def pid_of(supervisor: Supervisor, name: str) -> int | None:
    return next(process.pid for process in supervisor.processes if process.name == name)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True
