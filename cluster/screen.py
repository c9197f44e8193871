"""What `fictl status` and `fictl top` show, as lines of text. Pure.

Always true: no line is wider than the screen, and with a height there are never more lines than that. The verdict comes
first and gets its room first; what does not fit is left out from the end, and said to be.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from typing import Final

import msgspec
from rich.text import Text

from cluster.problem import Problem
from cluster.scrape import Percentiles
from cluster.summary import Summary, sum_known
from cluster.words import duration, ranges, size
from contracts.subjects import BUCKETS, STAGES

UNKNOWN: Final = "?"
BLOCKS: Final = "▁▂▃▄▅▆▇█"
GOOD, BAD, DIM, HEAD = "green", "bold red", "dim", "bold"
_SPARK_MAX: Final = 30
_WIDE: Final = 110


class Trends(msgspec.Struct, frozen=True, kw_only=True):
    """Past values of what has a sparkline, the oldest first; None where a value was not known."""

    accepted_per_s: tuple[float | None, ...] = ()
    persisted_per_s: tuple[float | None, ...] = ()
    waiting: tuple[float | None, ...] = ()
    durable_p95_s: tuple[float | None, ...] = ()


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """What to show besides a summary.

    Attributes:
        width, height: of the screen; height None for as long as it takes.
        title: which pipeline.
        by_partition: partitions in place of streams.
        trends: for sparklines; None for none.
        note: at the top right, e.g. that the screen is frozen.
        footer: the last line of the screen; empty for none, and no more lines than are needed.
    """

    width: int
    height: int | None = None
    title: str = ""
    by_partition: bool = False
    trends: Trends | None = None
    note: str = ""
    footer: str = ""


def render(summary: Summary, problems: Sequence[Problem], page: Page) -> list[Text]:
    """The lines of the screen."""
    foot = [Text(page.footer, style=DIM)] if page.footer else []
    head = _headline(summary, problems, page)
    body = [*_rates(summary, page), *_stages(summary, page)]
    rest = [
        *(_partitions(summary) if page.by_partition else _streams(summary)),
        *_facts(summary, page.width),
        *_processes(summary),
    ]
    if page.height is None:
        lines = [head, *_verdict(problems, page.width, None), *body, *rest]
        return [_fit(line, page.width) for line in lines]
    room = page.height - 1 - len(foot)
    verdict = _verdict(problems, page.width, max(room // 2, room - len(body) - len(rest)))
    lines = [*verdict, *body, *rest]
    if len(lines) > room:
        left_out = len(lines) - room + 1
        lines = [
            *lines[: room - 1],
            Text(f"… {left_out} lines more: a higher window, or `fictl status | less`", style=DIM),
        ]
    if foot:
        lines += [Text("")] * (room - len(lines))
    return [_fit(line, page.width) for line in (head, *lines, *foot)][: page.height]


def _fit(line: Text, width: int) -> Text:
    line = line.copy()
    line.no_wrap = True
    line.truncate(width, overflow="ellipsis")
    return line


def _headline(summary: Summary, problems: Sequence[Problem], page: Page) -> Text:
    when = time.strftime("%H:%M:%S", time.localtime(summary.at_ns / 1e9))
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}, the most urgent first"
    verdict = Text(f"NOT WELL: {count}", style=BAD) if problems else Text("all well", style=f"bold {GOOD}")
    right = "  ".join(filter(None, (page.note, page.title, when)))
    gap = max(2, page.width - verdict.cell_len - len(right))
    return verdict + Text(" " * gap + right, style=DIM)


def _verdict(problems: Sequence[Problem], width: int, room: int | None) -> list[Text]:
    """Each problem with its next step, folded; the last line says what found no room."""
    lines: list[Text] = []
    for number, problem in enumerate(problems, 1):
        folded = textwrap.wrap(
            f"{number} {problem.text}", width, subsequent_indent="  ", break_long_words=True, break_on_hyphens=False
        )
        left = len(problems) - number
        if room is not None and len(lines) + len(folded) + (left > 0) > room:
            if not lines:
                # The most urgent one is told as far as there is room, and what to do about it.
                lines += [Text(line, style=BAD) for line in folded[: room - 2]]
                lines.append(Text(f"  -> {problem.next}", style=BAD))
                number += 1
            lines.append(Text(f"  … and {len(problems) - number + 1} more", style=BAD))
            break
        lines += [Text(line, style=BAD if problem.urgency <= 2 else "yellow") for line in folded]
    return lines


def spark(values: Sequence[float | None], width: int) -> str:
    """The last `width` values as blocks, scaled from 0 to the highest; a blank where one is not known."""
    shown = values[-width:]
    highest = max((value for value in shown if value is not None), default=0.0)

    def block(value: float | None) -> str:
        if value is None:
            return " "
        return BLOCKS[0 if highest <= 0 else min(len(BLOCKS) - 1, int(value / highest * (len(BLOCKS) - 1) + 0.5))]

    return "".join(map(block, shown))


def _rates(summary: Summary, page: Page) -> list[Text]:
    trends = page.trends
    durable = summary.durable
    over = durable is not None and durable.p95_s > summary.durable_budget_s
    p95 = UNKNOWN if durable is None else f"{duration(durable.p95_s)}{' !' if over else ''}"
    if durable is None and summary.latency_window_s is not None and _is_metered(summary):
        p95 = "no events"
    values = (
        ("accepted", _rate(summary.accepted_per_s), "msg/s", None if trends is None else trends.accepted_per_s),
        ("persisted", _rate(summary.persisted_per_s), "events/s", None if trends is None else trends.persisted_per_s),
        ("waiting", _count(summary.waiting), "messages", None if trends is None else trends.waiting),
        ("durable p95", p95, "", None if trends is None else trends.durable_p95_s),
    )
    lines = []
    columns = 4 if page.width >= _WIDE else 2
    cell = page.width // columns
    for begin in range(0, len(values), columns):
        line = Text()
        for name, value, unit, past in values[begin : begin + columns]:
            text = f"{name} {value}{' ' + unit if unit and value != UNKNOWN else ''} "
            if past is not None:
                text += spark(past, max(0, min(_SPARK_MAX, cell - len(text) - 1)))
            line.append(text[: cell - 1].ljust(cell), style=BAD if over and name == "durable p95" else "")
        line.rstrip()
        lines.append(line)
    return lines


def _is_metered(summary: Summary) -> bool:
    return any(process.metered is not None for process in summary.processes or ())


def _rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def table(rows: Sequence[Sequence[str]], sides: str) -> list[Text]:
    """Rows as columns, the first row as their titles; `sides`: ``r`` or ``l`` for each column."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = zip(row, widths, sides, strict=True)
        text = "  ".join(cell.rjust(width) if side == "r" else cell.ljust(width) for cell, width, side in cells)
        line = Text(text.rstrip(), style=HEAD if number == 0 else "")
        if number:
            line.highlight_regex(r"\S+ \S+ !|NO\b.*|\?", BAD)
        lines.append(line)
    return lines


