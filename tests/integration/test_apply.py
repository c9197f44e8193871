"""Applying the topology to real servers: idempotent, honest about drift, and never forgetting where origins stood."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import StreamConfig, StreamInfo
from nats.js.errors import APIError, NoStreamResponseError

from cluster.apply import apply, plan
from cluster.status import LAG_USUAL_MAX, ClusterStatus, status
from cluster.testing.waiting import SETTLED_LIMIT_S, until
from cluster.topology import Drift, streams
from contracts import subjects
from contracts.errors import ClusterUnavailableError, TopologyError
from contracts.frames import Frame, encode_frame
from contracts.receipts import Receipt, encode_receipt
from contracts.settings import MIB, Settings
from contracts.telemetry import DEAD_INDEX, DEAD_ORIGIN, HEADER_EXPECTED_LAST_SUBJECT_SEQ
from stages.persist.lost import receipts_lost
from stages.runtime.access import Servers
from stages.runtime.api import Api
from stages.runtime.facts import read_cluster

pytestmark = pytest.mark.cluster

SETTINGS = Settings(partitions=4, events_bytes_max=64 * MIB, hop_bytes_max=16 * MIB)


def changed(**values: object) -> Settings:
    return msgspec.structs.replace(SETTINGS, **values)


async def put(client: Client, subject: str, data: bytes = b"{}") -> int:
    """Publishes one message and gives its sequence."""
    return (await client.jetstream(timeout=10).publish(subject, data, timeout=10)).seq


def receipt(partition: int, origin: int, cluster: str) -> bytes:
    return encode_receipt(
        Receipt(
            partition=partition,
            cluster=cluster,
            writer="w",
            node="h",
            store="s",
            ends={},
            origin=origin,
            trail=(1, 1, 1),
            persisted=origin,
            duplicates=0,
            dead_lettered=0,
            root="0" * 64,
            closed=b"",
            committed_ns=1,
        )
    )


def frame(partition: int, last: int) -> bytes:
    return encode_frame(
        Frame(
            partition=partition,
            prev=0,
            first=1,
            last=last,
            trail=(),
            writer="w",
            made_ns=1,
            closed=b"",
            dead=(),
            events=(),
        )
    )


async def test_applying_twice_changes_nothing_the_second_time(client: Client) -> None:
    first = await apply(client, SETTINGS)
    assert [change.action for change in first.changes] == ["create"] * len(subjects.STREAMS)
    second = await apply(client, SETTINGS)
    assert second.changes == ()
    assert second.cluster_id == first.cluster_id
    assert (await plan(client, SETTINGS)).changes == ()


async def test_planning_changes_nothing(client: Client) -> None:
    planned = await plan(client, SETTINGS)
    assert len(planned.changes) == len(subjects.STREAMS)
    assert await client.jetstream(timeout=10).streams_info() == []


async def test_applies_at_once_agree_on_one_cluster(client: Client) -> None:
    plans = await asyncio.gather(*(apply(client, SETTINGS) for _ in range(6)))
    assert {plan.cluster_id for plan in plans} == {(await read_cluster(client)).cluster_id}


async def test_events_are_accepted_by_nothing_before_every_other_stream_is_there(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = JetStreamContext.add_stream
    before: list[set[str]] = []

    async def told(jetstream: JetStreamContext, config: StreamConfig) -> StreamInfo:
        if config.name == subjects.EVENTS:
            before.append({str(info.config.name) for info in await jetstream.streams_info()})
        return await create(jetstream, config)

    monkeypatch.setattr(JetStreamContext, "add_stream", told)
    await apply(client, SETTINGS)
    assert before[0] == set(subjects.STREAMS) - {subjects.EVENTS}


async def test_an_apply_that_was_faster_gives_the_cluster_its_id(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = JetStreamContext.add_stream
    theirs = next(config for config in streams(SETTINGS, "f" * 32) if config.name == subjects.RECEIPTS)

    async def beaten(jetstream: JetStreamContext, config: StreamConfig) -> StreamInfo:
        if config.name == subjects.RECEIPTS:
            await create(jetstream, theirs)
        return await create(jetstream, config)

    monkeypatch.setattr(JetStreamContext, "add_stream", beaten)
    assert (await apply(client, SETTINGS)).cluster_id == "f" * 32
    assert (await read_cluster(client)).cluster_id == "f" * 32


async def test_drift_is_shown_field_by_field_and_repaired(client: Client) -> None:
    await apply(client, SETTINGS)
    jetstream = client.jetstream(timeout=10)
    config = (await jetstream.stream_info(subjects.HASH)).config
    theirs = config.evolve(max_bytes=MIB, max_age=600.0, allow_rollup_hdrs=True, description="theirs")
    await jetstream.update_stream(theirs)
    drifted = await plan(client, SETTINGS)
    (change,) = drifted.changes
    assert change.drifts == (
        Drift(subjects.HASH, "max_bytes", 16 * MIB, MIB),
        Drift(subjects.HASH, "max_age", 0, 600.0),
        Drift(subjects.HASH, "allow_rollup_hdrs", False, True),
    )
    await apply(client, SETTINGS)
    assert (await plan(client, SETTINGS)).changes == ()
    assert (await jetstream.stream_info(subjects.HASH)).config.description == "theirs"


async def test_a_bucket_made_by_hand_is_completed_and_keeps_its_keys(client: Client) -> None:
    jetstream = client.jetstream(timeout=10)
    await jetstream.add_stream(name=subjects.CONTROL, subjects=["$KV.FI_CONTROL.>"], num_replicas=3)
    await put(client, "$KV.FI_CONTROL.pause.hash")
    drifted = [change for change in (await plan(client, SETTINGS)).changes if change.stream == subjects.CONTROL]
    assert {drift.field for change in drifted for drift in change.drifts} >= {"allow_msg_ttl", "deny_delete"}
    await apply(client, SETTINGS)
    assert (await plan(client, SETTINGS)).changes == ()
    entry = await (await jetstream.key_value("FI_CONTROL")).get("pause.hash")
    assert entry.value == b"{}"


async def test_limits_change_under_data_without_losing_it(client: Client) -> None:
    await apply(client, SETTINGS)
    for _ in range(5):
        await put(client, "fi.events.site.consultation", b"x" * 1000)
    await apply(client, changed(events_bytes_max=1024))
    info = await client.jetstream(timeout=10).stream_info(subjects.EVENTS)
    assert (info.config.max_bytes, info.state.messages) == (1024, 5)


async def test_nobody_deletes_a_message_that_was_accepted_or_vouched_for(client: Client) -> None:
    """Deleted before it was read it would be gone, and nothing would tell. Purged they can be: trimming does it."""
    jetstream = client.jetstream(timeout=10)
    before = {str(config.name): config.evolve(deny_delete=False) for config in streams(SETTINGS, "f" * 32)}
    for name in (subjects.RECEIPTS, subjects.EVENTS):
        await jetstream.add_stream(before[name])
    await put(client, "fi.events.site.consultation")
    await put(client, "fi.receipts.0")
    await apply(client, SETTINGS)
    assert (await plan(client, SETTINGS)).changes == ()
    for name in (subjects.RECEIPTS, subjects.EVENTS):
        with pytest.raises(APIError, match="message delete not permitted"):
            await jetstream.delete_msg(name, 1)
        assert (await jetstream.stream_info(name)).state.messages == 1
        await jetstream.purge_stream(name)
        assert (await jetstream.stream_info(name)).state.messages == 0


async def test_partitions_cannot_change_under_data(client: Client) -> None:
    await apply(client, SETTINGS)
    await put(client, "fi.events.site.consultation")
    for other in (changed(partitions=8), changed(partition_by="site")):
        assert (await plan(client, other)).refused
        with pytest.raises(TopologyError, match="FI_EVENTS hold data"):
            await apply(client, other)
    facts = await read_cluster(client)
    assert (facts.partitions, facts.partition_by) == (4, "consultation")


async def test_partitions_change_on_an_empty_cluster_and_the_server_obeys(client: Client) -> None:
    before = await apply(client, SETTINGS)
    await apply(client, changed(partitions=16, partition_by="site"))
    facts = await read_cluster(client)
    assert (facts.partitions, facts.partition_by) == (16, "site")
    assert facts.cluster_id == before.cluster_id
    seq = await put(client, "fi.events.north.consultation")
    stored = await client.jetstream(timeout=10).get_msg(subjects.EVENTS, seq)
    partition = subjects.partition_of("north", "consultation", 16, "site")
    assert stored.subject == f"fi.raw.{partition}.north.consultation"


async def test_storage_that_cannot_change_is_refused_and_nothing_else_is_touched(client: Client) -> None:
    await apply(client, SETTINGS)
    with pytest.raises(TopologyError, match="storage from 'memory' to 'file'"):
        await apply(client, changed(hop_storage="file", events_bytes_max=32 * MIB))
    assert (await plan(client, SETTINGS)).changes == ()


async def test_a_subject_of_another_shape_is_accepted_by_nobody(client: Client) -> None:
    await apply(client, SETTINGS)
    await put(client, "fi.events.site.consultation")
    for subject in ("fi.events.site", "fi.events.a.b.c", "fi.raw.0.site.consultation"):
        with pytest.raises(NoStreamResponseError):
            await JetStreamContext(client).publish(subject, b"{}")


async def test_events_made_again_count_on_from_the_highest_origin_and_keep_the_id(client: Client) -> None:
    made = await apply(client, SETTINGS)
    await put(client, "fi.receipts.0", receipt(0, 41, made.cluster_id))
    await put(client, "fi.receipts.3", receipt(3, 99, made.cluster_id))
    await put(client, "fi.receipts.1", receipt(1, 7, made.cluster_id))
    await client.jetstream(timeout=10).delete_stream(subjects.EVENTS)
    (change,) = (await apply(client, SETTINGS)).changes
    assert (change.stream, change.first_seq) == (subjects.EVENTS, 100)
    assert (await read_cluster(client)).cluster_id == made.cluster_id
    assert await put(client, "fi.events.site.consultation") == 100
    assert (await apply(client, SETTINGS)).changes == ()


async def test_origins_that_are_framed_but_not_committed_are_not_given_out_again(client: Client) -> None:
    made = await apply(client, SETTINGS)
    await put(client, "fi.receipts.0", receipt(0, 10, made.cluster_id))
    await put(client, "fi.segment.2", frame(2, 23))
    await put(client, "fi.persist.1", frame(1, 17))
    await client.jetstream(timeout=10).delete_stream(subjects.EVENTS)
    await apply(client, SETTINGS)
    assert await put(client, "fi.events.site.consultation") == 24


async def test_origins_that_were_refused_are_not_given_out_again(client: Client) -> None:
    """What comes before a lane's last letter is taken for buried: an event counted from 1 anew would be nowhere."""
    await apply(client, SETTINGS)
    for partition, origin in enumerate(("7", str(2**60), "no number")):
        headers = {DEAD_ORIGIN: origin, DEAD_INDEX: "0", HEADER_EXPECTED_LAST_SUBJECT_SEQ: "0"}
        await client.jetstream(timeout=10).publish(f"fi.dlq.ingest.{partition}", b"x", timeout=10, headers=headers)
    for name in subjects.STREAMS:
        if name != subjects.DLQ:
            await client.jetstream(timeout=10).delete_stream(name)
    await apply(client, SETTINGS)
    assert await put(client, "fi.events.site-1.c") == 8


