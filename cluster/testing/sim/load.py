"""Gateways of a run: the events they send, what was acknowledged, and what must become of each.

Every event is tiny. Some are refused by ingest (an unknown type), some by segment (a payload rule, or clinical events
after their consultation was committed, which needs segment's memory to survive); all others must be stored once.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from cluster.gateway import Gateway, batch_id
from cluster.testing.checker import Attempt, defined_hash
from contracts.errors import FiError
from contracts.events import format_rfc3339

_FIRST_NS = 1_780_000_000_000_000_000
_BAD_AT_INGEST, _BAD_AT_SEGMENT = 0.08, 0.08
_COMMITS, _LATE_EVENTS_MAX = 0.4, 2
_BATCH_MAX = 3


@dataclass(slots=True)
class Sent:
    """One event: its line, its place in its consultation, and whether it must end as a dead letter.

    `begun`: it was sent, whatever came of that.
    """

    event_id: UUID
    consultation: UUID
    place: int
    line: bytes
    payload: bytes
    dies: bool
    acknowledged: bool = False
    begun: bool = False


@dataclass(slots=True)
class Site:
    """A gateway's own: its name and its consultations, each with the messages it sends, each of some events."""

    name: str
    consultations: list[list[list[Sent]]] = field(default_factory=list)


def make_sites(rng: random.Random, sites: int, consultations: int, events: int) -> list[Site]:
    """`sites` gateways with `consultations` in all, and about `events` events in each."""
    made = [Site(f"clinic-{number}") for number in range(sites)]
    for number in range(consultations):
        made[number % sites].consultations.append(_messages(rng, _consultation(rng, events)))
    return made


def _messages(rng: random.Random, events: list[Sent]) -> list[list[Sent]]:
    messages = []
    while events:
        count = rng.choice((1, 1, _BATCH_MAX))
        messages.append(events[:count])
        events = events[count:]
    return messages


def _consultation(rng: random.Random, events: int) -> list[Sent]:
    consultation = UUID(int=rng.getrandbits(128), version=4)
    kinds = [_kind(rng) for _ in range(rng.randint(1, 2 * events))]
    if rng.random() < _COMMITS:
        kinds.append(("CONSULTATION_COMMITTED", b'{"soap_data":{}}', False))
        late = ("MESSAGE_RECEIVED", b'{"message_content":"late","message_role":"user"}', True)
        kinds += [late] * rng.randint(0, _LATE_EVENTS_MAX)
    sent = []
    for place, (kind, payload, dies) in enumerate(kinds):
        event_id = UUID(int=rng.getrandbits(128), version=4)
        line = (
            f'{{"event_id":"{event_id}","consultation_id":"{consultation}","event_type":"{kind}",'
            f'"timestamp":"{format_rfc3339(_FIRST_NS + place * 1_000_000_000)}","payload":{payload.decode()},'
            '"metadata":{"user_id":"u","session_id":"s"}}'
        )
        sent.append(Sent(event_id, consultation, place, line.encode(), payload, dies))
    return sent


def _kind(rng: random.Random) -> tuple[str, bytes, bool]:
    chance = rng.random()
    if chance < _BAD_AT_INGEST:
        return "NO_SUCH_TYPE", b"{}", True
    if chance < _BAD_AT_INGEST + _BAD_AT_SEGMENT:
        return "EXTRACTION_COMPLETED", b'{"iteration":9}', True
    if chance < 0.5:
        return "MESSAGE_RECEIVED", b'{"message_content":"%d","message_role":"user"}' % rng.getrandbits(16), False
    return "CORE_STATE_CHANGED", b'{"n":%d}' % rng.getrandbits(16), False


def attempts(sites: list[Site], *, letters_count: bool) -> list[Attempt]:
    """For the checker: everything that was sent. `letters_count`: also what dies must be there, as a letter."""
    return [
        Attempt(
            sent.event_id.bytes,
            sent.consultation.bytes,
            sent.place,
            defined_hash(sent.payload),
            sent.acknowledged and (letters_count or not sent.dies),
        )
        for site in sites
        for messages in site.consultations
        for message in messages
        for sent in message
    ]


async def send_all(
    gateway: Callable[[], Gateway], site: Site, rng: random.Random, over_s: float, *, again: bool
) -> None:
    """Sends a site's consultations side by side, each in order; returns when everything is acknowledged.

    Called once more, it sends all again from the first on, but for what must not come twice.

    Args:
        gateway: the one to send with now: it may have been restarted.
        site: what to send.
        rng: draws the pauses.
        over_s: how long a consultation takes, about.
        again: sends all that may come twice once more, as messages of other ids.
    """
    tasks = [
        asyncio.create_task(_send(gateway, site.name, messages, rng, over_s, again)) for messages in site.consultations
    ]
    await asyncio.gather(*tasks)


async def _send(
    gateway: Callable[[], Gateway],
    site: str,
    messages: list[list[Sent]],
    rng: random.Random,
    over_s: float,
    again: bool,
) -> None:
    gaps_per_s = len(messages) / over_s
    for message in messages:
        await asyncio.sleep(rng.expovariate(gaps_per_s))
        if not message[0].begun:
            await _send_one(gateway, site, message, "")
        elif lasting := [sent for sent in message if not sent.dies]:
            await _send_one(gateway, site, lasting, "anew-")
    for message in messages if again else ():
        await asyncio.sleep(rng.expovariate(4 * gaps_per_s))
        if lasting := [sent for sent in message if not sent.dies]:
            await _send_one(gateway, site, lasting, "again-")


async def _send_one(gateway: Callable[[], Gateway], site: str, message: list[Sent], prefix: str) -> None:
    body = b"\n".join(sent.line for sent in message)
    name = prefix + batch_id([str(sent.event_id) for sent in message])
    for sent in message:
        sent.begun = True
    while True:
        try:
            await gateway().publish(body, site, str(message[0].consultation), name)
        except FiError:
            # The gateway was restarted: the same message first, before anything else of the consultation.
            await asyncio.sleep(0.1)
        else:
            break
    for sent in message:
        sent.acknowledged = True
