"""Dead letters after they were buried: read, replayed, removed.

*Removing.* A stage takes the last message of its subject in `FI_DLQ` for its checkpoint: which letters are already
buried. So the newest message of a subject is never deleted. Where it is to go, a message that is no letter but carries
the same origin and index is stored after it first (its *mark*), fenced by that very letter's sequence; then the letter
is deleted. By induction the newest message of a subject always says what was buried last, whoever deletes what at the
same time and wherever the stage or this process is killed. A mark goes when there is something after it.

*Replaying.* The event's own bytes are published again to the subject they came from, and the letter is removed only
once they are accepted. Nothing can swallow the replay, and no second one can double it:

* Its message id is made of the cluster, the letter's sequence and time, and the bytes; no gateway's id looks like it.
  So the gateway's own id, which the servers may still remember, does not hide it; two operators at once, or a replay
  that was killed between publish and removal and is repeated at once, store one message; and another body for the
  same letter is another message. No attempt is counted: a replay that is refused again makes a new letter, with a
  sequence of its own.
* The servers forget message ids. Beyond that window the event's id counts, which persist knows for ever: a second
  copy is a duplicate. An event that came without an id gets the same one each time (`contracts.letters`).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from itertools import groupby
from typing import Final, NamedTuple

import msgspec

from cluster.gateway import Gateway, RefusedError
from contracts.budgets import LETTERS
from contracts.errors import ClusterUnavailableError, FencedError, SettingsError
from contracts.events import JSON_SPACE, split_body
from contracts.letters import Letter, read_letter
from contracts.subjects import DLQ, is_token, publish_subject
from contracts.telemetry import DEAD_HANDLED, DEAD_INDEX, DEAD_LINES, DEAD_ORIGIN, DEAD_STAGE
from stages.ingest.core import parse_message, parse_uuid
from stages.runtime.api import Api
from stages.runtime.graveyard import lines_of, place_of
from stages.runtime.messages import StoredMessage
from stages.runtime.reader import OrderedReader
from stages.runtime.writer import FencedWriter

PAGE: Final = 256
PAGE_BYTES: Final = 8 * 1024 * 1024
DELETES_AT_ONCE: Final = 64

Tell = Callable[[float, float], None]
"""Told how far it is: (done, total)."""


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters; what is None or empty selects all.

    Attributes:
        stage, partition: of the lane that refused the event.
        reason: a reason, or its first part: ``payload`` takes ``payload.value`` too.
        site: the site token of the gateway.
        since_ns, until_ns: when the letter was stored, both inclusive.
    """

    stage: str | None = None
    partition: int | None = None
    reason: str = ""
    site: str = ""
    since_ns: int | None = None
    until_ns: int | None = None

    @property
    def everything(self) -> bool:
        """True when nothing is left out."""
        return self == Selection()

    @property
    def subjects(self) -> str:
        """The filter subject."""
        return f"fi.dlq.{self.stage or '*'}.{'*' if self.partition is None else self.partition}"

    def takes(self, letter: Letter) -> bool:
        """True when `letter`, of one of `subjects`, is meant. Marks never are."""
        return (
            not letter.handled
            and (not self.reason or f"{letter.reason}.".startswith(f"{self.reason}."))
            and (not self.site or letter.site == self.site)
            and (self.since_ns is None or letter.time_ns >= self.since_ns)
            and (self.until_ns is None or letter.time_ns <= self.until_ns)
        )


class Span(NamedTuple):
    """Sequences of `FI_DLQ`, both inclusive; empty when `last` is before `first`."""

    first: int
    last: int


class Replayed(NamedTuple):
    """What became of one letter.

    Attributes:
        letter: which.
        refusal: why it was not published and stays; empty when it was.
        origin: sequence in `FI_EVENTS` of the replay; 0 when refused.
        repeated: an earlier replay of this letter had stored it already.
    """

    letter: Letter
    refusal: str = ""
    origin: int = 0
    repeated: bool = False


class Counts:
    """Letters by stage and reason."""

    def __init__(self) -> None:
        self.by_reason: Counter[tuple[str, str]] = Counter()

    def add(self, letter: Letter) -> None:
        """Counts one."""
        self.by_reason[letter.stage, letter.reason] += 1

    @property
    def letters(self) -> int:
        """All of them."""
        return self.by_reason.total()


def obstacle(letter: Letter) -> str:
    """Why a replay of the letter can only be refused again, whatever its body; empty when it may pass."""
    if not letter.site or not letter.consultation:
        return "the letter does not say which subject its event came from; publish the event with `fictl publish`"
    for name, token in (("site", letter.site), ("consultation", letter.consultation)):
        if not is_token(token):
            return f"{name} {token!r} of its subject is not 1 to 64 of A-Z a-z 0-9 _ -; publish it under another one"
    try:
        parse_uuid(letter.consultation)
    except ValueError:
        return f"consultation {letter.consultation!r} of its subject is not a UUID; publish it under another one"
    return ""


