"""How `fictl dlq` shows letters.

Everything that came from outside is shown without control characters: an event must not be able to steer a terminal.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cluster.dlq import obstacle
from contracts.events import format_rfc3339, is_json
from contracts.wire import plain
from stages.persist.files import sync_dir

if TYPE_CHECKING:
    from cluster.dlq import Counts
    from contracts.letters import Letter

FIRST_CHARS: Final = 60
HEADINGS: Final = (
    f"{'SEQ':>8} {'WHEN':<24} {'STAGE':<8} {'P':>3} {'EVENT':<12} {'REASON':<22} {'FIELD':<20} FIRST BYTES"
)


def first_bytes(data: bytes) -> str:
    """The beginning of `data`, for one line."""
    return plain(data[: 4 * FIRST_CHARS].decode(errors="replace"))[:FIRST_CHARS]


def line(letter: Letter) -> str:
    """The letter on one line, under `HEADINGS`."""
    when = format_rfc3339(letter.time_ns // 1_000_000 * 1_000_000)
    return (
        f"{letter.seq:>8} {when:<24} {letter.stage:<8} {letter.partition:>3} {f'{letter.origin}/{letter.index}':<12} "
        f"{letter.reason:<22} {letter.field or '-':<20} {first_bytes(letter.data)}"
    )


def brief(letter: Letter) -> dict[str, Any]:
    """The letter as JSON, with the beginning of its bytes only."""
    return {**_head(letter), "first": first_bytes(letter.data)}


def whole(letter: Letter) -> dict[str, Any]:
    """The letter as JSON, with all of its bytes: as text where they are UTF-8."""
    try:
        return {**_head(letter), "body": letter.data.decode()}
    except UnicodeDecodeError:
        return {**_head(letter), "body_base64": b64encode(letter.data).decode()}


def append(path: Path, letters: Sequence[Letter], why: str) -> None:
    """Appends the letters to the file `path`, one a line, each with `why` if it says anything. Durable at the end.

    If the process dies or the power fails before: some may be there, the last of them cut short. The next call begins
    on a line of its own.
    """
    rows = [whole(letter) | ({"why": why} if why else {}) for letter in letters]
    try:
        is_new = not path.exists()
        with path.open("ab") as file:
            data = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
            file.write(data if _ends_a_line(path) else b"\n" + data)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_dir(path.parent)
    except OSError as error:
        # What is done to a descriptor fails without saying which file it was.
        error.filename = str(path)
        raise


def _ends_a_line(path: Path) -> bool:
    """True for an empty file, and for what is none."""
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _head(letter: Letter) -> dict[str, Any]:
    return {
        "seq": letter.seq,
        "time": format_rfc3339(letter.time_ns),
        "stage": letter.stage,
        "partition": letter.partition,
        "origin": letter.origin,
        "index": letter.index,
        "lines": letter.lines,
        "reason": letter.reason,
        "field": letter.field,
        "detail": letter.detail,
        "policy": letter.policy if letter.policy > 0 else None,
        "site": letter.site,
        "consultation": letter.consultation,
        "traceparent": letter.traceparent,
        "first_seen": letter.first_seen,
        "bytes": len(letter.data),
    }


def counted(counts: Counts) -> dict[str, Any]:
    """Counts as JSON, the commonest first."""
    rows = [
        {"stage": stage, "reason": reason, "letters": count}
        for (stage, reason), count in counts.by_reason.most_common()
    ]
    return {"letters": counts.letters, "by_reason": rows}


def counted_lines(counts: Counts) -> list[str]:
    """Counts for people, the commonest first."""
    rows = [f"{count:>8} {stage:<8} {reason}" for (stage, reason), count in counts.by_reason.most_common()]
    return [*rows, f"{counts.letters:>8} dead letters"]


def page(letter: Letter) -> list[str]:
    """Everything about one letter, by line."""
    where = f"{letter.stage} partition {letter.partition}" + (f", policy {letter.policy}" if letter.policy > 0 else "")
    trace = letter.traceparent.split("-")
    rows = {
        "letter": f"{letter.seq}, dead-lettered {format_rfc3339(letter.time_ns)}",
        "refused by": where,
        "reason": letter.reason,
        "field": letter.field or "the whole message",
        "detail": letter.detail,
        "site": letter.site,
        "consultation": letter.consultation,
        "event": f"number {letter.index} of message {letter.origin} in FI_EVENTS"
        + (f", and {letter.lines - 1} after it" if letter.lines > 1 else ""),
        "first seen": "at that place" if letter.first_seen.startswith(f"{letter.origin}/") else letter.first_seen,
        "trace": trace[1] if len(trace) > 2 else "",
        "bytes": str(len(letter.data)),
    }
    head = [f"{name + ':':<14}{text}" for name, text in rows.items() if text]
    body = msgspec.json.format(letter.data, indent=2) if is_json(letter.data) else letter.data
    return [*head, "", *body.decode(errors="replace").split("\n"), "", f"next: {advice(letter)}"]


def advice(letter: Letter) -> str:
    """What can be done about it, in a sentence or two."""
    drop = f"`fictl dlq drop {letter.seq}` deletes it"
    if why := obstacle(letter):
        return f"a replay cannot help: {why}. {drop}"
    again = f"`fictl dlq replay {letter.seq}`"
    mend = (
        f"`fictl dlq show {letter.seq} --raw > event.json`, mend it, `fictl dlq replay {letter.seq} --body event.json`"
    )
    if letter.reason == "lifecycle.closed":
        return f"publish a CONSULTATION_RESET of the consultation first if it goes on, then {again}; {drop}"
    if letter.reason == "event_type.unknown":
        return f"once a build that knows the type runs: {again}. If the gateway is wrong: {mend}. {drop}"
    if letter.stage == "ingest":
        return f"the event breaks the contract (`fictl schema`): {mend}. Tell the site's gateway. {drop}"
    return f"if the rule was wrong and was changed: {again}. If the event is: {mend}. {drop}"