async def test_events_made_again_must_be_partitioned_as_before(client: Client) -> None:
    made = await apply(client, SETTINGS)
    await put(client, "fi.receipts.0", receipt(0, 10, made.cluster_id))
    await client.jetstream(timeout=10).delete_stream(subjects.EVENTS)
    with pytest.raises(TopologyError, match="FI_RECEIPTS hold data"):
        await apply(client, changed(partitions=8))


async def test_lost_receipts_are_begun_again_with_a_mark_that_stays(client: Client) -> None:
    jetstream = client.jetstream(timeout=10)
    made = await apply(client, SETTINGS)
    assert await receipts_lost(Api(client, SETTINGS)) == ""
    await jetstream.delete_stream(subjects.RECEIPTS)
    await apply(client, SETTINGS)
    assert await receipts_lost(Api(client, SETTINGS)) == "", "nothing was accepted yet, so nothing can have been lost"
    await put(client, "fi.events.site.consultation")
    await jetstream.delete_stream(subjects.RECEIPTS)
    (change,) = (await apply(client, SETTINGS)).changes
    assert (change.stream, change.action) == (subjects.RECEIPTS, "create")
    assert await receipts_lost(Api(client, SETTINGS)) == change.lost > "2026"
    again = await apply(client, changed(receipts_bytes_max=SETTINGS.receipts_bytes_max + MIB))
    assert (again.cluster_id, [one.action for one in again.changes]) == (made.cluster_id, ["update"])
    assert await receipts_lost(Api(client, SETTINGS)) == change.lost


