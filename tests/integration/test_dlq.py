"""Dead letters on real clusters: what is removed stays removed, what is replayed is stored once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
import pytest_asyncio
from commands import fictl_at
from pipeline import Pipeline, running, settings, until
from test_pipeline import TRACE, event

from cluster.dlq import DeadLetters
from contracts.errors import ClusterUnavailableError
from contracts.events import derive_event_id
from contracts.subjects import DLQ, EVENTS
from contracts.telemetry import DEAD_INDEX, DEAD_ORIGIN, HEADER_MSG_ID, HEADER_TRACEPARENT
from stages.runtime.facts import read_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

NAMES = (str(UUID(int=n, version=4)) for n in range(1000, 2000))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    """The servers remember message ids for as long as the tests take."""
    async with running(tmp_path_factory.mktemp("dlq"), settings(partitions=2, dedup_window_s=600.0)) as started:
        yield started


async def dead_letters(pipeline: Pipeline) -> DeadLetters:
    return DeadLetters(pipeline.api, (await read_cluster(pipeline.client)).cluster_id)


async def publish(pipeline: Pipeline, site: str, consultation: str, *events: dict[str, Any] | bytes) -> list[int]:
    """Publishes each as a gateway does; gives the origins."""
    origins = []
    for body in events:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {HEADER_TRACEPARENT: TRACE}
        if isinstance(body, dict) and "event_id" in body:
            headers[HEADER_MSG_ID] = body["event_id"]
        subject = f"fi.events.{site}.{consultation}"
        ack = await pipeline.client.jetstream(timeout=30).publish(subject, data, headers=headers)
        assert not ack.duplicate
        origins.append(ack.seq)
    return origins


def parsed(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


async def listed(pipeline: Pipeline, *filters: str) -> list[dict[str, Any]]:
    code, out, err = await fictl_at(pipeline.supervisor.urls, "dlq", "ls", "--json", *filters)
    assert code == 0, err
    return parsed(out)


async def held(pipeline: Pipeline, stream: str) -> tuple[int, int, int]:
    """Messages, first and last sequence."""
    state = (await pipeline.client.jetstream(timeout=30).stream_info(stream)).state
    return state.messages, state.first_seq, state.last_seq


async def left(pipeline: Pipeline, count: int, *filters: str) -> list[dict[str, Any]]:
    """What is listed once it is so many: a listing may be a moment behind a deletion."""
    rows: list[dict[str, Any]] = []

    async def reached() -> bool:
        rows[:] = await listed(pipeline, *filters)
        return len(rows) == count

    await until(reached, f"{count} letters are listed with {filters}", 60)
    return rows


async def closed_consultation(pipeline: Pipeline, site: str, *late: dict[str, Any]) -> str:
    """A committed consultation, and events that segment refuses because they came after. Gives its id."""
    consultation = next(NAMES)
    commit = event(consultation, 10, event_type="CONSULTATION_COMMITTED", payload={"soap_data": {}})
    await publish(pipeline, site, consultation, commit, *({"consultation_id": consultation, **body} for body in late))
    await pipeline.settled()
    return consultation


async def reopen(pipeline: Pipeline, site: str, consultation: str) -> None:
    await publish(pipeline, site, consultation, event(consultation, 11, event_type="CONSULTATION_RESET"))
    await pipeline.settled()


def late_event(number: int, **changes: Any) -> dict[str, Any]:
    body = event(str(UUID(int=5, version=4)), number)
    del body["consultation_id"], body["event_id"]
    return {**body, **changes}


async def test_letters_are_listed_counted_shown_and_dropped(pipeline: Pipeline, tmp_path: Path) -> None:
    consultation, odd = next(NAMES), "not-a-uuid"
    good = event(consultation, 1)
    await publish(pipeline, "clinic-a", consultation, b"this is no JSON", b"nor \x1b[31mthis", good)
    await publish(pipeline, "clinic-a", consultation, event(consultation, 2, event_type="EATEN"))
    await publish(pipeline, "clinic-b", consultation, event(consultation, 3, payload={"message_content": 1}))
    await publish(pipeline, "clinic-b", odd, b'{"consultation_id":"not-a-uuid"}')
    lines = [json.dumps(event(consultation, n)).encode() for n in (5, 6)]
    (origin,) = await publish(pipeline, "clinic-b", consultation, b"\n".join([lines[0], b'{"broken"', lines[1]]))
    totals = await pipeline.settled()
    urls = pipeline.supervisor.urls

    rows = await listed(pipeline)
    reasons = [row["reason"] for row in rows]
    assert sorted(reasons) == sorted(
        ["json.malformed", "json.malformed", "event_type.unknown", "payload.type", "field.missing", "json.malformed"]
    )
    assert totals.dead_lettered == len(rows)
    code, out, _ = await fictl_at(urls, "dlq", "ls", "--summary", "--json")
    summary = json.loads(out)
    assert (code, summary["letters"]) == (0, 6)
    assert summary["by_reason"][0] == {"stage": "ingest", "reason": "json.malformed", "letters": 3}
    assert [row["reason"] for row in await listed(pipeline, "--stage", "segment")] == ["payload.type"]
    assert len(await listed(pipeline, "--reason", "json")) == 3
    assert len(await listed(pipeline, "--site", "clinic-b")) == 3
    assert len(await listed(pipeline, "--site", "clinic-b", "--reason", "json")) == 1
    partitions = [await listed(pipeline, "--partition", str(number)) for number in (0, 1)]
    assert sorted(row["seq"] for part in partitions for row in part) == [row["seq"] for row in rows]
    assert await listed(pipeline, "--until", "1h") == []
    assert await listed(pipeline, "--since", "1h") == rows
    assert await listed(pipeline, "--since", rows[3]["time"]) == rows[3:]
    assert await listed(pipeline, "--until", rows[3]["time"]) == rows[:4]
    assert await listed(pipeline, "--limit", "2") == rows[-2:]
    code, out, err = await fictl_at(urls, "dlq", "ls", "--limit", "2")
    assert code == 0
    assert "newest 2 of 6" in err
    assert "3 ingest   json.malformed" in out
    assert "\x1b" not in out

    code, out, _ = await fictl_at(urls, "dlq", "ls")
    assert code == 0
    assert "\x1b" not in out
    (line,) = await listed(pipeline, "--site", "clinic-b", "--reason", "json")
    assert (line["origin"], line["index"]) == (origin, 1)
    code, out, _ = await fictl_at(urls, "dlq", "show", str(line["seq"]), "--raw")
    assert (code, out) == (0, '{"broken"')
    (bad,) = await listed(pipeline, "--stage", "segment")
    code, out, _ = await fictl_at(urls, "dlq", "show", str(bad["seq"]))
    assert code == 0
    for text in ("segment partition", "payload.type", TRACE.split("-")[1], '"message_content": 1', "next: "):
        assert text in out
    shown = json.loads((await fictl_at(urls, "dlq", "show", str(bad["seq"]), "--json"))[1])
    assert json.loads(shown["body"]) == event(consultation, 3, payload={"message_content": 1})
    assert (await fictl_at(urls, "dlq", "show", "999"))[0] == 1

    code, _, err = await fictl_at(urls, "dlq", "drop", "--yes")
    assert code == 2
    assert "--all" in err
    assert (await fictl_at(urls, "dlq", "drop", "--all"))[0] == 2, "nobody is there to be asked"
    before = [await held(pipeline, stream) for stream in (DLQ, EVENTS)]
    code, out, _ = await fictl_at(urls, "dlq", "drop", "--reason", "json", "--dry-run", "--json")
    assert (code, json.loads(out)) == (0, {"matched": 3, "dropped": 0, "missing": [], "dry_run": True})
    code, out, _ = await fictl_at(urls, "dlq", "replay", "--all", "--dry-run", "--json")
    report = json.loads(out)
    assert code == 1
    assert (report["matched"], report["replayed"], len(report["refused"])) == (6, 5, 1)
    assert "not a UUID" in report["refused"][0]["why"]
    assert [await held(pipeline, stream) for stream in (DLQ, EVENTS)] == before

    output = tmp_path / "dropped.ndjson"
    drop = ("dlq", "drop", "--reason", "json", "--yes", "--output", str(output), "--why", "noise", "--erase")
    code, out, _ = await fictl_at(urls, *drop)
    assert (code, out) == (0, "3 letters dropped\n")
    kept = parsed(output.read_text())
    # The last one may be of another partition, and of another moment.
    assert sorted(row["body"] for row in kept) == ["nor \x1b[31mthis", "this is no JSON", '{"broken"']
    assert {row["why"] for row in kept} == {"noise"}
    await left(pipeline, 3)
    code, out, _ = await fictl_at(urls, "dlq", "drop", str(kept[0]["seq"]), "--yes", "--json")
    assert (code, json.loads(out)["missing"]) == (1, [kept[0]["seq"]])
    assert (await fictl_at(urls, "dlq", "drop", "--all", "--yes"))[0] == 0
    await left(pipeline, 0)
    assert await pipeline.settled() == totals


async def test_what_is_replayed_after_its_cause_is_gone_is_stored_once_though_its_id_is_still_remembered(
    pipeline: Pipeline,
) -> None:
    own = str(UUID(int=77, version=4))
    consultation = await closed_consultation(pipeline, "clinic-c", late_event(12, event_id=own), late_event(13))
    before = await pipeline.totals()
    with_id, without = await left(pipeline, 2, "--site", "clinic-c")
    assert {with_id["reason"], without["reason"]} == {"lifecycle.closed"}
    urls = pipeline.supervisor.urls

    code, out, err = await fictl_at(urls, "dlq", "replay", str(with_id["seq"]), "--yes", "--json")
    assert (code, json.loads(out)["replayed"]) == (0, 1), err
    totals = await pipeline.settled()
    assert (totals.persisted, totals.dead_lettered) == (before.persisted, before.dead_lettered + 1)
    _, refused_again = await left(pipeline, 2, "--site", "clinic-c")
    assert refused_again["seq"] > without["seq"], "refused again: a new letter"
    assert refused_again["first_seen"] == with_id["first_seen"]

    subject = f"fi.events.clinic-c.{consultation}"
    body = json.dumps({"consultation_id": consultation, **late_event(12, event_id=own)}).encode()
    ack = await pipeline.client.jetstream(timeout=30).publish(subject, body, headers={HEADER_MSG_ID: own})
    assert ack.duplicate, "under its own id it would be swallowed"

    await reopen(pipeline, "clinic-c", consultation)
    code, out, err = await fictl_at(urls, "dlq", "replay", "--site", "clinic-c", "--yes", "--json")
    assert (code, json.loads(out)["replayed"]) == (0, 2), err
    totals = await pipeline.settled()
    assert totals.persisted == before.persisted + 3
    await left(pipeline, 0, "--site", "clinic-c")
    stored = {e.event_id: e for e in pipeline.stored() if str(UUID(bytes=e.consultation_id)) == consultation}
    origin, accepted_ns, index = map(int, without["first_seen"].split("/"))
    assert {UUID(own).bytes, derive_event_id(origin, accepted_ns, index)} <= set(stored)
    assert all(e.traceparent == TRACE for e in stored.values() if e.event_type == "MESSAGE_RECEIVED")


async def test_a_replay_killed_before_the_letter_was_removed_is_repeated_without_a_second_event(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    consultation = await closed_consultation(pipeline, "clinic-d", late_event(12))
    await reopen(pipeline, "clinic-d", consultation)
    before = await pipeline.totals()
    dead = await dead_letters(pipeline)
    (row,) = await listed(pipeline, "--site", "clinic-d")
    letter = await dead.find(row["seq"])
    assert letter is not None
    with monkeypatch.context() as patched:

        async def killed(letters: object) -> int:
            raise ClusterUnavailableError("killed")

        patched.setattr(dead, "remove", killed)
        for _ in range(2):
            with pytest.raises(ClusterUnavailableError, match="killed"):
                await dead.replay([letter])
    totals = await pipeline.settled()
    assert (totals.persisted, totals.duplicates) == (before.persisted + 1, before.duplicates)

    others = [await dead_letters(pipeline) for _ in range(2)]
    outcomes = await asyncio.gather(*(other.replay([letter]) for other in others))
    assert all(outcome.repeated for (outcome,) in outcomes)
    assert await pipeline.settled() == totals
    await left(pipeline, 0, "--site", "clinic-d")


async def test_a_letter_is_replayed_with_a_mended_body(pipeline: Pipeline, tmp_path: Path) -> None:
    consultation = next(NAMES)
    wrong = event(consultation, 1, payload={"message_content": "hi", "message_role": "nobody"})
    await publish(pipeline, "clinic-e", consultation, wrong, b'{"a')
    before = await pipeline.settled()
    urls = pipeline.supervisor.urls
    (letter,) = await listed(pipeline, "--site", "clinic-e", "--stage", "segment")
    file = tmp_path / "event.json"
    file.write_text(json.dumps(event(consultation, 1)) + "\n" + json.dumps(event(consultation, 2)))
    code, _, err = await fictl_at(urls, "dlq", "replay", str(letter["seq"]), "--yes", "--body", str(file))
    assert code == 2
    assert "give one event" in err
    file.write_text("\n")
    code, _, err = await fictl_at(urls, "dlq", "replay", str(letter["seq"]), "--yes", "--body", str(file))
    assert (code, "--body: message: the message is empty" in err) == (2, True)
    file.write_text(json.dumps(event(consultation, 1), indent=2))
    assert (await fictl_at(urls, "dlq", "replay", "--all", "--yes", "--body", str(file)))[0] == 2
    code, _, err = await fictl_at(urls, "dlq", "replay", str(letter["seq"]), "--yes", "--body", str(file))
    assert code == 0, err
    totals = await pipeline.settled()
    assert (totals.persisted, totals.dead_lettered) == (before.persisted + 1, before.dead_lettered)
    await left(pipeline, 1, "--site", "clinic-e")
    assert (await fictl_at(urls, "dlq", "replay", str(letter["seq"]), "--yes"))[0] == 1, "it is gone"


async def test_an_event_without_an_id_is_stored_once_though_the_servers_have_forgotten_its_replay(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, settings(partitions=1, dedup_window_s=0.1)) as pipeline:
        consultation = await closed_consultation(pipeline, "clinic-f", late_event(12))
        await reopen(pipeline, "clinic-f", consultation)
        before = await pipeline.totals()
        dead = await dead_letters(pipeline)
        (row,) = await listed(pipeline)
        letter = await dead.find(row["seq"])
        assert letter is not None

        async def stored_again() -> bool:
            (outcome,) = await dead.replay([letter])
            return not outcome.repeated and outcome.origin > first.origin

        (first,) = await dead.replay([letter])
        await until(stored_again, "a replay that the servers do not remember", 60)
        totals = await pipeline.settled()
        assert totals.persisted == before.persisted + 1
        assert totals.duplicates > before.duplicates
        stored = [e for e in pipeline.stored() if e.event_type == "MESSAGE_RECEIVED"]
        assert [e.event_id for e in stored] == [
            derive_event_id(*map(int, row["first_seen"].split("/"))),
        ]


async def test_a_stage_that_would_refuse_everything_holds_until_it_is_told_that_the_events_are_bad(
    tmp_path: Path,
) -> None:
    bad, chosen = 160, settings(partitions=2, dead_events_min=60, breaker_pause_s=0.5, drain_s=60.0)
    async with running(tmp_path, chosen) as pipeline:
        supervisor = pipeline.supervisor
        log = supervisor.directory / "logs" / "ingest-0.log"
        consultations = [next(NAMES) for _ in range(8)]
        for number in range(bad):
            await publish(pipeline, "clinic-1", consultations[number % 8], b"not JSON %d" % number)
        await publish(pipeline, "clinic-1", consultations[0], *(event(consultations[0], n) for n in range(20)))

        async def tried_in_vain() -> bool:
            return log.read_text().count("breaker stays open") >= 3

        await until(tried_in_vain, "some trials", 120)
        text = log.read_text()
        assert text.count("breaker opened") == 1
        assert "json.malformed" in text
        assert "FI_DEAD_SHARE_MAX=1" in text
        assert len(await pipeline.letters()) < 60
        assert await pipeline.unsettled()
        assert (await pipeline.totals()).persisted == 0

        supervisor.settings = msgspec.structs.replace(chosen, dead_share_max=1.0)
        await supervisor.scale("ingest", 0)
        await supervisor.scale("ingest", 2)
        totals = await pipeline.settled()
        assert (totals.persisted, totals.dead_lettered) == (20, bad)
        letters = await pipeline.letters()
        places = {(letter.headers[DEAD_ORIGIN], letter.headers[DEAD_INDEX]) for letter in letters}
        assert len(places) == len(letters) == bad