def check_body(letter: Letter, body: bytes) -> None:
    """Holds what is to be replayed in the letter's place to what ingest would say, or else the letter would be lost.

    A letter of one event is replayed as one event: a second would take its neighbour's place.

    Raises:
        SettingsError: `body` holds more events than the letter does, or one that breaks the contract.
    """
    given, held = len(split_body(body)), len(split_body(letter.data))
    if given > held:
        raise SettingsError(f"--body holds {given} events, letter {letter.seq} only {held}; give one event")
    if obstacle(letter):
        return
    parsed = parse_message(
        body,
        subject_site=letter.site,
        subject_consultation=letter.consultation,
        origin=letter.origin,
        accepted_ns=letter.time_ns,
        traceparent="",
        now_ns=letter.time_ns,
    )
    if parsed.rejected:
        first = parsed.rejected[0]
        lines = [number for number, line in enumerate(body.split(b"\n"), 1) if line.strip(JSON_SPACE)]
        place = f", line {lines[first.index]}" if given > 1 else ""
        raise SettingsError(f"--body{place}: {first.error}")


def replay_id(cluster_id: str, letter: Letter, body: bytes) -> str:
    """The message id that a replay of `letter` as `body` is published under. See the module's text."""
    digest = hashlib.sha256(body).hexdigest()[:32]
    return f"replay:{cluster_id}:{letter.seq}:{letter.time_ns}:{digest}"


