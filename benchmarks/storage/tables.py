"""The storage benchmark's result as Markdown and as a few headline figures. Pure: figures in, text and figures out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.report import markdown_table, spread

Rows = Sequence[dict[str, Any]]


def by_size(rows: Rows, name: str) -> dict[int, list[float]]:
    """The figure `name` of every repetition, by stored events."""
    found: dict[int, list[float]] = {}
    for row in rows:
        found.setdefault(row["size"], []).append(row[name])
    return found


def points_of(design: dict[str, Any], *, sync: bool) -> list[dict[str, Any]]:
    """A classic design's measurements with or without fsync."""
    return [point for point in design["points"] if point["sync"] == sync]


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that say whether the store does what it is for."""
    ours, plain = result["ours"], result["plain"]
    append = by_size(ours["append"], "p50")
    sizes = sorted(append)
    bytes_ = ours["bytes"]
    lookup = ours["lookup"]
    warm = [row for row in ours["startup"]["open"] if not row["cold"]]
    ids = [row for row in ours["startup"]["ids"] if not row["cold"]]
    return {
        "append_p50_ms": {str(size): _median(append[size]) for size in sizes},
        "append_most_to_none_stored": {
            name: _median(most / none for none, most in _ends(by_size(ours["append"], name))) for name in ("p50", "cpu")
        },
        "commit_ms": {
            str(batch): {p: _median([row["commit_ms"][p] for row in rows]) for p in ("p50", "p95", "p99")}
            for batch, rows in _grouped(ours["commit"], "batch").items()
        },
        "seal_p99_ratio": {
            str(pause): _median([row["beside_ms"]["p99"] / row["alone_ms"]["p99"] for row in rows])
            for pause, rows in _grouped(ours["during_seal"], "pause_s").items()
        },
        "sealed_bytes_to_json_line": bytes_["sealed"] / bytes_["json_line"],
        "seal_events_per_s": _median([row["events"] / row["seconds"] for row in ours["seal"]]),
        "seal_mb_per_s": _median([row["record_bytes"] / row["seconds"] / 1e6 for row in ours["seal"]]),
        "start_s": _median([row["seconds"] for row in warm]),
        "ids_s_per_10_million": _median([row["seconds"] / row["ids"] * 1e7 for row in ids]),
        "filter_bytes_per_event": _median([row["filter_bytes"] / row["ids"] for row in ids]),
        "resident_bytes_per_event": _median([row["resident_growth_bytes"] / row["ids"] for row in ids]),
        "lookup_p50_ms": lookup["open_store_ms"]["p50"],
        "scan_to_lookup": _median(lookup["scan_s"]) * 1e3 / lookup["open_store_ms"]["p50"],
        "plain_opens_correct": f"{plain['readers']['correct']} of {plain['readers']['tries']}",
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The whole report."""
    ours = result["ours"]
    environment = result["environment"]
    sync = environment["fdatasync_4k_ms"]
    parts = [
        "# Storage benchmark\n",
        f"Written by `python -m benchmarks.storage` at {environment['taken']}: {environment['cpus']} CPUs "
        f"({environment['machine']}), load average {environment['load_1_min']} before it began, kernel "
        f"{environment['kernel']}, Python {environment['python']}, h5py {environment['h5py']}, HDF5 "
        f"{environment['hdf5']}; 4 KB fdatasync p50 "
        f"{sync['p50']} ms, p95 {sync['p95']} ms. Events: {result['samples']['source']}, "
        f"{result['samples']['round_events']:,} over and over under new ids. Figures are medians of "
        f"{result['effort']['repetitions']} interleaved repetitions (least-greatest).\n",
        "## Beside the classic designs: one event an append, on disk when it returns\n",
        _classic_table(result),
        _CLASSIC_NOTES,
        "![Append cost over stored events](storage.png)\n",
        "## Append cost by stored events, one event a commit, ms\n",
        _size_table(ours["append"]),
        "## Commit by events a group, ms\n",
        _commit_table(ours["commit"]),
        '"Bare" is one write and one fdatasync of as many bytes, and nothing else.\n',
        "## Commits of 10 events while a full shard is sealed, from an event loop's worker threads, ms\n",
        _seal_table(ours["during_seal"]),
        "## Start-up, in a process of its own\n",
        _start_table(ours["startup"]),
        '"Ids alone" are the same sealed files under many names (hard links): as many filters are loaded and held as '
        "that many events have. A live shard's ids are a set in memory until it is sealed.\n",
        "## All else\n",
        _other_table(result),
    ]
    return "\n".join(parts)


