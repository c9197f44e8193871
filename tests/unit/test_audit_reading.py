"""Receipts and seal records are read all and in order, from many places at once."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.audit import read_partition
from contracts.receipts import Receipt, encode_receipt, first_receipt
from contracts.subjects import receipt_subject
from stages.runtime.messages import StoredMessage
from stages.runtime.tasks import REQUESTS_AT_ONCE


class Stream:
    """`FI_RECEIPTS` of one partition's receipts, each of which says its own sequence as its origin."""

    def __init__(self, seqs: list[int]) -> None:
        first = first_receipt(0, "c" * 32, "s" * 32, "")
        self._messages = {
            seq: StoredMessage(
                receipt_subject(0), seq, 0, encode_receipt(msgspec.structs.replace(first, origin=seq)), {}
            )
            for seq in sorted(seqs)
        }
        self._under_way = 0
        self.most_under_way = 0

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        return list(self._messages.values())[-1] if self._messages and subject == receipt_subject(0) else None

    async def first_message(self, stream: str, subject: str, *, from_seq: int = 1) -> StoredMessage | None:
        self._under_way += 1
        self.most_under_way = max(self.most_under_way, self._under_way)
        await asyncio.sleep(0)
        self._under_way -= 1
        return next((message for seq, message in self._messages.items() if seq >= from_seq), None)


async def origins(stream: Any, from_seq: int = 1) -> tuple[list[int], int]:
    rows, last_seq = await read_partition(stream, 0, from_seq)
    return [row.origin for row in rows if isinstance(row, Receipt)], last_seq


@given(seqs=st.lists(st.integers(1, 400), unique=True, max_size=120), from_seq=st.integers(1, 410))
def test_wherever_they_lie_each_is_read_once_and_in_order(seqs: list[int], from_seq: int) -> None:
    wanted = [seq for seq in sorted(seqs) if seq >= from_seq]
    found = asyncio.run(origins(Stream(seqs), from_seq))
    assert found == (wanted, wanted[-1] if wanted else from_seq - 1)


@pytest.mark.parametrize("beginning", [1, 10**12])
async def test_many_are_read_from_several_places_at_once(beginning: int) -> None:
    seqs = list(range(beginning, beginning + 1000))
    stream = Stream(seqs)
    assert (await origins(stream))[0] == seqs
    assert stream.most_under_way == REQUESTS_AT_ONCE
