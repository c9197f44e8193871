"""What segment knows about event types: their group, their criticality, and the rules it can enforce.

Which of the rules hold is for the policy to say (`contracts.rules`).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from contracts.errors import InvalidEventError

Group = Literal["lifecycle", "extraction", "working", "soap", "urgency", "model", "audit", "system"]
Criticality = Literal["routine", "elevated", "critical"]
GROUPS: tuple[Group, ...] = get_args(Group)
CRITICALITIES: tuple[Criticality, ...] = get_args(Criticality)

EVENT_TYPES: dict[str, tuple[Group, Criticality]] = {
    "MESSAGE_RECEIVED": ("lifecycle", "routine"),
    "MESSAGE_UPDATED": ("lifecycle", "routine"),
    "MESSAGE_DELETED": ("lifecycle", "elevated"),
    "MESSAGE_PROCESSED": ("lifecycle", "routine"),
    "MESSAGES_CLEARED": ("lifecycle", "elevated"),
    "CONSULTATION_RESET": ("lifecycle", "elevated"),
    "CONSULTATION_COMMITTED": ("lifecycle", "critical"),
    "EXTRACTION_STARTED": ("extraction", "routine"),
    "EXTRACTION_COMPLETED": ("extraction", "routine"),
    "EXTRACTION_FAILED": ("extraction", "elevated"),
    "EXTRACTION_ITERATION_INCREMENTED": ("extraction", "routine"),
    "EXTRACTION_PROCESS_COMPLETED": ("extraction", "routine"),
    "DEMOGRAPHICS_UPDATED": ("working", "routine"),
    "SYMPTOMS_UPDATED": ("working", "routine"),
    "CONTEXT_UPDATED": ("working", "routine"),
    "COMPLETENESS_CALCULATED": ("working", "routine"),
    "SOAP_GENERATION_STARTED": ("soap", "routine"),
    "SOAP_SECTION_COMPLETED": ("soap", "routine"),
    "SOAP_GENERATION_COMPLETED": ("soap", "elevated"),
    "SOAP_GENERATION_FAILED": ("soap", "elevated"),
    "CRITICAL_PATTERN_DETECTED": ("urgency", "critical"),
    "URGENCY_CLASSIFIED": ("urgency", "critical"),
    "LLM_CALL_INITIATED": ("model", "routine"),
    "LLM_CALL_COMPLETED": ("model", "routine"),
    "LLM_CALL_FAILED": ("model", "elevated"),
    "AUDIT_ENTRY_CREATED": ("audit", "elevated"),
    "CORE_STATE_CHANGED": ("system", "routine"),
    "CORE_ERROR_OCCURRED": ("system", "elevated"),
}
"""The 28 event types of DOMAIN, each with its group and criticality."""


def _number(payload: dict[str, Any], field: str, low: float, high: float, *, integer: bool = False) -> None:
    value = payload.get(field)
    kind = "an integer" if integer else "a number"
    valid_type = isinstance(value, int) if integer else isinstance(value, (int, float))
    if isinstance(value, bool) or not valid_type or not low <= value <= high:  # type: ignore[operator]
        found = "missing" if field not in payload else repr(value)[:40]
        raise InvalidEventError(
            "payload.range", f"payload.{field}", f"must be {kind} from {low} to {high}, found {found}"
        )


def _soap_data(payload: dict[str, Any]) -> None:
    if not isinstance(payload.get("soap_data"), dict):
        raise InvalidEventError("payload.type", "payload.soap_data", "must be an object")


def _message_received(payload: dict[str, Any]) -> None:
    if not isinstance(payload.get("message_content"), str):
        raise InvalidEventError("payload.type", "payload.message_content", "must be a string")
    if payload.get("message_role") not in ("user", "assistant"):
        raise InvalidEventError("payload.value", "payload.message_role", "must be 'user' or 'assistant'")


def _extraction_completed(payload: dict[str, Any]) -> None:
    _number(payload, "iteration", 1, 5, integer=True)
    _number(payload, "completeness", 0, 100)
    _number(payload, "nom_compliance", 0, 100)


def _soap_completed(payload: dict[str, Any]) -> None:
    _soap_data(payload)
    _number(payload, "quality_score", 0, 1)


def _gravity(payload: dict[str, Any]) -> None:
    if "gravity_score" in payload:
        _number(payload, "gravity_score", 1, 10)


PAYLOAD_RULES = {
    "MESSAGE_RECEIVED": _message_received,
    "EXTRACTION_COMPLETED": _extraction_completed,
    "SOAP_GENERATION_COMPLETED": _soap_completed,
    "CRITICAL_PATTERN_DETECTED": _gravity,
    "URGENCY_CLASSIFIED": _gravity,
    "CONSULTATION_COMMITTED": _soap_data,
}
"""event_type → check(payload), raising `InvalidEventError`. Types not named here pass as any object (DOMAIN)."""

_GRAVITY: dict[str, Any] = {"properties": {"gravity_score": {"type": "number", "minimum": 1, "maximum": 10}}}

PAYLOAD_SCHEMAS: dict[str, dict[str, Any]] = {
    "MESSAGE_RECEIVED": {
        "required": ["message_content", "message_role"],
        "properties": {"message_content": {"type": "string"}, "message_role": {"enum": ["user", "assistant"]}},
    },
    "EXTRACTION_COMPLETED": {
        "required": ["iteration", "completeness", "nom_compliance"],
        "properties": {
            "iteration": {
                "type": "integer",
                "minimum": 1,
                "maximum": 5,
                "description": "without fraction and exponent: 5.0 is refused",
            },
            "completeness": {"type": "number", "minimum": 0, "maximum": 100},
            "nom_compliance": {"type": "number", "minimum": 0, "maximum": 100},
        },
    },
    "SOAP_GENERATION_COMPLETED": {
        "required": ["soap_data", "quality_score"],
        "properties": {
            "soap_data": {"type": "object"},
            "quality_score": {"type": "number", "minimum": 0, "maximum": 1},
        },
    },
    "CRITICAL_PATTERN_DETECTED": _GRAVITY,
    "URGENCY_CLASSIFIED": _GRAVITY,
    "CONSULTATION_COMMITTED": {"required": ["soap_data"], "properties": {"soap_data": {"type": "object"}}},
}
"""The same rules as JSON Schema, for gateways. A test holds that both say the same of any payload."""

CLOSED_TO: frozenset[str] = frozenset(
    name
    for name, (group, _) in EVENT_TYPES.items()
    if group in ("lifecycle", "extraction", "working", "soap", "urgency") and name != "CONSULTATION_RESET"
)
"""Event types a committed consultation takes no more of, unless they happened before the commit or it was reset."""
