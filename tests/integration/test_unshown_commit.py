"""A commit is shown just after its receipt; a persister that is killed in between shows it when it starts."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from commands import fictl_at
from lanes import going
from nats.aio.client import Client
from pipeline import until
from test_persist_lane import new_store, ready, stored

from cluster.audit import audit_store
from stages.persist.disk import LOCAL
from stages.persist.partition import PartitionFiles
from stages.runtime.access import Servers
from stages.runtime.tasks import end_tasks

pytestmark = pytest.mark.cluster


async def test_a_kill_between_a_receipt_and_its_show_is_told_of_and_is_no_corruption(
    client: Client, cluster_urls: tuple[str, ...], tmp_path: Path
) -> None:
    cluster = await ready(client)
    store = await new_store(client, tmp_path / "store")
    killed = threading.Event()

    def opened(*arguments: Any) -> PartitionFiles:
        files = PartitionFiles.open(*arguments)
        show = files.accepted
        files.accepted = lambda: None if killed.is_set() else show()  # type: ignore[method-assign]
        return files

    def all_is_shown() -> bool:
        return stored(store) == set(cluster.accepted)

    async with cluster.upstream():
        task = asyncio.create_task(cluster.persist(store, LOCAL._replace(open=opened)).run())
        await cluster.publish(1)
        await until(all_is_shown, "the first commit is shown")
        killed.set()
        await cluster.publish(1)
        await end_tasks(task)
    assert not all_is_shown()

    report = await audit_store(store.directory, Servers(cluster_urls))
    assert report.store.problems == []
    assert list(report.unshown) == [0]
    code, out, err = await fictl_at(cluster_urls, "verify", str(store.directory), "--receipts")
    assert (code, err) == (0, "")
    assert "all is well" in out
    assert f"partition 0: {report.unshown[0]}" in out

    async with going(cluster.persist(store, seal_on_drain=False)):
        await until(all_is_shown, "persist has started")
    assert (await audit_store(store.directory, Servers(cluster_urls))).unshown == {}
