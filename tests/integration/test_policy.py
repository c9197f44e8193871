"""The policy changed while events flow: on a real pipeline, by the command, with processes killed and keys forged."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
import pytest_asyncio
from pipeline import Extra, Load, Pipeline, extra_stage, fictl, members, running, settings, under_load, until, workload

from cluster.health import look
from cluster.policies import read_versions, set_policy
from contracts.errors import DefiniteError
from contracts.events import Event
from contracts.membership import Member, encode_member
from contracts.rules import DEFAULT_POLICY, Rules, encode_policy
from contracts.subjects import CONTROL, HASH, MEMBERS, SEGMENT, member_subject, policy_subject
from contracts.telemetry import DEAD_POLICY, DEAD_REASON, HEADER_TTL

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

REFUSED = "LLM_CALL_COMPLETED"
"""An event type that the made-up consultations have some of."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pipeline]:
    chosen = settings(health_port=0, breaker_pause_s=3600.0, dead_events_min=50)
    async with running(tmp_path_factory.mktemp("policy"), chosen, {"segment": 2}) as started:
        yield started


async def forge(pipeline: Pipeline, version: int, data: bytes) -> None:
    """Writes a key as somebody with a NATS client might."""
    await pipeline.client.jetstream(timeout=30).publish(policy_subject(version), data)


async def in_force(pipeline: Pipeline) -> int:
    return (await read_versions(pipeline.api, lambda done, total: None, only_in_force=True)).in_force.version


async def versions_of(pipeline: Pipeline, load: Load) -> dict[int, list[int]]:
    """Partition → the policy versions of the load's stored events, in order."""
    ours = {attempt.event_id for attempt in load.attempts}
    found: dict[int, list[int]] = {}
    for number, event in await asyncio.to_thread(_stored, pipeline):
        if event.event_id in ours:
            found.setdefault(number, []).append(event.policy_version)
    return found


async def judged_by(pipeline: Pipeline, load: Load) -> set[int]:
    """The policy versions of the load's stored events."""
    return {version for versions in (await versions_of(pipeline, load)).values() for version in versions}


def _stored(pipeline: Pipeline) -> list[tuple[int, Event]]:
    from stages.persist.store import EventStore

    with EventStore(pipeline.shards) as store:
        return [(row.partition, row.event) for row in store.iterate()]


async def assert_complete(pipeline: Pipeline, load: Load, dead: set[str]) -> None:
    """Every event of the load is stored or one of the `dead`, and stored ones are whole and in order."""
    sent = {attempt.event_id for attempt in load.attempts}
    verdict = await pipeline.verdict(load, {UUID(event_id).bytes for event_id in dead} & sent)
    assert verdict.ok, str(verdict)


def events_of(load: Load, kind: str) -> set[str]:
    decoded = [msgspec.json.decode(line) for line in load.lines]
    return {event["event_id"] for event in decoded if event["event_type"] == kind}


async def dead_ids(pipeline: Pipeline, reason: str) -> list[str]:
    letters = [letter for letter in await pipeline.letters() if letter.headers.get(DEAD_REASON) == reason]
    return [msgspec.json.decode(letter.data)["event_id"] for letter in letters]


