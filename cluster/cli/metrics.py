"""`fictl metrics`: the catalogue of what the processes record."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.common import JsonOption, console, make_table, print_json, print_lines
from contracts.telemetry import CATALOGUE


def metrics(
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Lists every metric that the processes record: names, kind, unit, attributes, and what one value says.

    Example: fictl metrics --markdown
    """
    if as_json:
        print_json(
            [
                {
                    "name": what.name,
                    "prometheus_name": what.prometheus_name,
                    "kind": what.kind,
                    "unit": what.unit,
                    "attributes": what.attributes,
                    "optional_attributes": what.optional,
                    "buckets": what.buckets,
                    "meaning": what.meaning,
                }
                for what in CATALOGUE.values()
            ]
        )
        return
    rows = [
        (
            what.name,
            what.kind,
            what.unit,
            ", ".join((*what.attributes, *(f"({name})" for name in what.optional))),
            what.meaning,
        )
        for what in CATALOGUE.values()
    ]
    titles = ("name", "kind", "unit", "attributes", "what one value says")
    if markdown:
        for row in (titles, ("---",) * len(titles), *rows):
            print_lines(f"| {' | '.join(row)} |")
        return
    table = make_table(*titles)
    for row in rows:
        table.add_row(*row)
    console().print(table)
