"""Whether FI_EVENTS still has what a partition's first shard settled, by the first message that is there."""

from __future__ import annotations

import msgspec
import pytest
from msgspec import UNSET

from cluster.retained import begins_with
from contracts.receipts import ResumePoint, SealRecord
from contracts.subjects import EVENTS
from stages.runtime.messages import StoredMessage

LAST = 40
SEAL = SealRecord(
    partition=0,
    store="a" * 32,
    shard=1,
    file="p000-00000001.h5",
    sha256="0" * 64,
    first_origin=1,
    last_origin=LAST,
    events=2,
    tree_size=2,
    root="0" * 64,
    sealed_ns=0,
    bytes=1,
    resume=ResumePoint(frontier=b"", duplicates=1, dead_lettered=1, closed=b""),
)


def first(seq: int, lines: int) -> StoredMessage:
    return StoredMessage(f"{EVENTS}.any", seq, 0, b"\n".join([b"{}"] * lines), {})


def test_what_is_before_the_shard_ends_shows_that_nothing_of_it_is_gone() -> None:
    assert begins_with(SEAL, first(LAST - 1, 1))
    assert not begins_with(SEAL, first(LAST + 1, 4))


@pytest.mark.parametrize(("lines", "whole"), [(4, True), (3, False), (5, False)])
def test_the_message_that_a_shard_ends_with_is_all_of_it_if_it_bears_all_that_was_settled(
    lines: int, whole: bool
) -> None:
    assert begins_with(SEAL, first(LAST, lines)) == whole


def test_a_later_shard_or_a_record_without_totals_says_nothing_of_the_first_one() -> None:
    assert not begins_with(msgspec.structs.replace(SEAL, shard=2), first(LAST, 4))
    assert not begins_with(msgspec.structs.replace(SEAL, resume=UNSET), first(LAST, 4))
