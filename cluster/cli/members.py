"""`fictl members|scale|restart|pause|resume|drain`: who works on what, and changing it while it runs."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    FAILED,
    NOT_READY,
    DirectoryOption,
    JsonOption,
    NatsOption,
    NotReadyError,
    console,
    find_servers,
    finite,
    login_place,
    make_table,
    named_stage,
    print_json,
    progress_bar,
    run_async,
    say,
    with_api,
)
from cluster.cli.up import parse_scale
from cluster.state import State, read_state
from cluster.words import ranges
from contracts.budgets import DRAINED, MEMBERS_SHOWN, OBEYED, RESTART, SCALE, SETTLED
from contracts.errors import ClusterUnavailableError, FiError, SettingsError
from contracts.subjects import STAGES, Stage
from stages.runtime.access import Servers

if TYPE_CHECKING:
    from cluster.control import RestartAnswer
    from cluster.drain import DrainReport
    from cluster.members import MembersReport
    from stages.runtime.api import Api

T = TypeVar("T")

StageArgument = Annotated[str, typer.Argument(metavar="STAGE", help=f"One of {', '.join(STAGES)}.", show_default=False)]
WaitOption = Annotated[float, typer.Option("--wait", min=0, callback=finite, help="Seconds to wait for it at most.")]


def members(
    directory: DirectoryOption = DEFAULT_DIRECTORY, nats: NatsOption = None, as_json: JsonOption = False
) -> None:
    """Shows the processes of every stage on every node, their partitions, and the partitions nobody works on.

    Exits 3 unless every partition of every stage is worked on. Before it says so it looks again for some seconds:
    announcements expire while the bucket elects a leader. Of a paused stage it says so at once.

    Example: fictl members --dir .fi
    """
    with progress_bar("looking"):
        report = run_async(with_api(find_servers(directory, nats), _look))
    if as_json:
        print_json({"complete": report.complete, **msgspec.structs.asdict(report)})
    else:
        _show(report)
    if not report.complete:
        raise typer.Exit(NOT_READY)


def scale(
    counts: Annotated[list[str], typer.Argument(metavar="STAGE=N…", help="E.g. segment=4.", show_default=False)],
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    wait_s: WaitOption = SETTLED.s,
    as_json: JsonOption = False,
) -> None:
    """Changes how many processes of a stage a running `fictl up` keeps, and waits until the partitions have moved.

    Processes that are no longer wanted finish what they have in hand. Nothing is lost, doubled or reordered. 0 is
    allowed: other nodes take over, or input waits. Exits 3 if partitions still moved after the wait.

    Example: fictl scale segment=4 hash=2 --dir .fi
    """
    wanted = parse_scale("STAGE=N", ",".join(counts))
    if not wanted:
        raise SettingsError("say what to scale, e.g. `fictl scale segment=4`")
    state = _controlled(directory)

    async def work() -> tuple[dict[Stage, int], dict[Stage, int], MembersReport]:
        from cluster.control import ask_scale

        answer = await ask_scale(state.control, wanted, SCALE.s)
        done = ", ".join(f"{stage}={answer.after[stage]}" for stage in wanted)
        return answer.before, answer.after, await _seen(f"{done} is done", _settled(state, wanted, wait_s))

    with progress_bar("scaling"):
        before, after, report = run_async(work())
    moving = [stage for stage in report.moving if stage in wanted]
    if as_json:
        print_json({"before": before, "after": after, "settled": not moving, "members": report.members})
    else:
        for stage in wanted:
            what = "unchanged" if before[stage] == after[stage] else f"from {before[stage]}"
            say(f"{stage}: {after[stage]} processes ({what})")
        _show(report)
    if moving:
        raise NotReadyError(f"partitions of {', '.join(moving)} still move after {wait_s:g} s; see `fictl members`")


def restart(
    stages: Annotated[list[str] | None, typer.Argument(metavar="[STAGE…]", help="Default: all.")] = None,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    wait_s: WaitOption = SETTLED.s,
    as_json: JsonOption = False,
) -> None:
    """Replaces the processes of a running `fictl up`, one at a time, from persist to ingest, while events flow.

    The new process is ready before the old one finishes what it has in hand: each partition only waits for its
    hand-over. Nothing is lost, doubled or reordered. Use it after an update of the package: in this order each stage
    can read what the one before it writes. If a new process does not come up, the old one goes on, nothing further is
    touched, and the exit code is 1; 3 if partitions still moved after the wait.

    Example: fictl restart persist --dir .fi
    """
    chosen = tuple(dict.fromkeys(map(named_stage, stages or STAGES)))
    state = _controlled(directory)

    async def work() -> tuple[RestartAnswer, MembersReport]:
        from cluster.control import ask_restart

        answer = await ask_restart(state.control, chosen, RESTART.s)
        done = ", ".join(f"{stage}: {count}" for stage, count in answer.replaced.items())
        return answer, await _seen(f"processes were replaced ({done})", _settled(state, chosen, wait_s))

    with progress_bar("restarting"):
        answer, report = run_async(work())
    moving = [stage for stage in report.moving if stage in chosen]
    if as_json:
        told = {"replaced": answer.replaced, "error": answer.error, "settled": not moving, "members": report.members}
        print_json(told)
    else:
        for stage, count in answer.replaced.items():
            say(f"{stage}: {count} processes replaced")
        _show(report)
    if answer.error:
        raise FiError(f"not all was replaced: {answer.error}")
    if moving:
        raise NotReadyError(f"partitions of {', '.join(moving)} still move after {wait_s:g} s; see `fictl members`")


def pause(
    stage: StageArgument,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    wait_s: WaitOption = OBEYED.s,
    as_json: JsonOption = False,
) -> None:
    """Pauses all processes of STAGE on every node: they finish what they have in hand and stop reading.

    Input waits in the stage's stream; when that is full, upstream waits too, and at last the gateway is told. It stays
    paused, also for processes that start later, until `fictl resume`. Exits 3 if some still worked after the wait.

    Example: fictl pause persist --dir .fi
    """
    chosen = named_stage(stage)
    _tell(chosen, directory, nats, wait_s, as_json, pausing=True)


def resume(
    stage: StageArgument,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    wait_s: WaitOption = OBEYED.s,
    as_json: JsonOption = False,
) -> None:
    """Takes `fictl pause STAGE` back; every process goes on from where it stood. Does nothing when it is not paused.

    Example: fictl resume persist --dir .fi
    """
    _tell(named_stage(stage), directory, nats, wait_s, as_json, pausing=False)


def drain(
    directory: DirectoryOption = DEFAULT_DIRECTORY, wait_s: WaitOption = DRAINED.s, as_json: JsonOption = False
) -> None:
    """Stops the stages of the `fictl up` in DIR in flow order, each when its input is worked off; the servers stay up.

    Exits 0 when everything that was accepted is committed, 1 when something waits in FI_EVENTS. Stop gateways first.
    `fictl scale` starts the stages again.

    Example: fictl drain --dir .fi && echo safe to take down
    """
    state = _controlled(directory)
    before: dict[Stage, int] = {}
    stopped: list[Stage] = []

    async def work(api: Api) -> DrainReport:
        from cluster.control import ask_scale
        from cluster.drain import drain as drain_stages
        from stages.runtime.facts import read_cluster

        async def stop(stage: Stage) -> None:
            # What the supervisor was asked for it does, also when nobody waits for it any more.
            stopped.append(stage)
            await ask_scale(state.control, {stage: 0}, SCALE.s)

        with progress_bar("draining") as tell:
            facts = await read_cluster(api.client)
            before.update((await ask_scale(state.control, {}, SCALE.s)).before)
            return await drain_stages(api, facts.partitions, stop, wait_s, lambda n: tell(n, len(STAGES)))

    try:
        report = run_async(with_api(Servers(state.urls), work))
    finally:
        _say_how_to_start(directory, before, stopped)
    if as_json:
        counts = {stage: before[stage] for stage in stopped}
        print_json({**msgspec.structs.asdict(report), "stopped": counts})
    else:
        console().print(
            f"persisted {report.persisted:,}, duplicates {report.duplicates:,}, dead-lettered "
            f"{report.dead_lettered:,}, waiting {report.waiting:,}"
        )
    if not report.committed:
        say(
            f"{report.waiting} accepted messages wait in FI_EVENTS, where they are safe"
            + (f"; {', '.join(report.unfinished)} had not finished" if report.unfinished else "")
        )
        raise typer.Exit(FAILED)


def _say_how_to_start(directory: Path, before: dict[Stage, int], stopped: list[Stage]) -> None:
    if again := " ".join(f"{stage}={before[stage]}" for stage in stopped if before[stage]):
        say(f"start the stages again with `fictl scale {again} --dir {directory}`")
    if down := [stage for stage in before if not before[stage]]:
        more = " ".join(f"{stage}=N" for stage in down)
        say(
            f"{', '.join(down)} had no process here before this; if an earlier drain stopped them: "
            f"`fictl scale {more} --dir {directory}`"
        )


def _tell(
    stage: Stage, directory: Path, nats: list[str] | None, wait_s: float, as_json: bool, *, pausing: bool
) -> None:
    async def work(api: Api) -> MembersReport:
        from cluster.members import look_until
        from cluster.members import pause as pause_stage
        from cluster.members import resume as resume_stage
        from contracts.membership import Pause

        if pausing:
            by = login_place()
            await pause_stage(api, stage, Pause(since_ns=time.time_ns(), by=by))
        else:
            await resume_stage(api, stage)
        told = f"{stage} is told to {'pause' if pausing else 'go on'}"
        return await _seen(told, look_until(api, obeyed, wait_s))

    def obeyed(seen: MembersReport) -> bool:
        return (stage in seen.paused) == pausing and stage not in seen.moving

    with progress_bar("pausing" if pausing else "resuming"):
        report = run_async(with_api(find_servers(directory, nats), work))
    ours = [member for member in report.members if member.stage == stage]
    if as_json:
        print_json({"stage": stage, "paused": pausing, "settled": obeyed(report), "members": ours})
    else:
        say(f"{stage} is {'paused' if pausing else 'at work'}: {len(ours)} processes")
    if not obeyed(report):
        raise NotReadyError(f"not every process of {stage} obeyed within {wait_s:g} s; see `fictl members`")


def _controlled(directory: Path) -> State:
    state = read_state(directory)
    if not state.control:
        raise NotReadyError(f"what runs in {directory} is {state.status} and takes no requests; try again")
    return state


async def _look(api: Api) -> MembersReport:
    from cluster.members import look_until

    def held(seen: MembersReport) -> bool:
        return all(row.stage in seen.paused for row in seen.unheld)

    return await look_until(api, held, MEMBERS_SHOWN.s)


async def _settled(state: State, stages: Collection[Stage], wait_s: float) -> MembersReport:
    """What is seen once no partition of `stages` moves any more, or after `wait_s`."""
    from cluster.members import look_until

    async def wait(api: Api) -> MembersReport:
        return await look_until(api, lambda seen: not set(stages).intersection(seen.moving), wait_s)

    return await with_api(Servers(state.urls), wait)


async def _seen(done: str, looking: Awaitable[T]) -> T:
    """What `looking` gives. Where it cannot, `ClusterUnavailableError` says first what was done."""
    try:
        return await looking
    except ClusterUnavailableError as error:
        raise ClusterUnavailableError(f"{done}, but what came of it cannot be seen: {error}") from error


def _show(report: MembersReport) -> None:
    screen = console()
    table = make_table("stage", "name", "node", "pid", "partitions", "state", "s ago", "store")
    for member in report.members:
        lanes = ranges(member.partitions) + (" pinned" if member.pinned else "")
        table.add_row(
            *(member.stage, member.name, member.node, str(member.pid), lanes),
            *(member.state, f"{member.age_s:.1f}", member.store[:8]),
        )
    screen.print(table)
    for stage, pause in report.paused.items():
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(pause.since_ns / 1e9))
        screen.print(f"{stage} is paused since {when} by {pause.by}")
    for (stage, why), partitions in report.unheld_by_reason.items():
        screen.print(f"{stage} {ranges(partitions)}: {why}")
