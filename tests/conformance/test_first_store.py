"""Shards of the first format, written once and never changed, are read by this build to the last byte."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from stages.persist.export.formats import write_ndjson
from stages.persist.store import EventStore
from stages.persist.verify import verify_store

STORE = Path(__file__).parent / "stores" / "first"
KEY = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
"""The key that its seal record is signed with."""


def test_the_first_format_still_verifies_against_the_key_that_signed_it() -> None:
    report = verify_store(STORE, trusted=[KEY])
    assert (report.problems, report.shards, report.events) == ([], 2, 6)
    assert (report.seal_records, report.signed_records) == (1, 1)


def test_the_first_format_gives_the_same_export_as_when_it_was_written(tmp_path: Path) -> None:
    """From a copy, so that nothing could be written beside the kept one."""
    kept = STORE.with_name("first.ndjson").read_bytes()
    found = io.BytesIO()
    with EventStore(shutil.copytree(STORE, tmp_path / "store")) as store:
        write_ndjson(store.iterate(), found)
    assert found.getvalue() == kept
