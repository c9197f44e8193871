"""An export is what the store holds, appears whole with a manifest or not at all, and no change to it goes unseen."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import h5py
import msgspec
import pytest
from exporting import ALL, EXPORT_ID, NAMES, expected, exported, filled_place, read_back
from shard_maker import CLUSTER, NOW_NS, SITES, PartitionMaker, make_event, new_store

from contracts.backups import BACKUP_FILE
from contracts.errors import SettingsError, ShardCorruptError
from contracts.events import Event, encode_event, event_to_dict, format_rfc3339
from contracts.hashing import MerkleFrontier, leaf_hash
from stages.persist.export import consultations, write
from stages.persist.export.formats import CSV_COLUMNS, ExportFormat, write_csv, write_ndjson
from stages.persist.export.manifest import (
    MANIFEST_SUFFIX,
    check_export,
    file_sha256,
    find_manifest,
    manifest_path,
)
from stages.persist.export.write import export_file, export_stream
from stages.persist.output import OutputError
from stages.persist.sealed import Selection
from stages.persist.store import EventStore, StoredEvent
from stages.persist.storedir import read_store
from stages.persist.verify import verify_store


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return filled_place(tmp_path)


@pytest.mark.parametrize("file_format", ExportFormat)
def test_every_format_gives_back_every_event(place: Path, file_format: ExportFormat) -> None:
    manifest = exported(place, file_format)
    events = expected(place)
    assert read_back(place, file_format) == sorted(events, key=lambda fields: (fields["origin"], fields["partition"]))
    assert manifest.events == len(events) == 142
    assert check_export(manifest_path(place / NAMES[file_format])).ok


@pytest.mark.parametrize("file_format", ExportFormat)
def test_filters_choose_events_and_stand_in_the_manifest(place: Path, file_format: ExportFormat) -> None:
    with EventStore(place) as store:
        some = list(store.iterate())[30].event
    span: dict[str, Any] = {"since_ns": NOW_NS + 20_000, "until_ns": NOW_NS + 70_000}
    counts = []
    for wanted in (
        Selection(site=some.site, event_type=some.event_type, **span),
        Selection(consultation_id=some.consultation_id),
        Selection(consultation_id=some.consultation_id, site=some.site, **span),
    ):
        events = expected(place, wanted)
        manifest = exported(place, file_format, wanted)
        found = read_back(place, file_format)
        assert sorted(event["event_id"] for event in found) == sorted(event["event_id"] for event in events)
        counts.append(manifest.events)
    assert all(0 < count < 142 for count in counts)
    assert manifest.filters.consultation_id == str(UUID(bytes=some.consultation_id))
    assert (manifest.filters.site, manifest.filters.event_type) == (some.site, None)
    assert manifest.filters.since == format_rfc3339(NOW_NS + 20_000)


@pytest.mark.parametrize("file_format", ExportFormat)
@pytest.mark.parametrize("wanted", [Selection(site="nowhere"), Selection(consultation_id=bytes(16))], ids=str)
def test_an_export_of_nothing_is_a_good_file(place: Path, file_format: ExportFormat, wanted: Selection) -> None:
    assert exported(place, file_format, wanted).events == 0
    assert read_back(place, file_format) == []
    assert check_export(manifest_path(place / NAMES[file_format])).ok


def test_a_payload_laid_out_in_lines_stays_on_its_line() -> None:
    event = msgspec.structs.replace(make_event(random.Random(1), 1), payload=b'{\r\n "a":\n "x\\ny"}')
    file = io.BytesIO()
    assert write_ndjson([StoredEvent(event, 0, 0)] * 2, file) == 2
    lines = file.getvalue().splitlines()
    assert [json.loads(line)["payload"] for line in lines] == [{"a": "x\ny"}] * 2


def test_csv_is_rfc_4180_with_the_payload_as_it_was_sent() -> None:
    payload = '{"q": "say \\"¿qué?\\", then",\n "f": "=1+1"}'.encode()
    traced = msgspec.structs.replace(make_event(random.Random(1), 1), payload=payload, traceparent="00-ab-cd-01")
    file = io.BytesIO()
    write_csv([StoredEvent(traced, 0, None)], file)
    text = file.getvalue().decode()
    assert text.startswith(",".join(CSV_COLUMNS) + "\r\n")
    assert text.endswith("\r\n")
    assert '"{""q"": ""say \\""¿qué?\\"", then"",' in text
    header, row = csv.reader(io.StringIO(text, newline=""))
    cells = dict(zip(header, row, strict=True))
    assert cells["payload"].encode() == payload
    assert (cells["leaf"], cells["traceparent"]) == ("", "00-ab-cd-01")
    fields = event_to_dict(traced, partition=0, leaf=3)
    assert set(CSV_COLUMNS) == {*fields, *fields["times"]} - {"times"}


def test_the_consultations_layout_has_counts_and_times_and_opens_with_stock_tools(place: Path) -> None:
    exported(place, ExportFormat.HDF5_CONSULTATIONS)
    path = place / "all.h5"
    by_id: dict[str, list[dict[str, Any]]] = {}
    for fields in expected(place):
        by_id.setdefault(fields["consultation_id"], []).append(fields)
    with h5py.File(path) as file:
        assert list(file["consultations"]) == sorted(by_id)
        for name, events in by_id.items():
            group = file[f"consultations/{name}"]
            assert h5py.check_string_dtype(group["events"].dtype) == ("utf-8", None)
            assert [json.loads(text)["event_id"] for text in group["events"].asstr()] == [
                event["event_id"] for event in events
            ]
            assert dict(group.attrs) == {
                "event_count": len(events),
                "created_at": events[0]["timestamp"],
                "updated_at": events[-1]["timestamp"],
            }
    if (tool := shutil.which("h5dump")) is not None:
        shown = subprocess.run([tool, "-H", path], capture_output=True, check=True, timeout=30, text=True).stdout
        assert shown.count('DATASET "events"') == len(by_id)
        assert "H5T_CSET_UTF8" in shown


def test_sorting_by_consultation_spills_what_exceeds_its_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(place, ExportFormat.HDF5_CONSULTATIONS)
    whole = read_groups(place / "all.h5")
    monkeypatch.setattr(consultations, "_RUN_BYTES", 10_000)
    monkeypatch.setattr(consultations, "_READ_BYTES", 100)
    monkeypatch.setattr(consultations, "_BATCH_BYTES", 3_000)
    exported(place, ExportFormat.HDF5_CONSULTATIONS)
    assert read_groups(place / "all.h5") == whole
    assert check_export(place / f"all.h5{MANIFEST_SUFFIX}").ok


def read_groups(path: Path) -> dict[str, tuple[list[str], dict[str, Any]]]:
    with h5py.File(path) as file:
        return {
            name: (group["events"].asstr()[()].tolist(), dict(group.attrs))
            for name, group in file["consultations"].items()
        }


def test_the_manifest_says_what_when_who_why_and_how_far(place: Path) -> None:
    manifest = exported(place, ExportFormat.CSV)
    identity = read_store(place / "shards")
    assert (manifest.store, manifest.cluster) == (identity.store_id, CLUSTER)
    assert (manifest.who, manifest.purpose, manifest.export_id) == ("ana", "audit 12", str(EXPORT_ID))
    assert (manifest.created, manifest.file) == (format_rfc3339(NOW_NS), "all.csv")
    assert manifest.bytes == (place / "all.csv").stat().st_size
    assert list(manifest.snapshot) == verify_store(place).partitions
    written = json.loads(manifest_path(place / "all.csv").read_bytes())
    assert written["format"] == "fi.export.1"
    assert written["sha256"] == file_sha256(place / "all.csv")
    assert sorted(name.name for name in place.iterdir()) == ["all.csv", "all.csv.manifest.json", "shards"]


def test_an_export_is_the_store_as_it_was_at_its_beginning_while_the_pipeline_writes(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path / "shards"), 3)
    maker.begin()
    maker.commit(5)
    finished = threading.Event()

    def fill() -> None:
        try:
            for _ in range(20):
                maker.commit(3)
                maker.commit(9)
                maker.seal()
                maker.begin()
        finally:
            finished.set()

    writer = threading.Thread(target=fill)
    writer.start()
    sizes = []
    while not finished.is_set():
        for file_format in ExportFormat:
            manifest = exported(tmp_path, file_format)
            (end,) = manifest.snapshot
            tree = MerkleFrontier()
            for event in maker.events[: manifest.events]:
                tree.append(leaf_hash(encode_event(event)))
            assert (end.tree_size, end.root) == (manifest.events, tree.root().hex())
            ids = [UUID(fields["event_id"]).bytes for fields in read_back(tmp_path, file_format)]
            assert ids == [event.event_id for event in maker.events[: manifest.events]]
            sizes.append(manifest.events)
    writer.join()
    maker.close()
    assert sizes == sorted(sizes)


def test_events_committed_after_the_snapshot_are_left_out(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 3)
    maker.begin()
    first = maker.commit(4)
    with EventStore(tmp_path) as store:
        ends = store.ends()
        maker.commit(3)
        other = PartitionMaker(maker.store, 4)
        other.begin()
        assert [stored.event for stored in store.select(ALL, ends)] == first
        maker.seal()
        assert [stored.event for stored in store.select(ALL, ends)] == first
    maker.close()
    other.close()


class Interrupted(BaseException):
    pass


def broken(found: Iterator[StoredEvent], error: BaseException) -> Iterator[StoredEvent]:
    for number, stored in enumerate(found):
        if number == 20:
            raise error
        yield stored


@pytest.mark.parametrize("file_format", ExportFormat)
@pytest.mark.parametrize("before", [None, b"an earlier export"], ids=["new", "replacing"])
@pytest.mark.parametrize(
    ("failing", "raised"),
    [
        (Interrupted, Interrupted),
        (lambda: OSError(28, "No space left"), OutputError),
        (lambda: ShardCorruptError("x"), ShardCorruptError),
    ],
    ids=["interrupted", "disk full", "corrupt"],
)
def test_an_export_that_fails_leaves_nothing_under_the_name_but_what_was_there(
    place: Path,
    file_format: ExportFormat,
    before: bytes | None,
    failing: Callable[[], BaseException],
    raised: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    select, error = EventStore.select, failing()
    monkeypatch.setattr(EventStore, "select", lambda *given: broken(select(*given), error))
    output = place / NAMES[file_format]
    if before is not None:
        output.write_bytes(before)
    with pytest.raises(raised):
        exported(place, file_format)
    assert {path.name for path in place.iterdir()} == {"shards"} | ({output.name} if before else set())
    assert before is None or output.read_bytes() == before


@pytest.mark.parametrize("is_store", [True, False])
def test_what_cannot_be_read_of_the_store_is_not_called_the_outputs_disk(
    place: Path, monkeypatch: pytest.MonkeyPatch, is_store: bool
) -> None:
    named = place / "shards" / "p003-00000004.live.h5" if is_store else place / "tmpspill"
    select, error = EventStore.select, OSError(errno.EIO, os.strerror(errno.EIO), str(named))
    monkeypatch.setattr(EventStore, "select", lambda *given: broken(select(*given), error))
    with pytest.raises((OSError, OutputError)) as raised:
        exported(place, ExportFormat.NDJSON)
    assert (raised.value is error) is is_store


def test_hdf5_does_not_begin_on_a_disk_without_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
    with pytest.raises(OutputError, match="No space left on device, it needs about 1"):
        exported(place, ExportFormat.HDF5_CONSULTATIONS)
    assert [path.name for path in place.iterdir()] == ["shards"]


def test_a_manifest_of_an_earlier_export_never_lies_beside_a_new_file(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(place, ExportFormat.CSV)
    publish = write.publish_file

    def die_before_the_manifest(tmp: Path, final: Path) -> None:
        if final.name.endswith(MANIFEST_SUFFIX):
            raise Interrupted
        publish(tmp, final)

    monkeypatch.setattr(write, "publish_file", die_before_the_manifest)
    with pytest.raises(Interrupted):
        exported(place, ExportFormat.CSV, Selection(site=SITES[0]))
    assert find_manifest(place / "all.csv") is None


def test_a_name_that_cannot_be_an_exports_is_refused(place: Path) -> None:
    live = next((place / "shards").glob("*.live.h5")).name
    kept = {path: path.read_bytes() for path in (place / "shards").iterdir()}
    with EventStore(place) as store:
        shards = place / "shards"
        used = (shards / live, shards / "store.json", shards / BACKUP_FILE, place / "a.csv.manifest.json")
        for output in (*used, place, place / "no" / "where.csv"):
            with pytest.raises(SettingsError, match=r"choose another|name a file"):
                export_file(
                    store,
                    output,
                    file_format=ExportFormat.CSV,
                    wanted=ALL,
                    who="",
                    purpose="",
                    export_id=EXPORT_ID,
                    now_ns=NOW_NS,
                )
        with pytest.raises(SettingsError, match="--output"):
            export_stream(store, io.BytesIO(), file_format=ExportFormat.HDF5_CONSULTATIONS, wanted=ALL)
    assert {path: path.read_bytes() for path in (place / "shards").iterdir()} == kept


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    maker = PartitionMaker(new_store(tmp_path), 3)
    maker.begin(capacity_bytes=4 << 20)
    maker.commit(3500)
    maker.close()
    for file_format in ExportFormat:
        told: list[float] = []
        exported(tmp_path, file_format, on_progress=told.append)
        assert len(told) >= 4
        assert told == sorted(told)
        assert told[0] < 0.5
        # It is read once more.
        assert told[2] <= 0.9 < told[-2]
        assert told[-1] == 1.0


def test_ends_are_unknown_where_the_partition_does_not_begin_here(place: Path) -> None:
    for path in (place / "shards").glob("p003-*"):
        if not path.name.endswith(".live.h5"):
            path.unlink()
    with EventStore(place) as store:
        three, five = store.ends()
    assert three.origin is not None
    assert (three.tree_size, three.root) == (None, None)
    assert five.tree_size == 51


def test_selected_consultation_is_the_same_from_live_and_sealed_shards(place: Path) -> None:
    with EventStore(place) as store:
        events: list[Event] = [stored.event for stored in store.iterate()]
        for consultation_id in {event.consultation_id for event in events}:
            found = store.select(Selection(consultation_id=consultation_id, event_type="URGENCY_CLASSIFIED"))
            assert [stored.event for stored in found] == [
                event
                for event in events
                if event.consultation_id == consultation_id and event.event_type == "URGENCY_CLASSIFIED"
            ]
