"""A process among its like: it announces itself, watches the others, and runs the lanes that fall to it.

The bucket `FI_MEMBERS` is the only truth: everybody computes the same assignment from it. What is heard as it is
published only says that the bucket is worth a look now; a look is taken with every renewal anyway, and when a key must
have expired, which tells nobody. Three rules keep partitions from being fought over:

- a lane is started only when no living process announces the partition as its own: who has to let go finishes first;
- a process that cannot be seen in the bucket (cut off, or frozen and thawed) changes nothing until it can;
- after an interruption of its own, a process takes nobody's silence for death until it has listened for a while.

None of this is needed for correctness: writes are fenced. A process that is cut off keeps its lanes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import ConnectionClosedError
from nats.errors import Error as NatsError

from contracts.budgets import MEMBER_EXPIRED, MEMBER_LOOK, MEMBERS_UNSEEN
from contracts.errors import ClusterUnavailableError, NotAppliedError, TopologyError, WireFormatError
from contracts.membership import Member, decode_member, encode_member, shares
from contracts.receipts import Receipt
from contracts.subjects import (
    MEMBERS,
    RECEIPTS,
    member_subject,
    members_pattern,
)
from contracts.telemetry import HEADER_EXPECTED_STREAM, HEADER_KV_OPERATION, HEADER_TTL, KV_DELETED
from stages.runtime.api import NO_STREAM, Api, RequestRefusedError
from stages.runtime.checkpoint import last_receipt
from stages.runtime.health import Check
from stages.runtime.lanes import LaneSet
from stages.runtime.messages import StoredMessage
from stages.runtime.tasks import side_by_side
from stages.runtime.writer import read_pub_answer

log = logging.getLogger(__name__)

LOOKS_MAX: Final = 10
"""How often the bucket is looked at again when it does not show yet what was heard or said."""
DOUBT_TTLS: Final = 2
"""How long nobody is taken for dead after a silence, in `member_ttl_s`: others may take longer to connect again."""
READS_AT_ONCE: Final = 16


class Membership:
    """One process's part in the sharing of its stage.

    Args:
        api: the process's connection.
        me: the announcement as it begins: nothing held.
        partitions: P.
        lanes: what to start and let go; whoever it tells of changes should `poke`.
        on_planned: called once, when `planned` became true.
        describe: adds to the announcement what the stage itself has to say.
    """

    def __init__(
        self,
        api: Api,
        me: Member,
        partitions: int,
        lanes: LaneSet,
        on_planned: Callable[[], None],
        describe: Callable[[Member], Member],
    ) -> None:
        self._api = api
        self._me = me
        self._partitions = partitions
        self._lanes = lanes
        self._subject = member_subject(me.stage, me.node, me.name)
        self._said = b""
        self._unsaid = ""
        """Why the last announcement was not taken."""
        self._seen_s: float | None = None
        self._blind_s: float | None = None
        self._problem = ""
        self._tried_s = 0.0
        self._doubt_until_s = 0.0
        self._superseded = False
        self._paused = False
        self._members: dict[str, Member] = {}
        self._owners: dict[int, str] | None = None
        self._owners_s = 0.0
        self._raw: dict[str, bytes] = {}
        self._renewed_s: dict[str, float] = {}
        """Key of another process → when it was last heard."""
        self._heard: dict[str, bytes] = {}
        self._looks = 0
        self._poked = asyncio.Event()
        self._on_planned = on_planned
        self._describe = describe
        self.planned = False
        """The lanes that fall to this process were started for the first time."""

    def poke(self) -> None:
        """Something changed here: look and announce now."""
        self._poked.set()

    async def pause(self, told: StoredMessage | None) -> None:
        """What stands under the stage's key ``pause``: while there is something, no lane runs."""
        self._paused = told is not None and bool(told.data)

    @property
    def heirs(self) -> bool:
        """True when another process can go on with every partition held here."""
        owners = self._owners or {}
        others = [m for key, m in self._members.items() if key != self._subject and not m.draining and m.pinned is None]
        return all(any(other.may_hold(p, owners) for other in others) for p in self._lanes.held)

    async def run(self) -> None:
        """Announces, looks and acts until cancelled.

        Raises:
            NotAppliedError: the bucket is not there.
            ClusterUnavailableError: the connection was closed.
        """
        await self._check_bucket()
        subscription: Subscription | None = None
        try:
            subscription = await self._api.client.subscribe(members_pattern(self._me.stage), cb=self._hear)
            while True:
                self._poked.clear()
                await self._announce()
                if await self._look():
                    self._act()
                await self._rest()
        finally:
            if subscription is not None and not self._api.client.is_closed:
                await subscription.unsubscribe()

    def leave(self) -> None:
        """From now on nothing is started, and the others plan without this process."""
        self._me = msgspec.structs.replace(self._me, draining=True)
        self.poke()

    async def say_goodbye(self) -> None:
        """Removes the announcement, so that nobody waits for it to expire. After `run` has ended; never raises."""
        if self._said and not self._superseded:
            try:
                async with asyncio.timeout(self._api.settings.api_timeout_s):
                    await self._put(b"", {HEADER_KV_OPERATION: KV_DELETED})
            except (TimeoutError, NatsError, ClusterUnavailableError) as error:
                log.info("the announcement will expire by itself: %r", error)

    async def _check_bucket(self) -> None:
        try:
            await self._api.request(MEMBERS, f"$JS.API.STREAM.INFO.{MEMBERS}", b"")
        except RequestRefusedError as refused:
            if refused.error.err_code == NO_STREAM:
                raise NotAppliedError(f"stream {MEMBERS} does not exist; run `fictl cluster apply`") from refused
            raise

    async def _hear(self, message: Msg) -> None:
        """Something was published; whether it is stored, the bucket will show."""
        if message.subject in self._renewed_s:
            self._renewed_s[message.subject] = _now_s()
        if message.data == self._raw.get(message.subject, b""):
            return
        self._heard[message.subject] = message.data
        self._looks = 0
        self._poked.set()

    async def _announce(self) -> None:
        """Says how things stand, if that is news or it is time to renew."""
        now_s = _now_s()
        if self._superseded:
            self._tried_s = now_s
            return
        self._me = msgspec.structs.replace(
            self._me, partitions=self._lanes.held, opening=self._lanes.opening, paused=self._paused
        )
        self._me = self._describe(self._me)
        said = encode_member(self._me)
        if said == self._said and now_s < self._tried_s + self._api.settings.member_renew_s:
            return
        self._tried_s = now_s
        if await self._put(said, {}):
            self._said = said
            self._heard[self._subject] = said
            self._looks = 0

    async def _put(self, data: bytes, headers: dict[str, str]) -> bool:
        """Writes our key; False when that is not certain."""
        settings = self._api.settings
        headers = {HEADER_TTL: f"{settings.member_ttl_s}s", HEADER_EXPECTED_STREAM: MEMBERS, **headers}
        try:
            reply = await self._api.client.request(
                self._subject, data, timeout=settings.publish_timeout_s, headers=headers
            )
        except ConnectionClosedError as error:
            raise ClusterUnavailableError("the connection was closed") from error
        except NatsError as error:
            self._unsaid = repr(error)
            return False
        try:
            answer = read_pub_answer(reply.data, MEMBERS, self._subject)
        except TopologyError as error:
            self._unsaid = str(error)
            return False
        self._unsaid = "" if answer.error is None else str(answer.error)
        return answer.error is None

    async def _look(self) -> bool:
        """Reads the bucket; False when what it shows cannot be acted on."""
        try:
            members = await self._api.last_messages(MEMBERS, [members_pattern(self._me.stage)])
            await self._look_at_owners(set(members) != set(self._members))
        except ClusterUnavailableError as error:
            self._note_blindness(str(error))
            return False
        self._raw = {subject: message.data for subject, message in members.items()}
        self._heard = {s: data for s, data in self._heard.items() if self._raw.get(s, b"") != data}
        now_s = _now_s()
        self._renewed_s = {key: self._renewed_s.get(key, now_s) for key in members if key != self._subject}
        seen = readable(members)
        mine = seen.get(self._subject)
        self._judge_name(mine)
        if not self._superseded and (mine is None or mine.nonce != self._me.nonce):
            self._note_blindness(f"{MEMBERS} does not show this process: {self._unsaid}")
            return False
        self._blind_s, self._problem = None, ""
        settings = self._api.settings
        # Was there nothing to be seen for so long, keys of living processes may have expired.
        if self._seen_s is not None and now_s - self._seen_s > settings.member_ttl_s - settings.member_renew_s:
            self._doubt_until_s = now_s + DOUBT_TTLS * settings.member_ttl_s
        self._seen_s = now_s
        if now_s < self._doubt_until_s:
            silent = {key: member for key, member in self._members.items() if key not in members}
            seen = silent | seen
        self._members = seen
        return self._owners is not None

    def _note_blindness(self, why: str) -> None:
        """An election is over before this is told."""
        now_s = _now_s()
        self._blind_s = now_s if self._blind_s is None else self._blind_s
        if now_s >= self._blind_s + MEMBERS_UNSEEN.s:
            if not self._problem:
                log.warning("the processes of the stage cannot be seen, so no partition comes or goes here: %s", why)
            self._problem = why

    def check(self) -> Check:
        """Whether this process sees the others, and they it."""
        return Check(not self._problem, self._problem or "sees the others")

    def _judge_name(self, mine: Member | None) -> None:
        """Of two processes with one name the later stands, so that a restarted one has its predecessor's share."""
        superseded = mine is not None and mine.nonce != self._me.nonce and mine.started_ns > self._me.started_ns
        if superseded and not self._superseded and mine is not None:
            log.error("process %d took the name %s: standing by; give each its own --name", mine.pid, self._me.name)
        self._superseded = superseded

    async def _look_at_owners(self, changed: bool) -> None:
        """Whose disk has which partition, from the last receipts (persist). They may be moved by hand at any time."""
        if self._me.stage != "persist":
            self._owners = {}
            return
        now_s = _now_s()
        if self._owners is None or changed or now_s >= self._owners_s + self._api.settings.member_ttl_s:
            self._owners_s = now_s
            try:
                receipts = await read_receipts(self._api, self._partitions)
            except ClusterUnavailableError:
                if self._owners is None:
                    raise
            else:
                self._owners = {partition: receipt.store for partition, receipt in receipts.items()}

    def _act(self) -> None:
        """Starts and lets go of lanes as the assignment says."""
        mine = self._share()
        taken = {
            partition
            for key, member in self._members.items()
            if key != self._subject
            for partition in member.partitions
            if member.may_hold(partition, self._owners or {})
        }
        held = set(self._lanes.held)
        if not self._me.draining:
            for partition in sorted(held - mine):
                self._lanes.let_go(partition)
            for partition in sorted(mine - held):
                if self._me.pinned is not None or partition not in taken:
                    self._lanes.start(partition)
        if not self.planned:
            self.planned = True
            self._on_planned()

    def _share(self) -> set[int]:
        """The partitions that this process should run."""
        if self._superseded or self._paused:
            return set()
        if self._me.pinned is not None:
            return set(self._me.pinned)
        assigned = shares(self._members, self._partitions, self._owners or {})
        return {partition for partition, key in assigned.items() if key == self._subject}

    async def _rest(self) -> None:
        """Until it is time to renew, or there is something to see or to say."""
        limit_s = self._tried_s + self._api.settings.member_renew_s - _now_s()
        if self._renewed_s:
            limit_s = min(limit_s, min(self._renewed_s.values()) + self._api.settings.member_ttl_s - _now_s())
        limit_s = max(limit_s, MEMBER_EXPIRED.s)
        if self._heard and self._looks < LOOKS_MAX:
            self._looks += 1
            limit_s = MEMBER_LOOK.s
        try:
            async with asyncio.timeout(limit_s):
                await self._poked.wait()
        except TimeoutError:
            return


