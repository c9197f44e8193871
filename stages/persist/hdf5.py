"""Making HDF5 files: one place for the format that every stock reader opens, and for what HDF5 does on a full disk."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import h5py

from stages.persist.header import HEADER_BYTES

_LIBVER = ("earliest", "v110")
"""HDF5 2.0's own format is not readable by the 1.10 tools."""


@contextlib.contextmanager
def new_hdf5(
    path: Path, *, user_block_bytes: int = HEADER_BYTES, align_from_bytes: int = 1, align_to_bytes: int = 1
) -> Iterator[h5py.File]:
    """A new HDF5 file; replaces what is at `path`. Closed, not synced, at the end.

    Args:
        path: a temporary name.
        user_block_bytes: room before it, by default that for our header; 0 for none.
        align_from_bytes, align_to_bytes: datasets of at least that size begin at multiples of the other.

    Raises:
        OSError: the disk refused. HDF5 reports a failed write as a plain `RuntimeError` where it happens in its cache,
            above all while closing; that comes out as `OSError` too.
    """
    try:
        with h5py.File(
            path,
            "w",
            libver=_LIBVER,
            userblock_size=user_block_bytes,
            alignment_threshold=align_from_bytes,
            alignment_interval=align_to_bytes,
        ) as file:
            yield file
    except RuntimeError as error:
        raise OSError(errno.EIO, f"HDF5 could not write: {error}", str(path)) from error