_CLASSIC_NOTES = (
    "Killed, power fails: see `benchmarks/storage/classic.py` for where these are from; for ours, 2,000 kills and "
    "2,000 replayed power cuts of `make crash`. The classic designs store the JSON line alone; ours also the audit "
    'hash, stage times, indexes and Merkle tree. HDF5\'s flush never syncs: "flush only" loses to a power cut what '
    "the kernel had not written, up to half a minute, and perhaps the file.\n"
)


def _classic_table(result: dict[str, Any]) -> str:
    ours, classics = result["ours"], result["classic"]
    append = by_size(ours["append"], "p50")
    compared = result["effort"]["classic_sizes"][-1]
    head = ["design", *(f"p50 ms at {size:,}" for size in sorted(append)), "at the most events", "p95 ms", "p99 ms"]
    head += ["events/s", "flush only, p50 ms", "bytes an event", "one consultation, p50 ms", "killed", "power fails"]
    rows = [
        [
            "**persist's shards**",
            *(spread(append[size], 2) for size in sorted(append)),
            *_at_size(ours["append"], compared),
            "–",
            f"{ours['bytes']['sealed']:,.0f} sealed, {ours['bytes'].get('live', 0):,.0f} live",
            f"{ours['lookup']['open_store_ms']['p50']:.1f} among {ours['lookup']['events']:,}",
            "nothing committed",
            "nothing committed",
        ]
    ]
    for design in classics:
        durable, flushed = (by_size(points_of(design, sync=sync), "p50") for sync in (True, False))
        rows.append(
            [
                design["design"],
                *(_cell(durable, size, design) for size in sorted(append)),
                *_at_size(points_of(design, sync=True), max(durable)),
                spread(flushed[max(flushed)], 2),
                f"{design['bytes']:,.0f}",
                f"{design['lookup_ms']['p50']:.1f} among {design['filled']:,}",
                design["killed"],
                design["power"],
            ]
        )
    return markdown_table(head, rows)


def _at_size(rows: Rows, size: int) -> list[str]:
    """Stored events, p95, p99 and events/s of the measurements at `size`."""
    found = [row for row in rows if row["size"] == size]
    p95, p99 = _spreads(found, lambda row: (row["p95"], row["p99"]), 2)
    return [f"{size:,}", p95, p99, f"{1e3 / _median(row['mean'] for row in found):,.0f}"]


def _cell(costs: dict[int, list[float]], size: int, design: dict[str, Any]) -> str:
    if size in costs:
        return spread(costs[size], 2)
    return f"stopped at {design['filled']:,}: too slow" if design["stopped"] else "not measured"


def _size_table(rows: Rows) -> str:
    columns = {name: by_size(rows, name) for name in ("p50", "p95", "p99", "mean", "cpu")}
    lines = [[f"{size:,}", *(spread(column[size], 3) for column in columns.values())] for size in columns["p50"]]
    return markdown_table(["stored events", *columns], lines)


def _commit_table(rows: Rows) -> str:
    lines = []
    for batch, found in _grouped(rows, "batch").items():
        cells = _spreads(found, lambda row: tuple(row["commit_ms"][p] for p in ("p50", "p95", "p99")), 3)
        bare = _spreads(found, lambda row: (row["bare_ms"]["p50"], row["commit_ms"]["p50"] / row["bare_ms"]["p50"]), 3)
        rate = [batch * 1e3 / row["commit_ms"]["mean"] for row in found]
        lines.append([str(batch), *cells, *bare, spread(rate, 0)])
    return markdown_table(["events", "p50", "p95", "p99", "bare p50", "commit to bare, p50", "events/s"], lines)