def _now_s() -> float:
    """The event loop's clock: it never steps, and a simulated run has its own."""
    return asyncio.get_running_loop().time()


def readable(messages: dict[str, StoredMessage]) -> dict[str, Member]:
    """Key → announcement, without those that were taken back or are of another version."""
    members = {}
    for subject, message in messages.items():
        if message.data:
            try:
                members[subject] = decode_member(message.data)
            except WireFormatError as error:
                log.warning("%s: %s", subject, error)
    return members


async def read_receipts(api: Api, partitions: int) -> dict[int, Receipt]:
    """Partition → its last receipt, which says whose disk has it; partitions that never had an owner are left out.

    Raises:
        ClusterUnavailableError: the receipts cannot be read now.
    """
    limit = asyncio.Semaphore(READS_AT_ONCE)

    async def last(partition: int) -> Receipt | None:
        try:
            async with limit:
                return (await last_receipt(api, partition))[0]
        except WireFormatError:
            # Its lane will say so; nobody else can tell whose it is.
            return None

    try:
        async with asyncio.timeout(api.settings.api_timeout_s):
            found = await side_by_side(*map(last, range(partitions)))
    except TimeoutError:
        raise ClusterUnavailableError(f"{RECEIPTS} has no leader now; see `fictl cluster status`") from None
    return {partition: receipt for partition, receipt in enumerate(found) if receipt is not None}