async def test_a_policy_changed_under_load_is_recorded_with_each_event_and_loses_nothing(pipeline: Pipeline) -> None:
    before = await in_force(pipeline)
    # The first is under way all the time, and speed decides what judges it; the others come when all processes agree.
    load, refusing, after = (Load(workload(seed, events)) for seed, events in ((901, 3000), (906, 500), (903, 200)))
    assert events_of(refusing, REFUSED)
    async with under_load(load, pipeline.client, rate_per_s=150):
        await load.reached(200)
        code, answer, err = await fictl(pipeline, "policy", "set", f"refused_types={REFUSED}", "--note", "no models")
        assert (code, answer["settled"], answer["version"]) == (0, True, before + 1), err
        assert [holder["version"] for holder in answer["processes"]] == [before + 1] * 2
        await refusing.publish(pipeline.client)
        accepted = await pipeline.unsettled()

        async def judged() -> bool:
            now = await pipeline.unsettled()
            return all(partition not in now or now[partition][0] >= end for partition, (_, end) in accepted.items())

        await until(judged, "receipts for what the second version judges")
        killing = asyncio.create_task(pipeline.supervisor.kill("segment-0"))
        code, answer, err = await fictl(pipeline, "policy", "set", "refused_types=", "--timeout", "60")
        await killing
        assert (code, answer["version"]) == (0, before + 2), err
        await after.publish(pipeline.client)
    totals = await pipeline.settled()
    found = await versions_of(pipeline, load)
    assert {version for versions in found.values() for version in versions} <= {before, before + 1, before + 2}
    assert all(one <= other for versions in found.values() for one, other in pairwise(versions))
    assert await judged_by(pipeline, after) == {before + 2}
    refused = await dead_ids(pipeline, "event_type.refused")
    # What was buried and not framed when its process was killed may be judged again by the next version, and pass.
    dead = set(refused) - {str(UUID(bytes=event.event_id)) for event in pipeline.stored()}
    assert len(dead) == totals.dead_lettered
    assert len(refused) == len(set(refused))
    assert (
        events_of(refusing, REFUSED) <= dead <= set(refused) <= events_of(refusing, REFUSED) | events_of(load, REFUSED)
    )
    letters = [letter for letter in await pipeline.letters() if letter.headers.get(DEAD_REASON) == "event_type.refused"]
    assert {letter.headers[DEAD_POLICY] for letter in letters} == {str(before + 1)}
    for one in (load, refusing, after):
        await assert_complete(pipeline, one, dead)
    code, answer, _ = await fictl(pipeline, "policy", "history")
    assert [row["version"] for row in answer["versions"]][-3:] == [before, before + 1, before + 2]
    assert [change["rule"] for change in answer["versions"][-2]["changes"]] == [f"refused_types.{REFUSED}"]
    assert answer["versions"][-2]["note"] == "no models"


async def test_a_bad_policy_opens_the_breaker_and_a_good_one_heals_it_at_once(pipeline: Pipeline) -> None:
    """The breaker's own pause is an hour."""
    start = await in_force(pipeline)
    load = Load(workload(seed=904, events=1200))
    kinds = sorted({msgspec.json.decode(line)["event_type"] for line in load.lines})
    code, _, err = await fictl(pipeline, "policy", "set", f"refused_types={','.join(kinds)}")
    assert code == 0, err
    buried = (await pipeline.totals()).dead_lettered
    async with under_load(load, pipeline.client):

        async def holds() -> bool:
            return all(member.holding for member in await members(pipeline) if member.stage == "segment")

        await until(holds, "the breakers of both processes are open")
        code, answer, err = await fictl(pipeline, "policy", "set", "--from", str(start), "--note", "back")
        assert (code, answer["settled"]) == (0, True), err
    totals = await pipeline.settled()
    assert totals.dead_lettered - buried < 400
    await assert_complete(pipeline, load, set(await dead_ids(pipeline, "event_type.refused")))


async def test_what_is_judged_again_by_another_policy_is_stored_or_a_dead_letter_once(pipeline: Pipeline) -> None:
    """The hops are lost while letters of later events lie in FI_DLQ already: their order proves nothing then."""
    other = "CORE_STATE_CHANGED"
    load = Load(workload(seed=905, events=800))
    assert (await fictl(pipeline, "policy", "set", f"refused_types={REFUSED}"))[0] == 0
    assert (await fictl(pipeline, "pause", "hash"))[0] == 0
    before = await pipeline.totals()
    already = set(await dead_ids(pipeline, "event_type.refused"))
    await load.publish(pipeline.client)

    async def judged() -> bool:
        return set(await dead_ids(pipeline, "event_type.refused")) - already == events_of(load, REFUSED)

    await until(judged, "all of them are judged by the first policy")
    assert (await fictl(pipeline, "policy", "set", f"refused_types={REFUSED},{other}"))[0] == 0
    version = await in_force(pipeline)
    jetstream = pipeline.client.jetstream(timeout=10)
    for stream in (SEGMENT, HASH):
        await jetstream.purge_stream(stream)
    assert (await fictl(pipeline, "resume", "hash"))[0] == 0
    totals = await pipeline.settled()
    dead = [event_id for event_id in await dead_ids(pipeline, "event_type.refused") if event_id not in already]
    assert sorted(dead) == sorted(events_of(load, REFUSED) | events_of(load, other))
    assert totals.dead_lettered - before.dead_lettered == len(dead)
    assert totals.persisted - before.persisted == len(load.lines) - len(dead)
    assert await judged_by(pipeline, load) == {version}
    assert (await fictl(pipeline, "policy", "set", "refused_types="))[0] == 0


