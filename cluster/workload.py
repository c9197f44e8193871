"""Believable consultations out of a seed: the same seed gives the same events, ids and times included.

Always true: every event is valid by DOMAIN's table and payload rules; times grow from one event to the next; the events
of a consultation come in an order its lifecycle allows, and several consultations are open at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from cluster.dialogue import LANGUAGES, Language
from contracts.events import format_rfc3339

OPEN_AT_ONCE = 12
"""Consultations in progress at any moment."""

_FIRST_NS = 1_767_600_000_000_000_000
_GAP_MS_MEAN = 900
_MODELS = ("fi-extract-2", "fi-soap-1")

_Step = tuple[str, dict[str, Any], str]
"""Event type, payload, and who caused it: ``patient``, ``doctor`` or ``system``."""


def consultations(seed: int, events: int, sites: int = 5) -> Iterator[dict[str, Any]]:
    """Gateway events of interleaved consultations.

    Args:
        seed: decides everything, ids and times too.
        events: how many to give; consultations still open at the end stay open.
        sites: they are spread over ``clinic-1`` to ``clinic-<sites>``.

    Returns:
        one event after the other as DOMAIN's table has it, ready to be encoded as JSON.
    """
    rng = random.Random(seed)
    now_ns = _FIRST_NS
    under_way = [_consultation(rng, sites) for _ in range(OPEN_AT_ONCE)]
    for _ in range(events):
        now_ns += 1_000_000 * (1 + int(rng.expovariate(1 / _GAP_MS_MEAN)))
        turn = rng.randrange(OPEN_AT_ONCE)
        event = next(under_way[turn], None)
        if event is None:
            under_way[turn] = _consultation(rng, sites)
            event = next(under_way[turn])
        yield {"event_id": _uuid(rng), "timestamp": format_rfc3339(now_ns), **event}


def _uuid(rng: random.Random) -> str:
    return str(UUID(int=rng.getrandbits(128), version=4))


def _consultation(rng: random.Random, sites: int) -> Iterator[dict[str, Any]]:
    consultation_id, session_id = _uuid(rng), _uuid(rng)
    site = f"clinic-{rng.randint(1, sites)}"
    users = {"patient": f"patient-{rng.randrange(10**6):06}", "doctor": f"doctor-{rng.randrange(200):03}"}
    language = rng.choice(LANGUAGES)
    for event_type, payload, actor in _script(rng, language):
        yield {
            "consultation_id": consultation_id,
            "event_type": event_type,
            "payload": payload,
            "metadata": {
                "user_id": users.get(actor, "fi-core"),
                "session_id": session_id,
                "source": "fi_consultation_service",
                "site_id": site,
                "timezone": language.timezone,
            },
        }


def _script(rng: random.Random, language: Language) -> Iterator[_Step]:
    """One consultation from the first word to the committed note."""
    complaint = rng.choice(language.complaints)
    yield "CORE_STATE_CHANGED", {"from": "idle", "to": "listening"}, "system"
    yield "MESSAGE_RECEIVED", _message("", "user", consultation_started=True), "patient"
    yield "DEMOGRAPHICS_UPDATED", {"age": rng.randint(1, 95), "sex": rng.choice(["female", "male"])}, "doctor"
    yield from _conversation(rng, language, complaint.opening)
    if complaint.gravity >= 8:
        pattern = {"pattern": complaint.name, "gravity_score": complaint.gravity, "matched": complaint.opening}
        yield "CRITICAL_PATTERN_DETECTED", pattern, "system"
    urgency = "high" if complaint.gravity >= 8 else "medium" if complaint.gravity >= 5 else "low"
    yield "URGENCY_CLASSIFIED", {"urgency": urgency, "gravity_score": complaint.gravity}, "system"
    yield "SYMPTOMS_UPDATED", {"primary_symptoms": [complaint.name], "secondary_symptoms": complaint.signs}, "doctor"
    yield from _extraction(rng, complaint.signs)
    yield from _note(rng, language, complaint.name, complaint.plan)
    yield "CORE_STATE_CHANGED", {"from": "listening", "to": "idle"}, "system"


def _message(content: str, role: str, **about: Any) -> dict[str, Any]:
    return {"message_content": content, "message_role": role, "metadata": about}


def _conversation(rng: random.Random, language: Language, opening: str) -> Iterator[_Step]:
    second = 0.0
    for turn in range(rng.randint(20, 80)):
        patient = turn % 2 == 1
        said = opening if turn == 1 else rng.choice(language.answers if patient else language.questions)
        start, second = second, round(second + rng.uniform(0.8, 14.0), 3)
        role, actor = ("user", "patient") if patient else ("assistant", "doctor")
        yield "MESSAGE_RECEIVED", _message(said, role, speaker=actor, t_start=start, t_end=second), actor
        chance = rng.random()
        if chance < 0.02:
            yield "MESSAGE_UPDATED", {"message_index": turn, "message_content": f"{said} …"}, actor
        elif chance < 0.03:
            yield "MESSAGE_DELETED", {"message_index": turn, "reason": "patient_request"}, "doctor"
        elif chance < 0.05:
            yield "MESSAGE_PROCESSED", {"message_index": turn, "tokens": len(said) // 4}, "system"
        elif chance < 0.06:
            yield "CONTEXT_UPDATED", {"topic": rng.choice(["history", "medication", "allergies"])}, "system"
    if rng.random() < 0.02:
        yield "MESSAGES_CLEARED", {"reason": "wrong_patient"}, "doctor"
        yield "CONSULTATION_RESET", {"reason": "wrong_patient"}, "doctor"


def _extraction(rng: random.Random, signs: list[str]) -> Iterator[_Step]:
    completeness = 0.0
    iterations = rng.randint(1, 3)
    for iteration in range(1, iterations + 1):
        yield "EXTRACTION_STARTED", {"iteration": iteration}, "system"
        yield from _model_call(rng, _MODELS[0])
        if rng.random() < 0.05:
            yield "EXTRACTION_FAILED", {"iteration": iteration, "error": "model_timeout"}, "system"
        completeness = round(rng.uniform(completeness, 100.0), 1)
        extracted = {
            "iteration": iteration,
            "completeness": completeness,
            "nom_compliance": round(rng.uniform(60, 100), 1),
            "missing_fields": [] if completeness > 80 else ["allergies"],
            "extraction_data": {"highlights": signs},
        }
        yield "EXTRACTION_COMPLETED", extracted, "system"
        if iteration < iterations:
            yield "EXTRACTION_ITERATION_INCREMENTED", {"iteration": iteration + 1}, "system"
    yield "COMPLETENESS_CALCULATED", {"completeness": completeness}, "system"
    yield "EXTRACTION_PROCESS_COMPLETED", {"iterations": iterations, "completeness": completeness}, "system"


def _model_call(rng: random.Random, model: str) -> Iterator[_Step]:
    call = f"call-{rng.getrandbits(48):012x}"
    yield "LLM_CALL_INITIATED", {"call_id": call, "model": model, "prompt_tokens": rng.randint(200, 4000)}, "system"
    if rng.random() < 0.04:
        yield "LLM_CALL_FAILED", {"call_id": call, "error": rng.choice(["timeout", "overloaded"])}, "system"
        yield "CORE_ERROR_OCCURRED", {"component": "model_client", "error": "retry"}, "system"
    answered = {"call_id": call, "completion_tokens": rng.randint(50, 900), "latency_ms": rng.randint(300, 9000)}
    yield "LLM_CALL_COMPLETED", answered, "system"


def _note(rng: random.Random, language: Language, complaint: str, plan: str) -> Iterator[_Step]:
    yield "SOAP_GENERATION_STARTED", {}, "doctor"
    yield from _model_call(rng, _MODELS[1])
    if rng.random() < 0.04:
        yield "SOAP_GENERATION_FAILED", {"error": "schema_mismatch", "attempt": 1}, "system"
    soap = {
        "subjective": complaint,
        "objective": rng.choice(language.findings),
        "assessment": complaint,
        "plan": plan,
    }
    for section in soap:
        if rng.random() < 0.5:
            yield "SOAP_SECTION_COMPLETED", {"section": section, "characters": len(soap[section])}, "system"
    quality = round(rng.uniform(0.7, 1.0), 2)
    written = {"soap_data": soap, "quality_score": quality, "ready_for_commit": True}
    yield "SOAP_GENERATION_COMPLETED", written, "doctor"
    yield "AUDIT_ENTRY_CREATED", {"action": "note_reviewed", "result": "approved"}, "doctor"
    yield "CONSULTATION_COMMITTED", {"soap_data": soap, "committed_by": "doctor"}, "doctor"
