"""What a pipeline leaves behind in memory once it has ended: nothing.

Some structs are not tracked by the garbage collector, for speed. A cycle through one of them is never collected: a
refused event that was kept as it was raised held the frames, the messages and the process around it for good.
"""

from __future__ import annotations

import gc

from cluster.testing.sim.run import simulate
from stages.runtime.process import StageProcess


def test_a_run_in_which_events_are_refused_leaves_no_process_behind() -> None:
    for seed in range(1, 4):
        assert simulate(seed).ok
    gc.collect()
    assert not [left for left in gc.get_objects() if isinstance(left, StageProcess)]
