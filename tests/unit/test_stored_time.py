"""When FI_EVENTS stored the message that a sealed shard ends with, by the shard."""

from __future__ import annotations

from pathlib import Path

from shard_maker import filled_store

from cluster.testing.disk import flip
from stages.persist.names import list_shards
from stages.persist.trim import stored_ns_at


def test_the_last_event_of_the_shard_that_ends_there_tells_it(tmp_path: Path) -> None:
    _, maker = filled_store(tmp_path)
    sealed = [file for file in list_shards(tmp_path)[3] if file.sealed]
    paths = tuple(file.path for file in sealed)
    times = {event.origin: event.accepted_ns for event in maker.events}
    for file in sealed:
        assert file.last_origin is not None
        assert stored_ns_at(paths, file.last_origin) == times[file.last_origin]
        assert stored_ns_at(paths, file.last_origin - 1) == 0


def test_a_shard_that_cannot_be_read_tells_nothing(tmp_path: Path) -> None:
    filled_store(tmp_path)
    first = next(file for file in list_shards(tmp_path)[3] if file.sealed)
    flip(first.path, 100)
    assert stored_ns_at((first.path,), first.last_origin or 0) == 0
    first.path.unlink()
    assert stored_ns_at((first.path,), first.last_origin or 0) == 0
