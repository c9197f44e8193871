"""`partition_of` is the server's own function: shown by asking the server, for thousands of subjects."""

from __future__ import annotations

import asyncio
import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.js.api import StorageType, StreamConfig, SubjectTransform
from streams import publish_first

from contracts.subjects import TOKEN_PATTERN, PartitionBy, partition_of, partition_transform, split_raw_subject

pytestmark = pytest.mark.cluster

ALPHABET = string.ascii_letters + string.digits + "_-"
SUBJECTS_PER_CASE = 1500


def token_pairs(seed: int) -> list[tuple[str, str]]:
    """Random (site, consultation) tokens of all lengths, and the awkward ones."""
    rng = random.Random(seed)

    def token() -> str:
        return "".join(rng.choices(ALPHABET, k=rng.randint(1, 64)))

    awkward = ["-", "_", "0", "A", "a" * 64, "-" * 64, "00000000-0000-0000-0000-000000000000"]
    pairs = [(site, consultation) for site in awkward for consultation in awkward]
    return pairs + [(token(), token()) for _ in range(SUBJECTS_PER_CASE)]


async def stored_partitions(
    client: Client, pairs: list[tuple[str, str]], partitions: int, by: PartitionBy
) -> dict[tuple[str, str], int]:
    """Publishes an empty message for each pair and reads back the subjects the server stored them under."""
    jetstream = client.jetstream(timeout=10)
    source, destination = partition_transform(partitions, by)
    await jetstream.add_stream(
        StreamConfig(
            name="SCRATCH",
            subjects=[source],
            storage=StorageType.MEMORY,
            num_replicas=1,
            subject_transform=SubjectTransform(src=source, dest=destination),
        )
    )
    await publish_first(client, "fi.events.{}.{}".format(*pairs[0]))
    for start in range(0, len(pairs), 256):
        acks = (jetstream.publish(f"fi.events.{a}.{b}", b"", timeout=30) for a, b in pairs[start : start + 256])
        await asyncio.gather(*acks)
    seen = await jetstream.stream_info("SCRATCH", subjects_filter="fi.raw.>")
    await jetstream.delete_stream("SCRATCH")
    split = map(split_raw_subject, seen.state.subjects or {})
    return {(site, consultation): partition for partition, site, consultation in split}


@pytest.mark.parametrize("by", ["consultation", "site"])
@pytest.mark.parametrize("partitions", [1, 2, 7, 8, 1024])
async def test_our_partition_function_is_the_servers(client: Client, partitions: int, by: PartitionBy) -> None:
    pairs = token_pairs(seed=partitions)
    stored = await stored_partitions(client, pairs, partitions, by)
    assert stored == {(a, b): partition_of(a, b, partitions, by) for a, b in pairs}


@given(st.from_regex(TOKEN_PATTERN, fullmatch=True), st.from_regex(TOKEN_PATTERN, fullmatch=True), st.integers(1, 1024))
def test_a_partition_is_in_range_and_by_site_ignores_the_consultation(site: str, other: str, partitions: int) -> None:
    assert 0 <= partition_of(site, other, partitions) < partitions
    assert partition_of(site, other, partitions, "site") == partition_of(site, "x", partitions, "site")
