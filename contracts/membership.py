"""Who works on what: a process's announcement, and the assignment that everybody computes from the announcements.

The assignment is a pure function of the members, so that processes which see the same bucket agree without talking.
Being wrong for a moment is harmless: writes are fenced.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from hashlib import blake2b

import msgspec

from contracts.errors import WireFormatError
from contracts.subjects import Stage
from contracts.wire import UNREADABLE, Count, TimeNs


class Member(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="member.1"):
    """One process of one stage, as it announces itself.

    Attributes:
        stage: which stage.
        node: its host name.
        name: its name, unique for the stage and node.
        nonce: tells this process from an earlier one of the same name.
        pid: its process id on the node.
        started_ns: when it started; of two processes with one name, the later one stands.
        partitions: the lanes it runs now.
        opening: of these, the ones that have not found their place yet.
        store: id of its store (persist), else empty.
        pinned: the partitions it was told to hold, whatever the assignment says; None: it takes its share.
        draining: it is about to end and takes nothing on.
        paused: its stage is paused and it obeys.
        policy: version of the policy in force (segment); 0 for a stage that has none.
        holding: its dead-letter breaker is open.
    """

    stage: Stage
    node: str
    name: str
    nonce: str
    pid: int
    started_ns: TimeNs
    partitions: tuple[Count, ...] = ()
    opening: tuple[Count, ...] = ()
    store: str = ""
    pinned: tuple[Count, ...] | None = None
    draining: bool = False
    paused: bool = False
    policy: int = 0
    holding: bool = False

    def may_hold(self, partition: int, owners: Mapping[int, str]) -> bool:
        """True unless the partition belongs to another store. `owners`: as for `shares`."""
        return owners.get(partition, self.store) == self.store


class Pause(msgspec.Struct, frozen=True, kw_only=True, tag_field="v", tag="pause.1"):
    """What stands in `FI_CONTROL` under ``pause.<stage>`` while a stage is paused.

    Attributes:
        since_ns: when it was asked for.
        by: who asked, as ``user@node``.
    """

    since_ns: TimeNs
    by: str


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Member)
_pause_decoder = msgspec.json.Decoder(Pause)


def encode_member(member: Member) -> bytes:
    """Wire bytes (JSON)."""
    return _encoder.encode(member)


def decode_member(data: bytes) -> Member:
    """Inverse of `encode_member`.

    Raises:
        WireFormatError: not an announcement of a version this build reads.
    """
    try:
        return _decoder.decode(data)
    except UNREADABLE as error:
        raise WireFormatError(f"not a member's announcement: {error}") from error


def decode_pause(data: bytes) -> Pause:
    """What stands under a pause key. The key alone pauses: what nobody can read was put there by hand."""
    try:
        return _pause_decoder.decode(data)
    except UNREADABLE:
        return Pause(since_ns=0, by="somebody, in words that this version cannot read")


def assign(members: Collection[str], partitions: Collection[int]) -> dict[int, str]:
    """Partition → member: rendezvous hashing with bounded loads.

    Each pair of partition and member has a weight, the same everywhere; pairs are taken from the heaviest down, and a
    member takes no more than its share. Loads differ by at most one. A member that comes or goes moves its own share
    and seldom more than one or two partitions besides.

    Args:
        members: ids.
        partitions: to be shared out.
    """
    if not members:
        return {}
    share, larger = divmod(len(partitions), len(members))
    loads = dict.fromkeys(members, 0)
    assigned: dict[int, str] = {}
    pairs = ((_weight(partition, member), partition, member) for partition in partitions for member in members)
    for _, partition, member in sorted(pairs, reverse=True):
        room = loads[member] < share or (loads[member] == share and larger > 0)
        if partition not in assigned and room:
            larger -= loads[member] == share
            loads[member] += 1
            assigned[partition] = member
    return assigned


def _weight(partition: int, member: str) -> bytes:
    return blake2b(f"{partition} {member}".encode(), digest_size=8).digest()


def shares(members: Mapping[str, Member], partitions: int, owners: Mapping[int, str]) -> dict[int, str]:
    """Partition → id of the member that should run it; partitions that nobody may run are left out.

    Args:
        members: id → announcement, of one stage.
        partitions: P.
        owners: partition → id of the store that owns it (persist). A partition that is not in it belongs to nobody
            yet, and any member may take it.

    Returns:
        Members that are pinned hold what they were told; the others share the rest. Draining members get nothing.
    """
    staying = {key: member for key, member in members.items() if not member.draining}
    assigned = {
        partition: key
        for key, member in sorted(staying.items())
        for partition in member.pinned or ()
        if partition < partitions and member.may_hold(partition, owners)
    }
    sharing = {key: member for key, member in staying.items() if member.pinned is None}
    alike: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for partition in range(partitions):
        if partition not in assigned:
            able = tuple(key for key, member in sharing.items() if member.may_hold(partition, owners))
            alike[able].append(partition)
    for able, group in alike.items():
        assigned |= assign(able, group)
    return assigned