async def test_events_are_not_counted_anew_while_lost_receipts_would_say_from_where(client: Client) -> None:
    jetstream = client.jetstream(timeout=10)
    made = await apply(client, SETTINGS)
    await put(client, "fi.events.site.consultation")
    await jetstream.delete_stream(subjects.RECEIPTS)
    await apply(client, SETTINGS)
    await jetstream.delete_stream(subjects.EVENTS)
    with pytest.raises(TopologyError, match="FI_EVENTS is gone, and so are receipts"):
        await apply(client, SETTINGS)
    for partition in range(SETTINGS.partitions):
        await put(client, f"fi.receipts.{partition}", receipt(partition, 10, made.cluster_id))
    (change,) = (await apply(client, SETTINGS)).changes
    assert (change.stream, change.first_seq) == (subjects.EVENTS, 11)


async def test_streams_larger_than_the_servers_are_refused_with_a_hint(client: Client) -> None:
    with pytest.raises(TopologyError, match="BYTES_MAX"):
        await apply(client, changed(hop_bytes_max=1 << 60))


async def test_facts_of_a_cluster_without_streams_name_the_next_step(client: Client) -> None:
    with pytest.raises(TopologyError, match="fictl cluster apply"):
        await read_cluster(client)
    await client.jetstream(timeout=10).add_stream(name=subjects.EVENTS, subjects=["fi.events.*.*"])
    with pytest.raises(TopologyError, match="fictl cluster apply"):
        await read_cluster(client)


