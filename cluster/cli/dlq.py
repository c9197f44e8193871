"""`fictl dlq ls|show|replay|drop`: what the pipeline refused, and what becomes of it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    FAILED,
    DirectoryOption,
    JsonOption,
    NatsOption,
    check_partitions,
    command_api,
    connected,
    find_servers,
    not_empty,
    parse_when,
    print_json,
    print_lines,
    progress_bar,
    run_async,
    say,
)
from contracts.budgets import COMMAND_READY
from contracts.errors import DefiniteError, SettingsError
from contracts.subjects import STAGES, publish_subject
from stages.persist.files import read_small
from stages.runtime.access import Servers

if TYPE_CHECKING:
    from cluster.dlq import Counts, DeadLetters, Selection
    from contracts.letters import Letter

    Act = Callable[[DeadLetters, Sequence[Letter]], Awaitable[None]]

SHOWN_MAX: Final = 100
LIMIT_MAX: Final = 10**9
SEQ_MAX: Final = 2**64 - 1

SeqArgument = Annotated[
    list[int] | None,
    typer.Argument(
        min=1, max=SEQ_MAX, metavar="[SEQ]...", help="Letters by their number in FI_DLQ.", show_default=False
    ),
]
StageOption = Annotated[str | None, typer.Option("--stage", help=f"Refused by: {', '.join(STAGES[:-1])}.")]
PartitionOption = Annotated[int | None, typer.Option("--partition", min=0, help="Of this partition.")]
ReasonOption = Annotated[
    str | None, typer.Option("--reason", callback=not_empty, help="This reason; `payload` takes `payload.value` too.")
]
SiteOption = Annotated[str | None, typer.Option("--site", callback=not_empty, help="From this site.")]
SinceOption = Annotated[
    str | None,
    typer.Option("--since", metavar="T", help="Dead-lettered since: 2026-01-31T08:00:00Z, or 90s, 2h, 3d ago."),
]
UntilOption = Annotated[str | None, typer.Option("--until", metavar="T", help="Dead-lettered until; as --since.")]
AllOption = Annotated[bool, typer.Option("--all", help="Every letter, when no other filter is given.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, change nothing.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def ls(
    stage: StageOption = None,
    partition: PartitionOption = None,
    reason: ReasonOption = None,
    site: SiteOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[
        int, typer.Option(min=0, max=LIMIT_MAX, metavar="N", help="Show the newest N; 0 for all.")
    ] = SHOWN_MAX,
    only_summary: Annotated[bool, typer.Option("--summary", help="Only the counts by stage and reason.")] = False,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Lists dead letters, one a line, and counts them by stage and reason.

    Columns: number in FI_DLQ, when, stage, partition, origin/index of the event, reason, field, first bytes. With
    --json one object a line; with --summary --json one object.

    Example: fictl dlq ls --stage segment --reason payload --since 2h
    """
    selection = _selection(stage, partition, reason, site, since, until)
    servers = find_servers(directory, nats)
    from cluster.cli import letters as shown
    from cluster.dlq import Counts

    def render(letter: Letter) -> str:
        return msgspec.json.encode(shown.brief(letter)).decode() if as_json else shown.line(letter)

    counts = Counts()
    newest: deque[str] = deque(maxlen=limit or None)

    async def work() -> None:
        async with _opened(servers, partition) as dead:
            span = await dead.span(selection)
            if not as_json and not only_summary:
                print_lines(shown.HEADINGS)
            with progress_bar("reading") as tell:
                async with aclosing(dead.letters(selection, span, tell)) as letters:
                    async for letter in letters:
                        counts.add(letter)
                        if only_summary:
                            continue
                        newest.append(render(letter))
                        if not limit:
                            print_lines(newest.pop())

    run_async(work())
    for row in newest:
        print_lines(row)
    if only_summary and as_json:
        print_json(shown.counted(counts))
    elif not as_json:
        print_lines(*shown.counted_lines(counts))
    if limit and not only_summary and len(newest) < counts.letters:
        say(f"these are the newest {len(newest)} of {counts.letters}; --limit 0 shows all")