def _stages(summary: Summary, page: Page) -> list[Text]:
    rows = [("stage", "waiting", "oldest", "p50", "p95", "p99", "budget", "processes", "partitions")]
    for stage in summary.stages:
        held = UNKNOWN if stage.processes is None else ranges(stage.held)
        if stage.paused:
            held = "PAUSED"
        oldest = "-" if stage.oldest_s is None else duration(stage.oldest_s)
        rows.append(
            (
                *(stage.stage, _count(stage.waiting), UNKNOWN if stage.waiting is None else oldest),
                *_percentiles(summary, stage.latency, stage.budget_s),
                *(_count(stage.processes), held),
            )
        )
    durable = _percentiles(summary, summary.durable, summary.durable_budget_s)
    rows.append(("durable", _count(summary.waiting), "", *durable, "", ""))
    lines = table(rows, "lrrrrrrrl")
    if not _is_metered(summary):
        why = "no process of this machine shows metrics" if summary.processes else "latencies: only with --dir of a run"
        lines.append(Text(why, style=DIM))
    return lines


def _percentiles(summary: Summary, latency: Percentiles | None, budget_s: float) -> tuple[str, str, str, str]:
    budget = duration(budget_s)
    if latency is None:
        unknown = "-" if _is_metered(summary) and summary.latency_window_s is not None else UNKNOWN
        return unknown, unknown, unknown, budget
    mark = " !" if latency.p95_s > budget_s else ""
    return duration(latency.p50_s), duration(latency.p95_s) + mark, duration(latency.p99_s), budget


