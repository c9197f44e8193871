"""What a power cut must not take while files are given up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from shard_maker import NOW_NS
from test_aside import damage_row, found, live_of, look
from witnessed import Witnessed, events_of

from stages.persist import files
from stages.persist.aside import ASIDE, prepare_aside, set_aside


def test_the_old_live_shard_gives_up_its_name_only_when_all_of_it_and_what_stays_of_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power cut could leave neither what was given up nor what was kept."""
    maker = Witnessed(tmp_path / "store")
    maker.fill(*events_of(maker))
    back = look(maker, damage_row(maker))
    moving = found(maker, back)
    happened: list[str] = []

    def note(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(first: Any, *others: Any) -> Any:
            path = Path(os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first)
            happened.append(f"{name} {path.name}")
            return real(first, *others)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((os, "pwrite"), (os, "link"), (os, "rename"), (os, "fsync"), (files, "_fdatasync")):
        note(owner, name)
    prepare_aside(maker.store, moving, back.end)
    set_aside(maker.store, moving, back.end, NOW_NS)
    live = live_of(maker).name
    linked = happened.index(f"link {live}")
    named = happened.index(f"rename {live}.tmp", linked)
    kept = [one for one in happened[:named] if one.endswith(f" {live}.tmp")]
    assert kept[-1].startswith("_fdatasync")
    assert happened[linked:named] == [f"link {live}", f"fsync {ASIDE}"]