async def test_of_two_who_set_a_version_at_once_one_is_refused(pipeline: Pipeline) -> None:
    before = await in_force(pipeline)
    both = await asyncio.gather(
        *(fictl(pipeline, "policy", "set", f"closed_remembered={number}", "--no-wait") for number in (31, 32))
    )
    _, history, _ = await fictl(pipeline, "policy", "history")
    new = [row for row in history["versions"] if row["version"] > before]
    assert len(new) == sum(code == 0 for code, _, _ in both)
    policies = [msgspec.structs.replace(DEFAULT_POLICY, version=before + 10, note=note) for note in ("a", "b")]
    outcomes = await asyncio.gather(*(set_policy(pipeline.api, policy) for policy in policies), return_exceptions=True)
    (refused,) = [outcome for outcome in outcomes if outcome is not None]
    assert isinstance(refused, DefiniteError)
    assert "set by somebody else" in str(refused)
    versions = await read_versions(pipeline.api, lambda done, total: None)
    assert sum(policy.version == before + 10 for policy in versions.policies) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"garbage", "cannot be read", id="garbage", marks=pytest.mark.slow),
        pytest.param(b'{"v":"policy.2","version":0}', "cannot be read", id="a later format"),
        pytest.param(
            encode_policy(msgspec.structs.replace(DEFAULT_POLICY, version=999_999)),
            "holds version 999999",
            id="another version's",
            marks=pytest.mark.slow,
        ),
    ],
)
async def test_a_policy_that_cannot_be_read_is_not_taken_and_everybody_says_so(
    pipeline: Pipeline, data: bytes, words: str
) -> None:
    good = await in_force(pipeline)
    _, history, _ = await fictl(pipeline, "policy", "history")
    bad = max([row["version"] for row in (*history["versions"], *history["unreadable"])]) + 1
    await forge(pipeline, bad, data)

    async def said() -> bool:
        checks = [await control_check(pipeline, f"segment-{number}") for number in (0, 1)]
        return all(not ok and f"policy.{bad}" in why and f"policy {good} stays in force" in why for ok, why in checks)

    await until(said, "both processes say which version they cannot read, and which they keep")
    code, answer, err = await fictl(pipeline, "policy", "show")
    assert (code, answer["in_force"], [row["version"] for row in answer["unreadable"]][-1]) == (0, good, bad)
    assert words in err
    # A process that starts now must do as those that run.
    await pipeline.supervisor.kill("segment-1")
    load = Load(workload(seed=910 + bad, events=200))
    await load.publish(pipeline.client)
    await pipeline.settled()
    assert await judged_by(pipeline, load) == {good}
    code, answer, err = await fictl(pipeline, "policy", "set", f"payload_bytes_max={500_000 + bad}", "--timeout", "60")
    assert (code, answer["version"], answer["settled"]) == (0, bad + 1, True), err
    assert (await control_check(pipeline, "segment-0"))[0]


async def control_check(pipeline: Pipeline, name: str) -> tuple[bool, str]:
    """What the process's `/readyz` says of what it was told."""
    for process in await look(pipeline.supervisor.directory):
        if process.name == name and "control" in process.checks:
            check = process.checks["control"]
            return check.ok, check.why
    return False, "no answer"


