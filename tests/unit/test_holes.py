"""An input that begins with a hole however often it is emptied."""

from __future__ import annotations

from typing import Any, cast

import pytest

from contracts.errors import HoleError, StrayFrameError, WireFormatError
from contracts.settings import Settings
from stages.runtime import base
from stages.runtime.base import STRAYS_MAX, LaneBase
from stages.runtime.telemetry import OFF


class EmptiedApi:
    """Counts what is emptied, of a stream that nothing is stored in for good."""

    settings = Settings(probe_s=0.001)
    telemetry = OFF

    def __init__(self) -> None:
        self.purged = 0

    async def pause(self) -> None:
        """No time passes."""

    async def purge(self, stream: str, subject: str) -> None:
        self.purged += 1


class Lane(LaneBase):
    """Meets a hole in every session but the fifth, in which it is told to stop."""

    async def _session(self, nonce: str) -> None:
        if self._sessions == 5:
            self.stop()
            return
        raise HoleError("fi.hash.0", 1, 2)

    async def _check_output(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(("holes", "purges"), [(1, 0), (2, 0), (3, 1), (4, 1), (5000, 1)])
async def test_a_hole_is_emptied_out_at_the_third_attempt_and_at_the_five_thousandth(
    holes: int, purges: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_receipt(api: object, partition: int) -> tuple[None, int]:
        return None, 0

    monkeypatch.setattr(base, "last_receipt", no_receipt)
    api = EmptiedApi()
    lane = Lane(cast(Any, api), "hash", 0, "nonce", lambda partition: None)
    lane._holes = holes
    await lane._heal_hole()
    assert api.purged == purges


async def test_what_gateways_published_is_never_emptied_whatever_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`FI_EVENTS` cannot be made again from anything."""

    async def no_receipt(api: object, partition: int) -> tuple[None, int]:
        return None, 0

    monkeypatch.setattr(base, "last_receipt", no_receipt)
    api = EmptiedApi()
    lane = Lane(cast(Any, api), "ingest", 0, "nonce", lambda partition: None)
    lane._holes = 5000
    await lane._heal_hole()
    assert api.purged == 0


@pytest.mark.parametrize(
    ("subject", "attempts", "heals"),
    [("fi.hash.0", 0, True), ("fi.hash.0", STRAYS_MAX - 1, True), ("fi.hash.0", STRAYS_MAX, False),
     ("fi.persist.0", 0, False), ("fi.hash.1", 0, False)],
)  # fmt: skip
async def test_what_is_no_frame_is_a_hole_in_the_input_alone_and_not_for_ever(
    subject: str, attempts: int, heals: bool
) -> None:
    lane = Lane(cast(Any, EmptiedApi()), "hash", 0, "nonce", lambda partition: None)
    lane._holes = attempts
    assert await lane._is_hole(StrayFrameError(subject, 7, "it is no frame")) is heals
    assert lane._holes == attempts + heals


async def test_a_receipt_that_cannot_be_read_while_a_hole_is_healed_does_not_end_the_lane(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def unreadable(api: object, partition: int) -> tuple[None, int]:
        raise WireFormatError("of a later version")

    monkeypatch.setattr(base, "last_receipt", unreadable)
    lane = Lane(cast(Any, EmptiedApi()), "hash", 0, "nonce", lambda partition: None)
    lane._holes = 2
    await lane.run()
    assert lane._sessions == 5