def _seal_table(rows: Rows) -> str:
    lines = []
    for pause_s, found in _grouped(rows, "pause_s").items():
        pace = f"{pause_s * 1e3:.0f} ms pause" if pause_s else "no pause"
        for percentile in ("p50", "p95", "p99"):
            alone, beside = ([row[name][percentile] for row in found] for name in ("alone_ms", "beside_ms"))
            ratios = [busy / quiet for busy, quiet in zip(beside, alone, strict=True)]
            took = spread([row["seal_s"] for row in found], 2)
            lines.append([pace, percentile, *(spread(column, 2) for column in (alone, beside, ratios)), took])
    return markdown_table(["commits", "", "alone", "beside a seal", "ratio", "the seal took, s"], lines)


def _start_table(startup: dict[str, Rows]) -> str:
    lines = []
    for name, about in (("open", "the whole store"), ("live", "a nearly full live shard"), ("ids", "ids alone")):
        for cold, found in _grouped(startup[name], "cold").items():
            count = found[0]["ids" if name == "ids" else "events"]
            ids_s = [row["seconds" if name == "ids" else "sealed_ids_s"] for row in found]
            lines.append(
                [
                    f"{about}, files {'not ' if cold else ''}in the page cache",
                    f"{count:,}",
                    spread([row["seconds"] for row in found], 3),
                    spread(ids_s, 4),
                    spread([row["resident_growth_bytes"] / count for row in found], 2),
                    spread([row["filter_bytes"] / count for row in found], 2),
                ]
            )
    head = ["opened", "events", "seconds", "of it ids of sealed shards, s", "resident growth, bytes an event"]
    return markdown_table([*head, "id filters, bytes an event"], lines)


def _other_table(result: dict[str, Any]) -> str:
    ours = result["ours"]
    size, lookup, readers, writer = ours["bytes"], ours["lookup"], result["plain"]["readers"], result["plain"]["writer"]
    ids = [row for row in ours["startup"]["ids"] if not row["cold"]]
    return markdown_table(
        ["what", "figure"],
        [
            [
                "bytes an event",
                f"sealed {size['sealed']}, live {size.get('live', '–')}; its record {size['record']}, its JSON line "
                f"{size['json_line']}, its payload {size['payload_json']}: sealed is "
                f"{size['sealed'] / size['json_line']:.2f} of the line, {size['sealed'] / size['payload_json']:.2f} of "
                "the payload",
            ],
            ["seal, events/s", spread([row["events"] / row["seconds"] for row in ours["seal"]], 0)],
            ["seal, MB/s of records", spread([row["record_bytes"] / row["seconds"] / 1e6 for row in ours["seal"]])],
            ["a new live shard (roll), ms", spread(ours["fill"]["rolls_ms"])],
            ["verification, events/s", f"{ours['verify']['events_per_s']:,}"],
            ["asking 100 new ids, ms p50", spread([row["ask_new_ms"]["p50"] for row in ids], 3)],
            ["asking 100 known ids, ms p50", spread([row["ask_known_ms"]["p50"] for row in ids], 3)],
            [
                f"one consultation among {lookup['events']:,} events, ms",
                f"p50 {lookup['open_store_ms']['p50']}, p99 {lookup['open_store_ms']['p99']}; store opened anew: p50 "
                f"{lookup['new_store_ms']['p50']}; reading every event instead: {_median(lookup['scan_s']) * 1e3:,.0f}",
            ],
            [
                "plain h5py opens beside a writer at full speed",
                f"{readers['correct']} of {readers['tries']} correct: {readers['live']} live, {readers['sealed']} "
                f"sealed, {readers['shards']} shards, {readers['events']:,} events checked; a listed file was sealed "
                f"before it was opened {readers['sealed_meanwhile']} times",
            ],
            [
                "that writer, ms p50 / p99 a commit of 10",
                f"{writer['alone_ms']['p50']} / {writer['alone_ms']['p99']} alone, {writer['beside_ms']['p50']} / "
                f"{writer['beside_ms']['p99']} beside the readers; {writer['seals']} seals",
            ],
        ],
    )


def _ends(costs: dict[int, list[float]]) -> list[tuple[float, float]]:
    """For each repetition, the figure at the smallest and at the largest size."""
    sizes = sorted(costs)
    return list(zip(costs[sizes[0]], costs[sizes[-1]], strict=True))


def _spreads(rows: Rows, values: Callable[[dict[str, Any]], tuple[float, ...]], digits: int) -> list[str]:
    return [spread(column, digits) for column in zip(*map(values, rows), strict=True)]


def _grouped(rows: Rows, name: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 4)