async def test_what_was_set_is_not_changed_by_writing_over_it(pipeline: Pipeline) -> None:
    version = await in_force(pipeline)
    _, before, _ = await fictl(pipeline, "policy", "show", str(version))
    forged = msgspec.structs.replace(DEFAULT_POLICY, version=version, rules=Rules(check_payload=False))
    await forge(pipeline, version, encode_policy(forged))
    code, after, err = await fictl(pipeline, "policy", "show", str(version))
    assert (code, after["rules"]) == (0, before["rules"])
    assert f"policy.{version} was written over by hand" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "say what to change"),
        (("chek_payload=false",), 2, "did you mean check_payload?"),
        (("payload_bytes_max=2000000",), 2, "payload_bytes_max = 2000000"),
        (("--from", "777777"), 2, "there is no policy 777777"),
        (("check_lifecycle=true",), 1, "nothing changes"),
        (("check_lifecycle=false", "--note", "ticket \udcff"), 2, "the argument 'ticket \\udcff' is not UTF-8"),
    ],
)
async def test_what_cannot_be_set_is_refused_and_nothing_is_stored(
    pipeline: Pipeline, arguments: tuple[str, ...], code: int, words: str
) -> None:
    stored = await pipeline.api.last_message(CONTROL, "$KV.FI_CONTROL.policy.*")
    got, _, err = await fictl(pipeline, "policy", "set", *arguments)
    assert (got, words in err) == (code, True), err
    assert await pipeline.api.last_message(CONTROL, "$KV.FI_CONTROL.policy.*") == stored


async def test_a_file_is_laid_over_the_rules_and_words_over_the_file_and_a_dry_run_sets_nothing(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    before = await in_force(pipeline)
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"closed_remembered": 17, "criticality": {"LLM_CALL_FAILED": "critical"}}))
    arguments = ("--file", str(file), "criticality.MESSAGE_DELETED=critical", "closed_remembered=18", "--dry-run")
    code, answer, err = await fictl(pipeline, "policy", "set", *arguments)
    assert (code, answer["set"]) == (0, False), err
    assert answer["rules"]["closed_remembered"] == 18
    assert answer["rules"]["criticality"] == {"LLM_CALL_FAILED": "critical", "MESSAGE_DELETED": "critical"}
    assert await in_force(pipeline) == before


async def test_a_paused_stage_takes_a_policy(pipeline: Pipeline) -> None:
    before = await in_force(pipeline)
    assert (await fictl(pipeline, "pause", "segment"))[0] == 0
    try:
        code, answer, err = await fictl(pipeline, "policy", "set", f"closed_remembered={100 + before % 50}")
        assert (code, answer["settled"], answer["paused"]) == (0, True, True), err
    finally:
        assert (await fictl(pipeline, "resume", "segment"))[0] == 0


async def test_a_process_that_does_not_take_a_policy_is_named(pipeline: Pipeline) -> None:
    """What it announced last stands until it expires. (One that is frozen here may expire before it is looked at.)"""
    silent = Member(stage="segment", node="elsewhere", name="silent", nonce="x", pid=1, started_ns=1, draining=True)
    subject = member_subject("segment", silent.node, silent.name)
    headers = {HEADER_TTL: "300s"}
    await pipeline.client.jetstream(timeout=30).publish(subject, encode_member(silent), headers=headers)
    try:
        code, _, err = await fictl(pipeline, "policy", "set", "closed_remembered=7", "--timeout", "0.1")
        assert code == 3, err
        assert "silent" in err
    finally:
        await pipeline.api.purge(MEMBERS, subject)


async def test_a_process_waits_for_a_policy_that_it_cannot_read_yet(pipeline: Pipeline) -> None:
    """Without a majority `FI_CONTROL` has no leader: nobody may begin by rules that may be old ones."""
    names = [process.name for process in pipeline.supervisor.processes if process.kind == "server"]
    version = await in_force(pipeline)
    extra: Extra
    async with extra_stage(pipeline, "segment", "late", partitions=None) as extra:
        for name in names[1:]:
            pipeline.supervisor.freeze(name)
        starting = asyncio.create_task(extra.start())
        await asyncio.wait((starting,), timeout=2)
        assert not starting.done()
        for name in names[1:]:
            pipeline.supervisor.thaw(name)
        await starting
        _, answer, _ = await fictl(pipeline, "policy", "show")
        assert {holder["version"] for holder in answer["processes"]} >= {version}
    load = Load(workload(seed=950, events=100))
    await load.publish(pipeline.client)
    await pipeline.settled()
    assert await judged_by(pipeline, load) == {version}