class DeadLetters:
    """The letters of one cluster.

    Args:
        api: connected.
        cluster_id: of the cluster.
    """

    def __init__(self, api: Api, cluster_id: str) -> None:
        self._api = api
        self._cluster_id = cluster_id
        self._gateway = Gateway(api.client)
        self._nonce = f"dlq-{secrets.token_hex(6)}"
        self._readers = 0
        self._deletes = asyncio.Semaphore(DELETES_AT_ONCE)

    async def find(self, seq: int) -> Letter | None:
        """The letter with this sequence in `FI_DLQ`, if it is there. Raises as `Api.message_at`."""
        message = await self._api.message_at(DLQ, seq)
        letter = None if message is None else _read(message)
        return None if letter is None or letter.handled else letter

    async def span(self, selection: Selection) -> Span:
        """Where the selected letters lie that are there now. Those that come later are never among them.

        Raises:
            TopologyError: there is no `FI_DLQ`.
        """
        last = await self._api.last_message(DLQ, selection.subjects)
        if last is None:
            return Span(1, 0)
        first_seq, last_seq = 1, last.seq
        if selection.since_ns is not None:
            first_seq = await self._first_at(selection, selection.since_ns, last_seq)
        if selection.until_ns is not None:
            last_seq = await self._first_at(selection, selection.until_ns + 1, last_seq) - 1
        return Span(first_seq, last_seq)

    async def _first_at(self, selection: Selection, time_ns: int, last_seq: int) -> int:
        """The first sequence up to `last_seq` + 1 from which on letters were stored at `time_ns` or later."""
        low, high = 1, last_seq + 1
        while low < high:
            middle = (low + high) // 2
            message = await self._api.first_message(DLQ, selection.subjects, from_seq=middle)
            if message is None or message.time_ns >= time_ns:
                high = middle
            else:
                low = message.seq + 1
        return low

    async def pages(self, selection: Selection, span: Span, tell: Tell) -> AsyncGenerator[list[Letter], None]:
        """All letters and marks of `selection.subjects` within `span`, in order, some hundred at a time.

        The server that gives them may be a follower: what was deleted a moment ago can still be among them.
        """
        position = span.first - 1
        if position >= span.last:
            return

        async def locate() -> int:
            return position + 1

        self._readers += 1
        nonce = f"{self._nonce}-{self._readers}"
        reader = OrderedReader(self._api, DLQ, selection.subjects, batch=PAGE, locate=locate, nonce=nonce)
        reader.start()
        try:
            while position < span.last:
                try:
                    async with asyncio.timeout(self._api.settings.probe_s):
                        await reader.wait()
                except TimeoutError:
                    # What was still to come may have been removed by others.
                    rest = await self._api.first_message(DLQ, selection.subjects, from_seq=position + 1)
                    if rest is None or rest.seq > span.last:
                        return
                    continue
                page = [message for message in reader.take(PAGE, PAGE_BYTES) if message.seq > position]
                if page:
                    position = page[-1].seq
                    tell(min(position, span.last) - span.first + 1, span.last - span.first + 1)
                    yield [_read(message) for message in page if message.seq <= span.last]
        finally:
            await reader.close()

    async def letters(self, selection: Selection, span: Span, tell: Tell) -> AsyncGenerator[Letter, None]:
        """The selected letters within `span`, in order."""
        async with aclosing(self.pages(selection, span, tell)) as pages:
            async for page in pages:
                for letter in filter(selection.takes, page):
                    yield letter

    async def replay(self, letters: Sequence[Letter], body: bytes | None = None) -> list[Replayed]:
        """Publishes the letters' events again, those of a consultation in order, and removes the letters then.

        Args:
            letters: which; a few hundred at most.
            body: publish this in place of the letter's own bytes.

        Raises:
            ClusterUnavailableError: something was not accepted or not removed in time. Repeating is harmless.
            TopologyError: `FI_EVENTS` or `FI_DLQ` is missing.
        """
        tried = await asyncio.gather(*(self._publish(letter, body) for letter in letters), return_exceptions=True)
        outcomes = [outcome for outcome in tried if isinstance(outcome, Replayed)]
        await self.remove([outcome.letter for outcome in outcomes if not outcome.refusal])
        for failure in tried:
            if isinstance(failure, BaseException):
                raise failure
        return outcomes

    async def _publish(self, letter: Letter, body: bytes | None) -> Replayed:
        if why := obstacle(letter):
            return Replayed(letter, why)
        data = letter.data if body is None else body
        try:
            accepted = await self._gateway.publish(
                data,
                letter.site,
                letter.consultation,
                replay_id(self._cluster_id, letter, data),
                traceparent=letter.traceparent,
                first_seen=letter.first_seen,
                deadline_s=LETTERS.s,
            )
        except RefusedError as error:
            return Replayed(letter, f"{publish_subject(letter.site, letter.consultation)}: {error}")
        return Replayed(letter, origin=accepted.origin, repeated=accepted.duplicate)

    async def remove(self, letters: Sequence[Letter], *, erase: bool = False) -> int:
        """Deletes letters, and marks that are no longer the last of their subject. Returns how many letters went.

        What somebody else deleted meanwhile is passed over. With `erase` the servers overwrite the bytes.

        Raises:
            ClusterUnavailableError: not done in time; what is left can be removed again.
            TopologyError: there is no `FI_DLQ`.
        """
        older: list[Letter] = []
        newest: list[Letter] = []
        for _, group in groupby(sorted(letters, key=_place), key=lambda letter: letter.subject):
            *before, last = group
            older += before
            newest.append(last)
        # These have the newest after them. Going first, they make room for a mark in a full stream.
        removed = await self._delete_all(older, erase)
        try:
            async with asyncio.timeout(LETTERS.s):
                may_go = [letter for letter in newest if await self._may_go(letter)]
        except TimeoutError:
            raise ClusterUnavailableError(
                f"{DLQ} took no mark within {LETTERS.s:.0f} s; is it full? Remove older letters first, or raise "
                "dlq_bytes_max with `fictl cluster apply`"
            ) from None
        return removed + await self._delete_all(may_go, erase)

    async def _may_go(self, letter: Letter) -> bool:
        """True once there is a later message on the letter's subject, if need be a mark made here.

        A read may be stale; that there is something later is true for ever once it was seen, since nobody deletes the
        newest.
        """
        while True:
            last = await self._api.last_message(DLQ, letter.subject)
            if last is not None and last.seq > letter.seq:
                return True
            if last is None or last.seq < letter.seq:
                if await self._api.message_at(DLQ, letter.seq) is None:
                    return False
                await self._api.pause()
            elif letter.handled:
                return False
            else:
                await self._mark(letter, last)

    async def _mark(self, newest: Letter, last: StoredMessage) -> None:
        """Stores a mark after `newest`, which is the message `last`, if it is still the last one of its subject."""
        origin, index = place_of(last)
        self._readers += 1
        writer = FencedWriter(self._api, DLQ, newest.subject, f"{self._nonce}-{self._readers}")
        writer.expected_seq = newest.seq
        headers = {
            DEAD_STAGE: newest.stage,
            DEAD_ORIGIN: str(origin),
            DEAD_INDEX: str(index),
            DEAD_LINES: str(lines_of(last)),
            DEAD_HANDLED: str(newest.seq),
        }
        try:
            await writer.publish(b"", "mark", headers)
        except FencedError:
            # A stage buried another, or somebody else was faster: the caller looks again.
            return

    async def _delete_all(self, letters: Sequence[Letter], erase: bool) -> int:
        gone = await asyncio.gather(*(self._delete(letter, erase) for letter in letters), return_exceptions=True)
        for failure in gone:
            if isinstance(failure, BaseException):
                raise failure
        return sum(done is True and not letter.handled for letter, done in zip(letters, gone, strict=True))

    async def _delete(self, letter: Letter, erase: bool) -> bool:
        """Deletes one message; False when it was gone."""
        async with self._deletes:
            try:
                async with asyncio.timeout(LETTERS.s):
                    return await self._api.delete(DLQ, letter.seq, erase=erase)
            except TimeoutError:
                raise ClusterUnavailableError(
                    f"{DLQ} did not delete letter {letter.seq} within {LETTERS.s:.0f} s; repeat, nothing is doubled"
                ) from None


def _read(message: StoredMessage) -> Letter:
    return read_letter(message.subject, message.seq, message.time_ns, message.data, message.headers)


def _place(letter: Letter) -> tuple[str, int]:
    return letter.subject, letter.seq