def _streams(summary: Summary) -> list[Text]:
    if not summary.streams:
        return []
    rows = [("stream", "messages", "size", "full", "in/s", "leader", "followers")]
    for stream in summary.streams:
        status = stream.status
        followers = ", ".join(
            f"{replica.name}{' OFFLINE' if replica.offline else '' if replica.current else f' behind {replica.lag}'}"
            for replica in status.replicas
        )
        if status.problem:
            rows.append((status.name, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, f"NO answer: {status.problem}"))
        elif status.name not in BUCKETS or (status.replicas and not status.leader):
            rows.append(
                (
                    *(status.name, f"{status.messages:,}", size(status.bytes), f"{status.used:.0%}"),
                    *(_rate(stream.in_per_s), status.leader or ("NO leader" if status.replicas else "-"), followers),
                )
            )
    return table(rows, "lrrrrll")


def _partitions(summary: Summary) -> list[Text]:
    rows = [("part", *STAGES, "oldest", "stored", "dup", "dead", "shards", "node")]
    for one in summary.partitions:
        ages = [waiting.oldest_s for waiting in one.waiting.values() if waiting.oldest_s is not None]
        waits = sum_known(waiting.messages for waiting in one.waiting.values())
        counts = (f"{one.persisted:,}", f"{one.duplicates:,}", f"{one.dead_lettered:,}")
        shards = f"{one.sealed_shards}+{one.live_shards}"
        rows.append(
            (
                str(one.partition),
                *(_count(one.waiting[stage].messages) for stage in STAGES),
                UNKNOWN if waits is None else duration(max(ages)) if ages else "-",
                *((*counts, shards, one.node) if one.is_known else (UNKNOWN,) * 5),
            )
        )
    return table(rows, "rrrrrrrrrrl")


def _facts(summary: Summary, width: int) -> list[Text]:
    """Shards, dead letters, disk and servers, a line each."""
    totals, disk, letters = summary.totals, summary.disk, summary.letters
    lines = []
    if totals is None:
        lines.append("shards ?")
    else:
        on_disk = "" if disk is None else f", {size(sum(disk.size_bytes.values()))} on disk"
        lines.append(
            f"shards {totals.live_shards} live, {totals.sealed_shards} sealed{on_disk}; events {totals.persisted:,} "
            f"stored ({totals.sealed_events:,} sealed), {totals.duplicates:,} duplicates, "
            f"{totals.dead_lettered:,} dead-lettered"
        )
    if letters is None:
        waiting = "dead letters ?"
    else:
        stages = ", ".join(f"{stage} {count:,}" for stage, count in sorted(letters.by_stage.items()))
        waiting = f"dead letters {sum(letters.by_stage.values()):,}{f' ({stages})' if stages else ''}"
        waiting += f", {letters.recent:,} in the last minute"
    answering = sum(server.reachable for server in summary.servers)
    servers = f"servers {answering} of {len(summary.servers)} answer"
    free = "" if disk is None else f"; disk {size(disk.free_bytes)} free, floor {size(disk.floor_bytes)}"
    lines.append(f"{waiting}; {servers}{free}")
    return [Text(folded) for line in lines for folded in textwrap.wrap(line, width, subsequent_indent="  ")]


def _processes(summary: Summary) -> list[Text]:
    """The members of the stages, and what those on this machine say of themselves."""
    if summary.members is None:
        return [Text("members ?")]
    metered = {process.health.pid: process for process in summary.processes or ()}
    rows = [("process", "node", "pid", "state", "partitions", "memory", "ready")]
    for member in summary.members.members:
        process = metered.get(member.pid)
        ours = process is not None and process.health.name == member.name
        memory = process.metered.memory_bytes if ours and process is not None and process.metered is not None else None
        ready = UNKNOWN if process is None or not ours else "yes" if process.health.ready else "NO"
        pinned = " pinned" if member.pinned else ""
        rows.append(
            (
                *(member.name, member.node, str(member.pid), member.state, ranges(member.partitions) + pinned),
                *(UNKNOWN if memory is None else size(memory), ready),
            )
        )
    return table(rows, "llrllrl") if len(rows) > 1 else [Text("no process of any stage announces itself")]
