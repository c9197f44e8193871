"""The process that reads files for `fictl verify`, under what a terminal does to both."""

from __future__ import annotations

import signal
from pathlib import Path

from shard_maker import filled_store

from stages.persist.names import list_shards
from stages.persist.verify import _Worker


def test_ctrl_c_at_a_terminal_is_left_to_the_process_that_asks(tmp_path: Path) -> None:
    """Both are given it; the one that reads would print where it was."""
    store, maker = filled_store(tmp_path)
    path = list_shards(store.directory)[maker.partition][0].path
    worker = _Worker()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        worker._start().send_signal(signal.SIGINT)
        check = worker.ask(path, 60)
        assert (check.findings, check.events) == ([], 28)
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        worker.stop()
        signal.signal(signal.SIGINT, before)
