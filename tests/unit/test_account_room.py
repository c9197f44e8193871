"""What an account may hold is told where it is used up, however much room its streams have."""

from __future__ import annotations

import msgspec
import pytest
from overviews import overview, with_streams

from cluster.status import Allowance, ClusterStatus
from cluster.summary import summarize
from cluster.verdict import judge


@pytest.mark.parametrize(
    ("what", "used", "told", "urgency"),
    [
        ("storage", 10**9, "storage is full: 1.0 GB of 1.0 GB, over all of its streams; gateways are refused", 1),
        ("memory R3", 2 * 10**9, "memory R3 is full: 2.0 GB of 1.0 GB, over all of its streams; hops in memory", 1),
        ("storage", 9 * 10**8, "storage is 90% full: 900 MB of 1.0 GB, over all of its streams", 5),
    ],
)
def test_an_account_without_room_is_told(what: str, used: int, told: str, urgency: int) -> None:
    (problem,) = judge(summarize([overview(allowances=(Allowance(what=what, bytes=used, bytes_max=10**9),))]))
    assert problem.what.startswith(f"the account's {told}")
    assert problem.urgency == urgency
    assert ("`max_file`" if what == "storage" else "`max_mem`") in problem.next


def test_a_cluster_is_well_only_while_its_account_has_room() -> None:
    seen = overview()
    well = ClusterStatus(servers=seen.servers, streams=with_streams(), facts=seen.facts)
    allowance = Allowance(what="storage", bytes=90, bytes_max=100)
    assert well.healthy
    assert msgspec.structs.replace(well, allowances=(allowance,)).healthy
    full = msgspec.structs.replace(allowance, bytes=100)
    assert not msgspec.structs.replace(well, allowances=(full,)).healthy
