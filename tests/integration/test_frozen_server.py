"""Commands while one of three servers is frozen: what works then is not told as a failure."""

from __future__ import annotations

from pathlib import Path

import pytest
from pipeline import fictl, running, settings

from contracts.subjects import CONTROL

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]


async def test_commands_that_work_beside_a_frozen_server_say_so(tmp_path: Path) -> None:
    async with running(tmp_path, settings()) as pipeline:
        # The one that is asked most: the bucket's leader.
        info = await pipeline.client.jetstream(timeout=30).stream_info(CONTROL)
        assert info.cluster is not None
        frozen = str(info.cluster.leader)
        pipeline.supervisor.freeze(frozen)
        try:
            for arguments in (
                ("pause", "hash", "--wait", "60"),
                ("resume", "hash", "--wait", "60"),
                ("scale", "segment=2", "--wait", "60"),
                ("policy", "set", "closed_remembered=7", "--timeout", "60"),
            ):
                code, answer, err = await fictl(pipeline, *arguments)
                assert code == 0, f"{arguments}: {err}"
                assert answer["settled"], arguments
            for _ in range(2):
                code, answer, err = await fictl(pipeline, "members")
                assert code == 0, err
                assert len(answer["members"]) == 5
        finally:
            pipeline.supervisor.thaw(frozen)
