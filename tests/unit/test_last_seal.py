"""Which seal record a partition's store goes by: not those of shards given up, nor those of owners fenced off."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest

from cluster.backlog import told_before
from contracts.errors import WireFormatError
from contracts.receipts import SealRecord, StoreEnd, encode_receipt, first_receipt
from contracts.subjects import RECEIPTS, seal_subject
from stages.persist.records import speaks_of
from stages.runtime.api import Api
from stages.runtime.checkpoint import last_seal
from stages.runtime.messages import StoredMessage

OURS, THEIRS = "a" * 32, "b" * 32


class Sealed:
    """A stream that holds these records, by their sequences."""

    def __init__(self, records: dict[int, bytes]) -> None:
        subject = seal_subject(0)
        self._messages = [StoredMessage(subject, seq, 0, data, {}) for seq, data in sorted(records.items())]

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        assert (stream, subject) == (RECEIPTS, seal_subject(0))
        return self._messages[-1] if self._messages else None

    async def first_message(self, stream: str, subject: str, *, from_seq: int = 1) -> StoredMessage | None:
        assert (stream, subject) == (RECEIPTS, seal_subject(0))
        return next((message for message in self._messages if message.seq >= from_seq), None)


def record(shard: int, store: str = OURS) -> SealRecord:
    return SealRecord(
        partition=0,
        store=store,
        shard=shard,
        file=f"{shard}.h5",
        sha256="0" * 64,
        first_origin=shard,
        last_origin=shard,
        events=1,
        tree_size=shard,
        root="0" * 64,
        sealed_ns=0,
        bytes=1,
    )


async def found(records: dict[int, SealRecord], shard: int, first: int = 1) -> tuple[int | None, int]:
    """The shard of the record found for what is before `shard`, and the sequence that is last."""
    receipt = first_receipt(0, "c", OURS, "w")
    receipt = msgspec.structs.replace(receipt, ends={OURS: StoreEnd(shard=shard, commits=0, first=first)})
    stream = cast(Api, Sealed({seq: encode_receipt(one) for seq, one in records.items()}))
    last, seq = await last_seal(stream, 0, told_before(shard, receipt))
    return (None if last is None else last.shard), seq


@pytest.mark.parametrize(
    ("records", "shard", "first", "expected"),
    [
        ({}, 1, 1, (None, 0)),
        ({4: record(1), 9: record(2)}, 3, 1, (2, 9)),
        ({4: record(1), 9: record(2), 11: record(3)}, 3, 1, (2, 11)),
        ({4: record(1), 9: record(2), 11: record(3), 12: record(4)}, 2, 1, (1, 12)),
        ({4: record(1), 9: record(2)}, 1, 1, (None, 9)),
        ({4: record(1), 9: record(2, THEIRS), 10: record(2), 15: record(3, THEIRS)}, 3, 1, (2, 15)),
        ({4: record(1), 9: record(2, THEIRS)}, 3, 1, (1, 9)),
        ({4: record(1, THEIRS), 9: record(2, THEIRS)}, 3, 3, (2, 9)),
        ({4: record(1, THEIRS), 9: record(2, THEIRS), 11: record(3, THEIRS)}, 4, 3, (2, 11)),
    ],
    ids=[
        "none",
        "the last",
        "the last was given up",
        "several were given up",
        "all were given up",
        "it lies between those of somebody fenced off",
        "only somebody fenced off has one of the number",
        "the store's part begins after another one's",
        "of the other one's only those before the part",
    ],
)
async def test_the_last_record_is_found_that_is_of_what_the_receipt_speaks_of(
    records: dict[int, SealRecord], shard: int, first: int, expected: tuple[int | None, int]
) -> None:
    assert await found(records, shard, first) == expected


def test_a_record_is_of_the_shard_that_is_here_and_of_the_owner_who_made_it() -> None:
    trees = {2: (2, "0" * 64), 3: (3, "0" * 64), 4: (4, "1" * 64), 5: (7, "0" * 64)}

    def ours(shard: int, store: str) -> bool:
        return speaks_of(record(shard, store), OURS, 3, trees)

    assert [ours(shard, OURS) for shard in range(1, 7)] == [False, True, True, False, False, False]
    assert ours(2, THEIRS), "the store's part begins after it"
    assert not ours(3, THEIRS), "who was fenced off while it sealed the same events, has the shard in another store"


async def test_a_record_that_cannot_be_read_is_named_and_not_passed_over() -> None:
    stream = cast(Any, Sealed({4: encode_receipt(record(1)), 7: b"{}", 9: encode_receipt(record(3))}))
    with pytest.raises(WireFormatError, match=r"fi\.seals\.0: sequence 7 of FI_RECEIPTS is not a seal record"):
        await last_seal(stream, 0, lambda one: one.shard < 3)
