"""`fictl schema`: the contract for gateways written in other languages."""

from __future__ import annotations

from typing import Any

from cluster.cli.common import JsonOption, console, make_table, print_json
from contracts.events import gateway_schema


def schema(as_json: JsonOption = False) -> None:
    """Shows what an edge gateway may publish, and where.

    With --json: JSON Schema (2020-12) of one event, with the subject rules under x-subject and limits under x-limits.
    What a payload must have is by the built-in policy; `fictl policy show` says what is in force on a cluster.

    Example: fictl schema --json > event.schema.json
    """
    contract = gateway_schema()
    if as_json:
        print_json(contract)
    else:
        _show(contract)


def _show(contract: dict[str, Any]) -> None:
    screen = console()
    for name, heading in (("EventSchema", "event"), ("MetadataSchema", "event.metadata")):
        definition = contract["$defs"][name]
        table = make_table("field", "required", "type", title=heading)
        for field, rule in definition["properties"].items():
            table.add_row(field, "yes" if field in definition.get("required", ()) else "", _describe(rule))
        screen.print(table)
    table = make_table("event_type", "field", "required", "type", title="event.payload")
    for rule in contract["$defs"]["EventSchema"]["allOf"]:
        payload = rule["then"]["properties"]["payload"]
        for field, kind in payload["properties"].items():
            required = "yes" if field in payload.get("required", ()) else ""
            table.add_row(rule["if"]["properties"]["event_type"]["const"], field, required, _describe(kind))
    screen.print(table)
    subject = contract["x-subject"]
    screen.print(f"subject: {subject['pattern']}   tokens: {subject['token']}")
    for rule in subject["rules"]:
        screen.print(f"  - {rule}")
    for name, value in contract["x-limits"].items():
        screen.print(f"limit {name}: {value}")


def _describe(rule: dict[str, Any]) -> str:
    if "enum" in rule:
        return f"one of {', '.join(rule['enum'])}"
    if "$ref" in rule:
        return "object"
    kinds = [kind.get("format", kind.get("type", "")) for kind in rule.get("anyOf", [rule])]
    default = rule.get("default")
    bounds = f" from {rule['minimum']} to {rule['maximum']}" if "minimum" in rule else ""
    return " or ".join(kinds) + bounds + (f", default {default}" if default is not None else "")