async def test_more_replicas_than_servers_is_reported_as_unavailable(client: Client) -> None:
    with pytest.raises(ClusterUnavailableError, match=r"no suitable peers .*start as many servers as `replicas` says"):
        await apply(client, changed(replicas=5), wait_s=0.5)


async def test_status_shows_streams_servers_and_what_is_missing(client: Client, cluster_urls: tuple[str, ...]) -> None:
    async def healthy() -> bool:
        return (await status(client, Servers(cluster_urls))).healthy

    empty = await status(client, Servers(cluster_urls))
    assert not empty.healthy
    assert all(stream.problem for stream in empty.streams)
    made = await apply(client, SETTINGS)
    await put(client, "fi.events.site.consultation", b"x" * 1000)
    seen = await status(client, Servers((*cluster_urls, "nats://127.0.0.1:1")))
    assert [server.reachable for server in seen.servers] == [True, True, True, False]
    assert {server.name for server in seen.servers[:3]} == {"n1", "n2", "n3"}
    events = next(stream for stream in seen.streams if stream.name == subjects.EVENTS)
    assert (events.messages, events.first_seq, events.last_seq) == (1, 1, 1)
    assert events.used == events.bytes / SETTINGS.events_bytes_max > 0
    assert {events.leader, *(replica.name for replica in events.replicas)} == {"n1", "n2", "n3"}
    assert seen.facts is not None
    assert (seen.facts.cluster_id, seen.facts.partitions) == (made.cluster_id, 4)
    await until(healthy, "every replica is current")  # a replica may be a message behind for a moment
    assert msgspec.json.decode(msgspec.json.encode(seen), type=ClusterStatus) == seen


async def test_a_replica_that_lacks_what_is_under_way_is_current(client: Client, cluster_urls: tuple[str, ...]) -> None:
    """While events flow, servers call one of them not current at nearly every look."""
    await apply(client, SETTINGS)

    async def lags() -> list[int]:
        seen = await status(client, Servers(cluster_urls))
        assert seen.healthy, seen.streams
        return [replica.lag for stream in seen.streams for replica in stream.replicas]

    async def settled() -> bool:
        return not any(await lags())

    async with asyncio.timeout(SETTLED_LIMIT_S):
        found = [0]
        while not any(found):
            await until(settled, "no replica lacks anything")
            async with asyncio.TaskGroup() as tasks:
                for _ in range(LAG_USUAL_MAX):
                    tasks.create_task(put(client, "fi.events.site.consultation"))
                found = await lags()
