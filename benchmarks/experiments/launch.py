"""Runs a stage with one of our choices switched off that no setting switches; for the ablation alone.

``python -I benchmarks/experiments/launch.py [SWITCH ...] -- run STAGE ...``: what follows the dashes is `fictl`'s.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable


def _no_uvloop() -> None:
    import uvloop

    vars(uvloop)["new_event_loop"] = asyncio.SelectorEventLoop


def _rare_gc() -> None:
    gc.set_threshold(50_000, 20, 50)


def _no_fdatasync() -> None:
    os.fdatasync = lambda fd: None


SWITCHES: dict[str, Callable[[], None]] = {
    "no-uvloop": _no_uvloop,
    "no-gc": gc.disable,
    "rare-gc": _rare_gc,
    "no-fdatasync": _no_fdatasync,
}


def main(arguments: list[str]) -> None:
    """Throws the switches before anything of ours is imported, then runs the verb. Raises `KeyError`, `ValueError`."""
    at = arguments.index("--")
    for switch in arguments[:at]:
        SWITCHES[switch]()
    from cluster.cli import main as fictl

    fictl(arguments[at + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])