def show(
    seq: Annotated[
        int,
        typer.Argument(min=1, max=SEQ_MAX, metavar="SEQ", help="The letter's number in FI_DLQ.", show_default=False),
    ],
    raw: Annotated[bool, typer.Option("--raw", help="Only the event's bytes, as they came.")] = False,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Shows one dead letter: why it was refused, where it came from, its bytes, and what can be done.

    Example: fictl dlq show 17 --raw > event.json
    """
    from cluster.cli import letters as shown

    servers = find_servers(directory, nats)

    async def work() -> Letter | None:
        async with _opened(servers) as dead:
            return await dead.find(seq)

    with progress_bar("reading"):
        letter = run_async(work())
    if letter is None:
        raise DefiniteError(_gone([seq]))
    if raw:
        sys.stdout.buffer.write(letter.data)
        sys.stdout.buffer.flush()
    elif as_json:
        print_json(shown.whole(letter) | {"next": shown.advice(letter)})
    else:
        print_lines(*shown.page(letter))


def replay(
    seqs: SeqArgument = None,
    stage: StageOption = None,
    partition: PartitionOption = None,
    reason: ReasonOption = None,
    site: SiteOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    everything: AllOption = False,
    body: Annotated[
        Path | None,
        typer.Option("--body", metavar="FILE", help="Publish this instead of the letter's bytes; for one SEQ."),
    ] = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sends dead letters through the pipeline again, once what refused them was mended.

    The event's bytes are published to the subject they came from, and the letter is removed once they are accepted.
    The event comes at the end of its consultation, behind what was accepted since. Replaying twice is harmless, also
    after a crash: an event is stored once. What is refused again comes back as a new letter. Exits 1 when a letter
    cannot be replayed; it stays.

    Example: fictl dlq replay --stage segment --reason payload.value --dry-run

    Example: fictl dlq show 17 --raw > event.json; edit it; fictl dlq replay 17 --body event.json
    """
    selection = _selection(stage, partition, reason, site, since, until)
    _check_chosen(seqs, selection, everything, unasked=dry_run or yes)
    if body is not None and len(seqs or ()) != 1:
        raise SettingsError("--body is for one letter: give its SEQ")
    mended = None if body is None else read_small(body)
    report = {"matched": 0, "replayed": 0, "repeated": 0}
    refused: list[dict[str, Any]] = []

    from cluster.dlq import check_body, obstacle

    async def act(dead: DeadLetters, page: Sequence[Letter]) -> None:
        for letter in page if mended is not None else ():
            check_body(letter, mended or b"")
        report["matched"] += len(page)
        if dry_run:
            found = [(letter, obstacle(letter)) for letter in page]
            report["replayed"] += sum(not why for _, why in found)
        else:
            outcomes = await dead.replay(page, mended)
            found = [(outcome.letter, outcome.refusal) for outcome in outcomes]
            report["replayed"] += sum(not outcome.refusal for outcome in outcomes)
            report["repeated"] += sum(outcome.repeated for outcome in outcomes)
        for letter, why in found:
            if why:
                refused.append({"seq": letter.seq, "why": why})
                say(f"letter {letter.seq} cannot be replayed: {why}")
            elif dry_run and not as_json:
                print_lines(f"letter {letter.seq} would go to {publish_subject(letter.site, letter.consultation)}")

    servers = find_servers(directory, nats)
    missing = run_async(_go(servers, seqs, selection, "replay", act, dry_run=dry_run, yes=yes))
    if as_json:
        print_json({**report, "refused": refused, "missing": missing, "dry_run": dry_run})
    else:
        _show_replayed(report, dry_run)
    if refused or missing:
        raise typer.Exit(FAILED)


def _show_replayed(report: Mapping[str, int], dry_run: bool) -> None:
    print_lines(f"{report['replayed']} of {report['matched']} letters {'would be ' if dry_run else ''}replayed")
    if report["repeated"]:
        say(f"{report['repeated']} of them were published by an earlier replay already, and only removed now")
    if report["replayed"] and not dry_run:
        say("what is refused again comes back as a new letter: look with `fictl dlq ls --since 5m`")


def drop(
    seqs: SeqArgument = None,
    stage: StageOption = None,
    partition: PartitionOption = None,
    reason: ReasonOption = None,
    site: SiteOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    everything: AllOption = False,
    why: Annotated[str, typer.Option("--why", metavar="TEXT", help="Written beside each letter in --output.")] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="First append the letters there, one a line (NDJSON)."),
    ] = None,
    erase: Annotated[
        bool, typer.Option("--erase", help="Have the servers overwrite the bytes on their disks: 50 letters a second.")
    ] = False,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Deletes dead letters for good. Exits 1 when a SEQ is not there.

    With --output each letter is safely in the file before it is deleted. Use this and no `nats stream purge`: the
    stages take the last message of each subject for their checkpoint.

    Example: fictl dlq drop --site clinic-7 --reason json --until 2026-01-31T08:00:00Z --output dropped.ndjson
    """
    selection = _selection(stage, partition, reason, site, since, until)
    _check_chosen(seqs, selection, everything, unasked=dry_run or yes)
    report = {"matched": 0, "dropped": 0}
    from cluster.cli.letters import append, line
    from stages.persist.output import check_place

    if output is not None:
        check_place(output)

    async def act(dead: DeadLetters, page: Sequence[Letter]) -> None:
        report["matched"] += len(page)
        if dry_run:
            for letter in page if not as_json else ():
                print_lines(line(letter))
            return
        if output is not None:
            append(output, page, why)
        report["dropped"] += await dead.remove(page, erase=erase)

    missing = run_async(_go(find_servers(directory, nats), seqs, selection, "drop", act, dry_run=dry_run, yes=yes))
    if as_json:
        print_json({**report, "missing": missing, "dry_run": dry_run})
    elif dry_run:
        print_lines(f"{report['matched']} letters would be dropped")
    else:
        print_lines(f"{report['dropped']} letters dropped")
    if missing:
        raise typer.Exit(FAILED)


async def _go(
    servers: Servers,
    seqs: list[int] | None,
    selection: Selection,
    verb: str,
    act: Act,
    *,
    dry_run: bool,
    yes: bool,
) -> list[int]:
    """Asks if it is to be asked, then calls `act` with page after page of what was chosen. Gives the SEQs not there.

    What filters choose is what was there at first: a replayed event that is refused again is not met again.
    """
    from cluster.dlq import PAGE, Counts

    counts, ask = Counts(), not (dry_run or yes)
    async with _opened(servers, selection.partition) as dead:
        if seqs:
            found = [(seq, await dead.find(seq)) for seq in sorted(set(seqs))]
            letters = [letter for _, letter in found if letter is not None]
            for letter in letters if ask else ():
                counts.add(letter)
            await _confirm(verb, counts)
            for start in range(0, len(letters), PAGE):
                await act(dead, letters[start : start + PAGE])
            missing = [seq for seq, letter in found if letter is None]
            _missing(missing)
            return missing
        span = await dead.span(selection)
        if ask:
            with progress_bar("counting") as tell:
                async with aclosing(dead.letters(selection, span, tell)) as all_of_them:
                    async for letter in all_of_them:
                        counts.add(letter)
            await _confirm(verb, counts)
        with progress_bar(verb) as tell:
            async with aclosing(dead.pages(selection, span, tell)) as pages:
                async for page in pages:
                    if chosen := [letter for letter in page if selection.takes(letter)]:
                        await act(dead, chosen)
                    if not dry_run:
                        await dead.remove([letter for letter in page if letter.handled])
    return []


async def _confirm(verb: str, counts: Counts) -> None:
    """Asks before `counts` letters are acted upon. Raises `DefiniteError` unless told yes."""
    if not counts.letters:
        return
    from cluster.cli.letters import counted_lines

    say("\n".join(counted_lines(counts)))
    if not await asyncio.to_thread(typer.confirm, f"{verb} them?", err=True):
        raise DefiniteError("nothing was changed")


def _missing(seqs: Sequence[int]) -> None:
    if seqs:
        say(f"fi: {_gone(seqs)}")


def _gone(seqs: Sequence[int]) -> str:
    return f"no letter {', '.join(map(str, seqs))}: replayed or dropped meanwhile? `fictl dlq ls` shows what is there"


def _selection(
    stage: str | None, partition: int | None, reason: str | None, site: str | None, since: str | None, until: str | None
) -> Selection:
    from cluster.dlq import Selection

    if stage is not None and stage not in STAGES:
        raise SettingsError(f"--stage {stage}: use one of {', '.join(STAGES[:-1])}")
    return Selection(
        stage=stage,
        partition=partition,
        reason=reason or "",
        site=site or "",
        since_ns=None if since is None else parse_when("--since", since, time.time_ns()),
        until_ns=None if until is None else parse_when("--until", until, time.time_ns()),
    )


def _check_chosen(seqs: list[int] | None, selection: Selection, everything: bool, *, unasked: bool) -> None:
    """Holds the rules for what a verb that changes something is told.

    Raises:
        SettingsError: nothing was chosen, or two things; or nobody is there to be asked.
    """
    filtered = not selection.everything
    if sum((bool(seqs), filtered, everything)) > 1:
        raise SettingsError("give SEQs, or filters, or --all: one of them")
    if not (seqs or filtered or everything):
        raise SettingsError("which letters? Give SEQs, filters, or --all; `fictl dlq ls` shows them")
    if not unasked and not sys.stdin.isatty():
        raise SettingsError("this asks for confirmation on a terminal only; give --yes, or --dry-run to look first")


@asynccontextmanager
async def _opened(servers: Servers, partition: int | None = None) -> AsyncIterator[DeadLetters]:
    """The letters of the cluster. Raises `SettingsError`: it has no such `partition`."""
    from cluster.dlq import DeadLetters
    from stages.runtime.facts import read_cluster

    async with connected(servers) as client:
        facts = await read_cluster(client, wait_s=COMMAND_READY.s)
        check_partitions("--partition", [] if partition is None else [partition], facts.partitions)
        yield DeadLetters(command_api(client), facts.cluster_id)
