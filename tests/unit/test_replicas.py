"""When a follower of a stream counts as current."""

from __future__ import annotations

import pytest
from nats.js.api import PeerInfo

from cluster.status import LAG_USUAL_MAX, keeps_up
from contracts.budgets import FOLLOWER_HEARD

SILENT_NS = int(FOLLOWER_HEARD.s * 1e9)


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (PeerInfo(current=True, active=500_000_000), True),
        (PeerInfo(current=False, active=500_000_000, lag=1), True),
        (PeerInfo(current=False, active=500_000_000, lag=LAG_USUAL_MAX), True),
        (PeerInfo(current=False, active=500_000_000, lag=LAG_USUAL_MAX + 1), False),
        (PeerInfo(current=False, active=SILENT_NS, lag=1), False),
        (PeerInfo(current=False, active=SILENT_NS), False),
        (PeerInfo(current=False, offline=True, active=0), False),
    ],
    ids=["has all", "lacks one", "lacks what is usual", "lacks more", "silent", "silent and idle", "never seen"],
)
def test_a_follower_keeps_up_while_it_is_heard_and_lacks_no_more_than_is_under_way(
    peer: PeerInfo, expected: bool
) -> None:
    assert keeps_up(peer) is expected
