"""Streams as data: what is asked for, what counts as drift, and what may be done about it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from nats.js.api import StorageType, StreamConfig, StreamInfo, StreamSource, StreamState

from cluster.topology import (
    CONTROL_HISTORY,
    Drift,
    Remedy,
    data_held,
    diff,
    lasting,
    merge,
    refusals,
    remedy,
    streams,
    told_lasting,
)
from contracts import subjects
from contracts.settings import Settings
from stages.runtime.facts import META_PARTITIONS

SETTINGS = Settings()
ID = "0" * 32


def as_stored(config: StreamConfig) -> StreamConfig:
    """What the server would give back: plain JSON values, and keys of its own in the metadata."""
    told = msgspec.json.decode(msgspec.json.encode(config.as_dict()))
    told["metadata"] = (told.get("metadata") or {}) | {"_nats.level": "1"}
    return StreamConfig.from_response(told)


def found(settings: Settings = SETTINGS, **changed: object) -> dict[str, StreamConfig]:
    """All streams as stored, `changed` in `FI_SEGMENT`."""
    stored = {str(config.name): as_stored(config) for config in streams(settings, ID)}
    stored[subjects.SEGMENT] = stored[subjects.SEGMENT].evolve(**changed)
    return stored


def by_name(settings: Settings = SETTINGS) -> dict[str, StreamConfig]:
    return {str(config.name): config for config in streams(settings, ID)}


def test_every_stream_of_the_contract_is_there_and_events_comes_last() -> None:
    names = [config.name for config in streams(SETTINGS, ID)]
    assert sorted(map(str, names)) == sorted(subjects.STREAMS)
    assert names[-1] == subjects.EVENTS


def test_nothing_is_dropped_for_age_or_room_and_reads_come_from_the_leader() -> None:
    for config in streams(SETTINGS, ID):
        assert config.max_age == 0
        assert config.discard is not None
        assert config.discard.value == "new"
        assert config.allow_direct is (config.name in subjects.BUCKETS)
        assert config.num_replicas == 3
        assert config.max_bytes is not None
        assert config.max_bytes > 0
        assert config.duplicate_window > 0


def test_only_derived_data_and_announcements_may_live_in_memory() -> None:
    def in_memory(settings: Settings) -> set[str]:
        return {name for name, config in by_name(settings).items() if config.storage is StorageType.MEMORY}

    assert in_memory(Settings(hop_storage="memory")) == {*subjects.HOPS, subjects.MEMBERS}
    assert in_memory(Settings(hop_storage="file")) == {subjects.MEMBERS}


def test_buckets_are_what_any_key_value_client_expects() -> None:
    for name in subjects.BUCKETS:
        bucket = by_name()[name]
        assert (bucket.allow_msg_ttl, bucket.allow_rollup_hdrs, bucket.deny_delete) == (True, True, True)
        assert bucket.subjects == [f"$KV.{name.removeprefix('KV_')}.>"]
    assert by_name()[subjects.MEMBERS].max_msgs_per_subject == 1
    assert by_name()[subjects.CONTROL].max_msgs_per_subject == CONTROL_HISTORY > 1


def test_a_bucket_without_expiry_of_keys_is_repaired() -> None:
    stored = found()
    stored[subjects.MEMBERS] = stored[subjects.MEMBERS].evolve(allow_msg_ttl=False)
    assert diff(streams(SETTINGS, ID), stored) == [Drift(subjects.MEMBERS, "allow_msg_ttl", True, False)]


@pytest.mark.parametrize("stage", subjects.STAGES)
@pytest.mark.parametrize("partition", [0, 7])
def test_each_stage_reads_and_writes_subjects_its_streams_listen_on(stage: subjects.Stage, partition: int) -> None:
    def listens(pattern: str, subject: str) -> bool:
        tokens, wanted = subject.split("."), pattern.split(".")
        return len(tokens) == len(wanted) and all(w in ("*", t) for t, w in zip(tokens, wanted, strict=True))

    stored = by_name()
    written = stored[subjects.OUTPUT_STREAM[stage]].subjects or []
    assert any(listens(pattern, subjects.output_subject(stage, partition)) for pattern in written)
    dead = stored[subjects.DLQ].subjects or []
    assert any(listens(pattern, subjects.dlq_subject(stage, partition)) for pattern in dead)
    if stage != "ingest":
        read = stored[subjects.INPUT_STREAM[stage]].subjects or []
        assert any(listens(pattern, subjects.input_filter(stage, partition)) for pattern in read)


def test_what_the_server_gives_back_is_no_drift() -> None:
    assert diff(streams(SETTINGS, ID), found()) == []


def test_a_missing_stream_is_no_drift() -> None:
    assert diff(streams(SETTINGS, ID), {}) == []


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("max_bytes", 1024, Drift(subjects.SEGMENT, "max_bytes", SETTINGS.hop_bytes_max, 1024)),
        ("max_age", 60.0, Drift(subjects.SEGMENT, "max_age", 0, 60.0)),
        ("discard", "old", Drift(subjects.SEGMENT, "discard", "new", "old")),
        ("num_replicas", 1, Drift(subjects.SEGMENT, "num_replicas", 3, 1)),
        ("allow_direct", True, Drift(subjects.SEGMENT, "allow_direct", False, True)),
        ("allow_rollup_hdrs", True, Drift(subjects.SEGMENT, "allow_rollup_hdrs", False, True)),
        ("subjects", ["x"], Drift(subjects.SEGMENT, "subjects", ["fi.segment.*"], ["x"])),
        ("duplicate_window", 1.0, Drift(subjects.SEGMENT, "duplicate_window", 120.0, 1.0)),
        ("retention", "interest", Drift(subjects.SEGMENT, "retention", "limits", "interest")),
        ("no_ack", True, Drift(subjects.SEGMENT, "no_ack", False, True)),
        ("sources", [StreamSource(name="x")], Drift(subjects.SEGMENT, "sources", [], ["x"])),
        ("mirror", StreamSource(name="x"), Drift(subjects.SEGMENT, "mirror", [], ["x"])),
        ("max_msg_size", 9, Drift(subjects.SEGMENT, "max_msg_size", -1, 9)),
        ("max_msgs_per_subject", 9, Drift(subjects.SEGMENT, "max_msgs_per_subject", -1, 9)),
        ("discard_new_per_subject", True, Drift(subjects.SEGMENT, "discard_new_per_subject", False, True)),
        ("subject_delete_marker_ttl", 9.0, Drift(subjects.SEGMENT, "subject_delete_marker_ttl", None, 9.0)),
    ],
)
def test_drift_is_shown_field_by_field_and_updated_in_place(field: str, value: object, expected: Drift) -> None:
    drifts = diff(streams(SETTINGS, ID), found(**{field: value}))
    assert drifts == [expected]
    assert remedy(expected) is Remedy.UPDATE
    assert refusals(drifts, [subjects.EVENTS]) == []


def test_a_queue_for_one_reader_each_cannot_be_made_a_log_again() -> None:
    drifts = diff(streams(SETTINGS, ID), found(retention="workqueue"))
    assert [remedy(drift) for drift in drifts] == [Remedy.NEVER]


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({"allow_msg_ttl": True, "max_age": 60.0}, {"allow_msg_ttl"}),
        ({"deny_purge": True, "no_ack": True}, {"deny_purge"}),
        ({"allow_msg_schedules": True, "discard": "old", "max_msgs": 5}, {"allow_msg_schedules", "discard"}),
        ({"sealed": True, "deny_purge": True, "max_age": 60.0}, {"sealed", "deny_purge", "max_age"}),
    ],
)
def test_what_no_server_takes_back_is_told_with_the_way_out_and_the_rest_is_changed(
    changes: dict[str, Any], stays: set[str]
) -> None:
    theirs = found(**changes)
    drifts = diff(streams(SETTINGS, ID), theirs)
    assert {drift.field for drift in drifts} == changes.keys()
    lasts = lasting(drifts)
    assert {drift.field for drift in lasts} == stays
    (line,) = told_lasting(lasts)
    assert "FI_SEGMENT: " in line
    assert line.endswith("Delete it with any NATS client, then `fictl cluster apply`: what it holds comes again")
    merged = merge(theirs[subjects.SEGMENT], by_name()[subjects.SEGMENT])
    assert all(getattr(merged, field) == changes[field] for field in stays)
    assert all(getattr(merged, field) != changes[field] for field in changes.keys() - stays)


def test_what_lasts_in_one_stream_does_not_last_in_another() -> None:
    theirs = found(sealed=True, no_ack=True)
    theirs[subjects.EVENTS] = theirs[subjects.EVENTS].evolve(no_ack=True, allow_msg_ttl=True)
    segment, events = told_lasting(lasting(diff(streams(SETTINGS, ID), theirs)))
    assert segment.startswith("FI_SEGMENT: no_ack is True, sealed is True, and")
    assert events.startswith("FI_EVENTS: allow_msg_ttl is True, and")
    assert "`fictl flush` until it exits with 0" in events


def test_nobody_deletes_single_messages_of_what_would_not_miss_them() -> None:
    """A hop misses what is deleted in it."""
    guarded = {subjects.EVENTS, subjects.RECEIPTS, *subjects.BUCKETS}
    assert {name for name, config in by_name().items() if config.deny_delete} == guarded
    open_to_all = {name: config.evolve(deny_delete=False) for name, config in found().items()}
    drifts = diff(streams(SETTINGS, ID), open_to_all)
    assert {(drift.stream, drift.field) for drift in drifts} == {(name, "deny_delete") for name in guarded}
    assert {remedy(drift) for drift in drifts} == {Remedy.UPDATE}
    assert diff(streams(SETTINGS, ID), found(deny_delete=True)) == []


def test_fields_we_do_not_set_are_left_alone() -> None:
    theirs = found(description="watched by operations", max_consumers=7, metadata={"team": "a"})
    wanted = by_name()[subjects.SEGMENT]
    assert diff(streams(SETTINGS, ID), theirs) == []
    merged = merge(theirs[subjects.SEGMENT], wanted)
    assert (merged.description, merged.max_consumers, merged.metadata) == ("watched by operations", 7, {"team": "a"})


def test_an_update_carries_our_values_and_none_of_the_servers_own_metadata() -> None:
    wanted = by_name()[subjects.EVENTS]
    others = {**(wanted.metadata or {}), META_PARTITIONS: "3"}
    stored = found()[subjects.EVENTS].evolve(max_bytes=1, subject_transform=None, metadata=others)
    merged = merge(stored, wanted)
    assert merged.max_bytes == SETTINGS.events_bytes_max
    assert merged.subject_transform == wanted.subject_transform
    assert merged.metadata == wanted.metadata


def test_storage_cannot_be_changed_even_on_an_empty_cluster() -> None:
    drifts = diff(streams(Settings(hop_storage="file"), ID), found())
    assert {drift.field for drift in drifts} == {"storage"}
    (reason,) = refusals(drifts, [])
    assert "FI_SEGMENT storage from 'memory' to 'file'" in reason


@pytest.mark.parametrize("other", [Settings(partitions=4), Settings(partition_by="site")])
def test_what_decides_the_partition_changes_only_while_no_data_is_held(other: Settings) -> None:
    drifts = diff(streams(other, ID), found())
    assert {remedy(drift) for drift in drifts} == {Remedy.EMPTY_ONLY}
    assert refusals(drifts, []) == []
    (reason,) = refusals(drifts, [subjects.RECEIPTS])
    assert "FI_RECEIPTS hold data" in reason
    assert "out of order" in reason


def test_another_clusters_id_is_refused_under_data() -> None:
    drifts = diff(streams(SETTINGS, "1" * 32), found())
    assert {drift.field for drift in drifts} == {"metadata.fi.cluster_id"}
    assert refusals(drifts, [subjects.EVENTS])


def test_dead_letters_do_not_count_as_partitioned_data() -> None:
    def info(messages: int) -> StreamInfo:
        state = StreamState(messages=messages, bytes=0, first_seq=0, last_seq=messages, consumer_count=0)
        return StreamInfo(config=StreamConfig(), state=state)

    held = {subjects.DLQ: info(5), subjects.EVENTS: info(0), subjects.HASH: info(1), subjects.RECEIPTS: info(2)}
    assert data_held(held) == [subjects.HASH, subjects.RECEIPTS]
    assert data_held({subjects.EVENTS: info(1)}) == [subjects.EVENTS]
