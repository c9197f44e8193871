"""A stream in memory that nobody leads, or that is gone, is made again; nothing else ever is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import pytest
from nats.errors import TimeoutError as NatsTimeoutError

from contracts.budgets import LEADER_GONE
from contracts.settings import Settings
from contracts.subjects import SEGMENT
from stages.runtime.remake import Remaker

HEADLESS = {"created": "t1", "config": {"name": SEGMENT, "storage": "memory"}, "cluster": {}}
LED = HEADLESS | {"cluster": {"leader": "n1"}}
GONE = {"error": {"code": 404, "err_code": 10059, "description": "stream not found"}}


class Answer(NamedTuple):
    data: bytes


class Script:
    """Answers requests as scripted, one look after the other; None: nobody answers."""

    def __init__(self, answers: Sequence[dict[str, Any] | bytes | None]) -> None:
        self.settings = Settings()
        self.client = self
        self.asked: list[str] = []
        self.created: list[Any] = []
        self._answers = list(answers)

    async def request(self, subject: str, body: bytes, timeout: float) -> Answer:
        self.asked.append(subject.split(".")[3])
        if subject.startswith("$JS.API.STREAM.CREATE"):
            self.created.append(msgspec.json.decode(body))
        answer = self._answers.pop(0) if subject.startswith("$JS.API.STREAM.INFO") else {}
        if answer is None:
            raise NatsTimeoutError
        return Answer(answer if isinstance(answer, bytes) else msgspec.json.encode(answer))


async def script(*answers: tuple[float, dict[str, Any] | bytes | None]) -> Script:
    """What (seconds, answer to INFO) did, one after the other."""
    api = Script([answer for _, answer in answers])
    now_s = [0.0]
    remaker = Remaker(api, (SEGMENT,), lambda: now_s[0])  # type: ignore[arg-type]
    for now_s[0], _ in answers:
        await remaker.look(SEGMENT)
    return api


async def looked(*answers: tuple[float, dict[str, Any] | bytes | None]) -> list[str]:
    """What was asked then, without the INFOs."""
    return [verb for verb in (await script(*answers)).asked if verb != "INFO"]


LATE = LEADER_GONE.s + 1


async def test_a_stream_in_memory_without_a_leader_is_made_again() -> None:
    assert await looked((0, HEADLESS), (LEADER_GONE.s - 1, HEADLESS)) == []
    assert await looked((0, HEADLESS), (LATE, HEADLESS)) == ["DELETE", "CREATE"]


@pytest.mark.parametrize(
    "between",
    [
        LED,
        None,
        {"config": 5},
        b'{"created": "\xff"}',
        HEADLESS | {"created": "t2"},
        {"error": {"code": 503, "err_code": 10008}},
    ],
    ids=[
        "led again",
        "nobody answers",
        "not understood",
        "no text",
        "another of the name",
        "the cluster has no leader",
    ],
)
async def test_its_time_begins_anew_when(between: dict[str, Any] | bytes | None) -> None:
    last = between if isinstance(between, dict) and between.get("created") == "t2" else HEADLESS
    assert await looked((0, HEADLESS), (LATE, between), (LATE + 1, last)) == []


@pytest.mark.parametrize(
    "info",
    [
        HEADLESS | {"config": {"name": SEGMENT, "storage": "file"}},
        {key: HEADLESS[key] for key in ("created", "config")},
    ],
    ids=["on disk", "of one server"],
)
async def test_a_stream_is_left_alone_that_is(info: dict[str, Any]) -> None:
    assert await looked((0, info), (LATE, info), (2 * LATE, info)) == []


@pytest.mark.parametrize("seen", [LED, HEADLESS, LED | {"cluster": None}], ids=["led", "headless", "of one server"])
async def test_one_that_is_gone_at_two_looks_is_created(seen: dict[str, Any]) -> None:
    assert await looked((0, seen), (1, GONE)) == []
    assert await looked((0, seen), (1, GONE), (2, GONE)) == ["CREATE"]


@pytest.mark.parametrize(
    "between", [LED, None, {"error": {"code": 503, "err_code": 10008}}], ids=["there", "nobody answers", "no leader"]
)
async def test_two_looks_are_one_after_the_other(between: dict[str, Any] | None) -> None:
    assert await looked((0, LED), (1, GONE), (2, between), (3, GONE)) == []


@pytest.mark.parametrize(
    "before",
    [[], [LED | {"config": {"name": SEGMENT, "storage": "file"}}], [LED, LED | {"config": {"storage": "file"}}]],
    ids=["never seen", "on disk", "on disk now"],
)
async def test_one_is_not_created_that_was(before: list[dict[str, Any]]) -> None:
    assert await looked(*[(0, info) for info in before], (1, GONE), (2, GONE), (3, GONE)) == []


async def test_it_is_made_as_it_was_last_without_what_servers_put_there_themselves() -> None:
    before, after = ({"name": SEGMENT, "storage": "memory", "max_bytes": number} for number in (1, 2))
    words = {"fi.layout": "1", "_nats.ver": "2.15.1", "_nats.level": "1"}
    seen = [LED | {"config": config | {"metadata": words}} for config in (before, after)]
    api = await script((0, seen[0]), (1, seen[1]), (2, GONE), (3, GONE))
    assert api.created == [after | {"metadata": {"fi.layout": "1"}}]


async def test_what_somebody_set_by_hand_that_only_a_new_stream_is_rid_of_is_not_set_again() -> None:
    """None can be made that is sealed."""
    by_hand = {"sealed": True, "deny_purge": True, "allow_msg_ttl": True}
    seen = {**LED, "config": {"name": SEGMENT, "storage": "memory", "max_bytes": 5, **by_hand}}
    api = await script((0, seen), (1, GONE), (2, GONE))
    assert api.created == [{"name": SEGMENT, "storage": "memory", "max_bytes": 5, "metadata": {}}]
