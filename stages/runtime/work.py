"""What a stage's pure core takes and gives. The lane around it does the I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from contracts.errors import InvalidEventError, StrayFrameError
from contracts.events import Event
from contracts.frames import Dead, decode_frame
from contracts.letters import LETTERS_APART
from contracts.subjects import Stage
from stages.runtime.checkpoint import check_joined, read_frame
from stages.runtime.messages import StoredMessage


class DeadLetter(msgspec.Struct, frozen=True):
    """One event that a stage refuses, or several of a message that follow one another.

    Attributes:
        origin, index: which event; of several the first.
        error: why, `unraised`: a raised one leads back to the `Step` that holds this, and no cycle through that ends.
        data: its original bytes; None where the stage does not have them (the lane then reads them from `FI_EVENTS`).
        policy: version of the policy it was refused under; 0 where none has a part in it.
        lines: how many events it is of.
        original: the message it came in, where the stage has that.
        events: what is refused, where that were events for a stage before: all of them.
    """

    origin: int
    index: int
    error: InvalidEventError
    data: bytes | None
    policy: int = 0
    lines: int = 1
    original: StoredMessage | None = None
    events: tuple[Event, ...] = ()


class Step(msgspec.Struct, frozen=True, gc=False):
    """What one input message becomes: the part of it that lies after the cursor.

    Attributes:
        first, last: origins covered.
        events: what passed, in order.
        dead: counts of what did not, in this stage or before it.
        letters: what this stage refused.
        trail: sequences of the hop messages this came through, this one last.
        closed: the stage's memory after it.
        stored_ns: when `FI_EVENTS` stored the message at `last`; 0 when not known.
    """

    first: int
    last: int
    events: list[Event]
    dead: list[Dead]
    letters: list[DeadLetter]
    trail: tuple[int, ...]
    closed: bytes
    stored_ns: int


class StageCore(Protocol):
    """Pure: no clock, network, disk or randomness. One instance for each partition.

    Nothing given to `step` may be assumed to be stored: after a failed publish the lane calls `open` again with the
    last stored memory and repeats.
    """

    stage: Stage

    def open(self, closed: bytes) -> None:
        """Takes up the memory stored with the last frame."""

    def begin(self) -> None:
        """A frame begins: whatever can change while the process runs stays as it is now until the next call."""

    def step(self, message: StoredMessage, origin: int, now_ns: int) -> Step | None:
        """Works on one message; None when all of it lies at or before `origin`.

        Raises:
            HoleError: the message does not join on to `origin`.
            WireFormatError: it is not a frame this build can read.
        """


def step_frame(message: StoredMessage, origin: int, work: Callable[[Event], Event], policy: int = 0) -> Step | None:
    """One frame's step: `work` on every event after `origin`, in order; what it refuses becomes a letter.

    Args:
        message: carries a frame.
        origin: the cursor.
        work: gives the event as it goes on; raises `InvalidEventError` to refuse it.
        policy: goes with the letters.

    Returns:
        the step, with the frame's own memory; None when all of the frame lies at or before `origin`.

    Raises:
        HoleError, WireFormatError: as `StageCore.step`.
    """
    frame = read_frame(message, decode_frame)
    check_joined(message.subject, frame, origin)
    if frame.last <= origin:
        return None
    events: list[Event] = []
    letters: list[DeadLetter] = []
    dead = [row for row in frame.dead if row.origin > origin]
    reached = frame.prev
    for event in frame.events:
        if not reached <= event.origin <= frame.last:
            raise StrayFrameError(message.subject, message.seq, f"an event of origin {event.origin} is out of place")
        reached = event.origin
        if event.origin <= origin:
            continue
        try:
            events.append(work(event))
        except InvalidEventError as error:
            letters.append(DeadLetter(event.origin, event.index, error.unraised(), None, policy, events=(event,)))
            dead.append(Dead(event.origin, 1))
    trail = (*frame.trail, message.seq)
    return Step(
        max(frame.first, origin + 1),
        frame.last,
        events,
        dead,
        join_letters(letters),
        trail,
        frame.closed,
        frame.stored_ns,
    )


def join_letters(letters: list[DeadLetter]) -> list[DeadLetter]:
    """Of each message the first `LETTERS_APART` as they are; after them, neighbours with one reason share one.

    Args:
        letters: in order, of one event each.
    """
    if len(letters) <= LETTERS_APART:
        return letters
    groups: list[list[DeadLetter]] = []
    origin = apart = 0
    for letter in letters:
        if letter.origin != origin:
            origin, apart = letter.origin, 0
        apart += 1
        last = groups[-1][-1] if apart > LETTERS_APART + 1 else None
        if last is not None and (last.index + 1, last.error.reason) == (letter.index, letter.error.reason):
            groups[-1].append(letter)
        else:
            groups.append([letter])
    return [
        msgspec.structs.replace(
            group[0], lines=len(group), events=tuple(event for letter in group for event in letter.events)
        )
        for group in groups
    ]
