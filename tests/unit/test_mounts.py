"""What a directory is mounted with is read from the kernel's table, by device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.cli import config
from cluster.mounts import Mount, mount_of


def table_of(directory: Path, *, device: str | None = None, options: str = "rw,discard") -> Path:
    number = directory.stat().st_dev
    device = device or f"{os.major(number)}:{os.minor(number)}"
    table = directory / "mountinfo"
    table.write_text(
        "22 1 0:21 / /proc rw - proc proc rw\n"
        f"25 1 {device} / /a\\040b rw,relatime shared:1 - ext4 /dev/x {options}\n"
        "half a line\n"
    )
    return table


def test_the_line_of_its_device_says_what_a_directory_is_mounted_with(tmp_path: Path) -> None:
    assert mount_of(tmp_path, table_of(tmp_path)) == Mount("ext4", ("rw", "discard"))


def test_what_is_not_in_the_table_is_not_known(tmp_path: Path) -> None:
    assert mount_of(tmp_path, table_of(tmp_path, device="9999:9")) is None
    assert mount_of(tmp_path, tmp_path / "no-such-table") is None


@pytest.mark.parametrize(("options", "advised"), [("rw,discard", True), ("rw", False)])
def test_the_check_of_the_store_advises_against_discard(
    tmp_path: Path, options: str, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(tmp_path, options=options)
    monkeypatch.setattr("cluster.mounts.mount_of", lambda path: mount_of(path, table))
    assert ("fstrim.timer" in config._look_at_disk(tmp_path, 1)) is advised
