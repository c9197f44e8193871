"""The catalogue against the code, the instruments, the traces and the text that Prometheus reads."""

from __future__ import annotations

import ast
import asyncio
import errno
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from commandline import Captured, fictl
from opentelemetry.sdk.resources import Resource

from cluster.scrape import Unreadable, parse_metrics
from contracts import telemetry as catalogue
from contracts.errors import HoleError, SettingsError, StoreFailedError
from contracts.receipts import first_receipt
from contracts.settings import Settings
from contracts.telemetry import (
    BACKPRESSURE_AGE,
    CATALOGUE,
    DURABLE_BUDGET_MS_P95,
    DURABLE_LATENCY,
    EVENTS_APPENDED,
    EVENTS_FAILED,
    FRAME_TRACES_MAX,
    HEADER_TRACEPARENT,
    HEADER_TRACES,
    LOOP_LAG,
    STAGE_BUDGET_MS_P95,
    STAGE_LATENCY,
    Instrument,
    TraceContext,
    format_traceparent,
    parse_traceparent,
)
from stages.runtime.circuit import Circuit
from stages.runtime.exposition import prometheus_text
from stages.runtime.instruments import Family, Histogram
from stages.runtime.logs import current_trace
from stages.runtime.messages import StoredMessage
from stages.runtime.meters import Meters
from stages.runtime.probes import LaneMeter, WriterMeter
from stages.runtime.telemetry import OFF, FrameTimes, otlp_endpoint
from stages.runtime.telemetry import Counter as Trips
from stages.runtime.tracing import WAITING_MAX, Tracer

ROOT = Path(__file__).resolve().parents[2]
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def sources() -> dict[Path, ast.Module]:
    paths = (path for package in ("stages", "cluster") for path in (ROOT / package).rglob("*.py"))
    return {path: ast.parse(path.read_text()) for path in paths}


def test_every_instrument_of_the_catalogue_is_used_in_the_code(sources: dict[Path, ast.Module]) -> None:
    constants = {name: value for name, value in vars(catalogue).items() if isinstance(value, Instrument)}
    assert {what.name for what in (*constants.values(), *STAGE_LATENCY.values())} == set(CATALOGUE)
    used = {
        node.id
        for tree in sources.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    assert {*constants, "STAGE_LATENCY"} - used == set()


def test_instruments_are_made_from_the_catalogue_alone(sources: dict[Path, ast.Module]) -> None:
    makers = re.compile(r"create_(observable_)?(counter|gauge|histogram|up_down_counter)")
    made = {
        path.name
        for path, tree in sources.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and makers.fullmatch(node.attr))
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Instrument")
    }
    assert made == set()


def test_names_and_units_of_the_catalogue_are_well_formed_and_distinct() -> None:
    assert set(Counter(what.prometheus_name for what in CATALOGUE.values()).values()) == {1}
    for what in CATALOGUE.values():
        assert re.fullmatch(r"[a-z]+(\.[a-z_]+)+", what.name)
        assert re.fullmatch(r"s|By|\{[a-z]+\}", what.unit)
        assert what.meaning
        assert (what.kind == "histogram") == bool(what.buckets)
        assert list(what.buckets) == sorted(set(what.buckets))
    for stage, budget_ms in STAGE_BUDGET_MS_P95.items():
        assert budget_ms / 1000 in STAGE_LATENCY[stage].buckets
        assert DURABLE_BUDGET_MS_P95 / 1000 in STAGE_LATENCY[stage].buckets


def test_fi_metrics_lists_the_whole_catalogue_for_people_programs_and_documents(
    capsys: Captured,
) -> None:
    printed = {}
    for option in ("--json", "--markdown", ""):
        assert fictl("metrics", *filter(None, [option])) == 0
        printed[option] = capsys.readouterr().out
    listed = json.loads(printed["--json"])
    assert [row["name"] for row in listed] == list(CATALOGUE)
    assert all(row["meaning"] and row["prometheus_name"] for row in listed)
    rows = printed["--markdown"].splitlines()
    assert len(rows) == len(CATALOGUE) + 2
    assert {row.count("|") for row in rows} == {6}
    assert all(name in printed[""] for name in CATALOGUE)


def test_attributes_that_the_catalogue_does_not_know_are_refused() -> None:
    meters = Meters()
    with pytest.raises(ValueError, match=r"fi\.events\.failed has the attributes"):
        meters.counter(EVENTS_FAILED, {"stage": "ingest"})
    with pytest.raises(ValueError, match="consultation"):
        meters.histogram(LOOP_LAG, {"consultation": "x"})
    foreign = Instrument(name="fi.loop.lag", kind="counter", unit="s", meaning="another")
    with pytest.raises(ValueError, match=r"fi\.loop\.lag"):
        meters.counter(foreign, {})


def points(families: Sequence[Family], name: str) -> dict[tuple[tuple[str, str], ...], float]:
    return {
        tuple(sorted(attributes.items())): value.sum if isinstance(value, Histogram) else value
        for family in families
        if family.what.name == name
        for attributes, value in family.points
    }


def test_a_circuit_is_shown_as_unanswered_also_while_one_tries_in_vain() -> None:
    meters = Meters()
    circuit, disk = (
        Circuit(failures_max=1, pause_s_min=60.0, pause_s_max=60.0, try_s_max=60.0, jitter=lambda: 0.0, trips=Trips())
        for _ in range(2)
    )
    meters.circuit("FI_HASH", circuit)
    for partition in range(2):
        meters.lane("persist", partition)
    meters.lanes["persist", 1].disk = disk

    def values() -> dict[str, float]:
        return {attributes[0][1]: value for attributes, value in points(meters.collect(), "fi.circuit.state").items()}

    assert values() == {"FI_HASH": 0.0, "disk": 0.0}
    now_s = time.monotonic()
    for one in (circuit, disk):
        one.failed(now_s, now_s)
    assert values() == {"FI_HASH": 1.0, "disk": 1.0}
    circuit.poke(now_s)
    assert values() == {"FI_HASH": 0.5, "disk": 1.0}
    assert circuit.ask(now_s) == 0
    assert circuit.state(now_s) == "half-open"
    assert values() == {"FI_HASH": 1.0, "disk": 1.0}
    for one in (circuit, disk):
        one.answered(now_s)
    assert values() == {"FI_HASH": 0.0, "disk": 0.0}


def test_what_servers_cannot_read_is_counted_for_each_of_them_and_each_stream() -> None:
    meters = Meters()
    assert meters.damaged() == []
    for server in ("n2", "n1", "n2"):
        meters.unreadable("FI_EVENTS", server)
    places = ((("server", "n2"), ("stream", "FI_EVENTS")), (("server", "n1"), ("stream", "FI_EVENTS")))
    assert points(meters.collect(), "fi.messages.unreadable") == dict(zip(places, (2, 1), strict=True))
    assert meters.damaged()[0] == "n2 could not read FI_EVENTS 2 times"
    (seen, _) = parse_metrics(prometheus_text(meters.collect(), {}).decode()).unreadable
    assert seen == Unreadable("FI_EVENTS", "n2", 2)


def test_a_failed_disk_and_a_lane_that_starts_again_are_counted() -> None:
    meters = Meters()
    lane = meters.lane("persist", 3)
    lane.restarting(HoleError("fi.persist.3", 5, 9))
    lane.closed(None)
    failed = StoreFailedError("the disk is full")
    failed.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    lane.stopped(failed)
    data = meters.collect()
    assert points(data, "fi.lane.restarts") == {(("error_type", "HoleError"), ("stage", "persist")): 1}
    assert points(data, "fi.persist.errors") == {(("error_type", "ENOSPC"),): 1}
    assert points(data, "fi.lanes") == {(("stage", "persist"), ("state", "stopped")): 1}
    lane.leaving()
    lane.closed(None)
    # It is gone; a new lane of the partition counts on.
    assert points(meters.collect(), "fi.lanes") == {}


def test_an_old_lane_that_ends_does_not_take_its_successor_along() -> None:
    meters = Meters()
    old = meters.lane("hash", 1)
    new = meters.lane("hash", 1)
    old.leaving()
    old.closed(None)
    assert meters.lanes == {("hash", 1): new}
    new.leaving()
    assert meters.lanes == {}


def test_a_held_publish_shows_its_age_and_then_its_length() -> None:
    meters = Meters()
    writer = meters.writer("FI_HASH", "fi.hash.2")
    assert isinstance(writer, WriterMeter)
    where = (("partition", "2"), ("stream", "FI_HASH"))
    assert points(meters.collect(), BACKPRESSURE_AGE.name) == {where: 0}
    writer.holding(0.0)
    assert points(meters.collect(), BACKPRESSURE_AGE.name)[where] > 0
    writer.released(2.5)
    data = meters.collect()
    assert points(data, BACKPRESSURE_AGE.name) == {where: 0}
    assert points(data, "fi.backpressure.duration") == {(("stream", "FI_HASH"),): 2.5}
    assert meters.writer("FI_HASH", "fi.hash.2") is writer
    meters.writer("FI_RECEIPTS", "fi.receipts.2").holding(0.0)
    meters.writer("FI_RECEIPTS", "fi.seals.2")
    assert points(meters.collect(), BACKPRESSURE_AGE.name)[("partition", "2"), ("stream", "FI_RECEIPTS")] > 0


def test_what_is_off_hands_out_what_records_nothing() -> None:
    counter = OFF.counter(EVENTS_APPENDED, {})
    counter.add(5)
    OFF.histogram(LOOP_LAG, {}).record(1.0)
    assert sum(OFF.histogram(LOOP_LAG, {}).counts) == 0
    lane = OFF.lane("ingest", 0)
    lane.begin([message(HEADER_TRACEPARENT, TRACE)])
    assert lane.headers() is None
    assert OFF.counter(EVENTS_APPENDED, {}).value == 0


def test_the_text_for_prometheus_escapes_and_adds_up() -> None:
    meters = Meters()
    meters.counter(EVENTS_FAILED, {"stage": "ingest", "error_type": 'json."x"\\'}).add(3)
    lag = meters.histogram(LOOP_LAG, {})
    lag.record(0.001)
    lag.record(0.002, 2)
    lag.record(99.0)
    lines = prometheus_text(meters.collect(), {"service.name": 'a "b"\n\\'}).decode().splitlines()
    assert 'target_info{service_name="a \\"b\\"\\n\\\\"} 1' in lines
    assert 'fi_events_failed_total{error_type="json.\\"x\\"\\\\",stage="ingest"} 3' in lines
    assert "# TYPE fi_events_failed_total counter" in lines
    buckets = [line for line in lines if line.startswith("fi_loop_lag_seconds_bucket")]
    assert buckets[0] == 'fi_loop_lag_seconds_bucket{le="0.001"} 1'
    assert buckets[1] == 'fi_loop_lag_seconds_bucket{le="0.0025"} 3'
    assert buckets[-1] == 'fi_loop_lag_seconds_bucket{le="+Inf"} 4'
    assert "fi_loop_lag_seconds_count 4" in lines
    assert "fi_loop_lag_seconds_sum 99.005" in lines


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (TRACE, True),
        (TRACE[:-2] + "00", False),
        (TRACE[:-2] + "fe", False),
        ("cc" + TRACE[2:] + "-later", True),
    ],
)
def test_a_trace_context_is_read_as_w3c_says(text: str, sampled: bool) -> None:
    assert parse_traceparent(text) == TraceContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, sampled)


@pytest.mark.parametrize(
    "text",
    ["", "x", "ff" + TRACE[2:], TRACE.upper(), TRACE[:-1], "00-" + "0" * 32 + TRACE[35:], TRACE + "-" + "x" * 64],
)
def test_what_is_no_trace_context_is_none(text: str) -> None:
    assert parse_traceparent(text) is None


def message(header: str = "", value: str = "", seq: int = 1) -> StoredMessage:
    return StoredMessage("fi.raw.0.a.b", seq, 0, b"", {header: value} if header else {})


def make_tracer(share: float = 0.0, chance: float = 0.5) -> Tracer:
    return Tracer(Resource({}), share, lambda: chance)


def contexts(count: int) -> list[TraceContext]:
    return [TraceContext(1000 + number, 2000 + number, True) for number in range(count)]


def test_a_frame_that_joins_traces_has_a_span_in_each_and_links_between_them() -> None:
    tracer = make_tracer()
    parents = contexts(3)
    messages = [message(HEADER_TRACEPARENT, format_traceparent(parent)) for parent in parents]
    frame = tracer.begin("ingest", 0, [*messages, message(), messages[0]])
    assert frame is not None
    told = [parse_traceparent(text) for text in frame.headers()[HEADER_TRACES].split(",")]
    frame.finished(1, 5, 5)
    spans = list(tracer.waiting)
    assert [(span.context.trace_id, span.parent.span_id) for span in spans if span.parent] == [
        (parent.trace_id, parent.span_id) for parent in parents
    ]
    assert [context.span_id for context in told if context] == [span.context.span_id for span in spans]
    # The first links to the other traces (and to its own second message), the others to it.
    assert {link.context.trace_id for link in spans[0].links} == {1000, 1001, 1002}
    assert all(span.links[0].context.span_id == spans[0].context.span_id for span in spans[1:])
    assert {span.attributes["messaging.batch.message_count"] for span in spans if span.attributes} == {5}


def test_the_next_stage_goes_on_from_the_frames_spans() -> None:
    tracer = make_tracer()
    text = ",".join(map(format_traceparent, contexts(2)))
    frame = tracer.begin("segment", 0, [message(HEADER_TRACES, text), message()])
    assert frame is not None
    frame.finished(1, 2, 2)
    assert [span.parent.span_id for span in tracer.waiting if span.parent] == [2000, 2001]
    # A gateway's own header means nothing on a frame.
    assert tracer.begin("segment", 0, [message(HEADER_TRACEPARENT, TRACE)]) is None


def test_only_what_is_sampled_is_traced_and_the_share_is_of_what_has_no_trace() -> None:
    unsampled = message(HEADER_TRACEPARENT, TRACE[:-2] + "00")
    assert make_tracer(share=1.0).begin("ingest", 0, [unsampled]) is None
    assert make_tracer(share=0.5, chance=0.5).begin("ingest", 0, [message()]) is None
    tracer = make_tracer(share=0.5, chance=0.49)
    frame = tracer.begin("ingest", 0, [message()])
    assert frame is not None
    frame.finished(1, 1, 1)
    assert tracer.waiting[0].parent is None
    assert make_tracer(share=1.0).begin("segment", 0, [message()]) is None


def test_a_frame_carries_a_bounded_number_of_traces() -> None:
    tracer = make_tracer(share=1.0)
    messages = [message(HEADER_TRACEPARENT, format_traceparent(context)) for context in contexts(100)]
    frame = tracer.begin("ingest", 0, [*messages, message()])
    assert frame is not None
    texts = frame.headers()[HEADER_TRACES]
    assert len(texts.split(",")) == FRAME_TRACES_MAX
    assert len(texts) < 2048
    frame.finished(1, 100, 100)


def test_spans_that_nobody_takes_are_dropped_and_counted() -> None:
    tracer = make_tracer()
    for _ in range(WAITING_MAX + 7):
        frame = tracer.begin("ingest", 0, [message(HEADER_TRACEPARENT, TRACE)])
        assert frame is not None
        frame.finished(1, 1, 1)
    assert (len(tracer.waiting), tracer.spans_dropped) == (WAITING_MAX, 7)


async def test_a_span_that_is_given_up_says_so_and_no_task_is_left_under_it() -> None:
    meters = Meters()
    meters.tracer = make_tracer()
    lane = meters.lane("hash", 0)
    assert isinstance(lane, LaneMeter)

    async def work() -> None:
        lane.begin([message(HEADER_TRACES, TRACE)])
        assert current_trace.get() is not None
        lane.closed(HoleError("fi.hash.0", 1, 2))
        assert current_trace.get() is None

    await asyncio.create_task(work())
    (span,) = meters.tracer.waiting
    assert span.status.status_code.name == "ERROR"
    assert span.attributes is not None
    assert span.attributes["error.type"] == "HoleError"


def test_a_commit_counts_every_event_of_its_frames_by_the_times_of_the_frame() -> None:
    meters = Meters()
    lane = meters.lane("persist", 0)
    made_ns = time.time_ns()
    receipt = msgspec.structs.replace(first_receipt(0, "c", "s", "w"), origin=9, committed_ns=made_ns + 2_000_000_000)
    lane.begin([])
    lane.committed(receipt, [FrameTimes(made_ns, made_ns - 60_000_000_000, 3), FrameTimes(made_ns, made_ns, 2)], 4, 1)
    latency, durable = meters.histogram(STAGE_LATENCY["persist"], {}), meters.histogram(DURABLE_LATENCY, {})
    assert (sum(latency.counts), latency.min, latency.max) == (5, 2.0, 2.0)
    assert sum(durable.counts) == 5
    assert durable.sum >= 3 * 60.0


def test_the_collector_is_named_by_our_setting_or_opentelemetrys_variable() -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://other:4318"}
    assert otlp_endpoint(Settings(), {}) == ""
    assert otlp_endpoint(Settings(), env) == "http://other:4318"
    assert otlp_endpoint(Settings(otlp_endpoint="https://ours:4318/"), env) == "https://ours:4318"
    assert otlp_endpoint(Settings(otlp_endpoint="https://ours:4318/"), {"OTEL_SDK_DISABLED": "true"}) == ""
    for wrong in (
        "ours:4318",
        "ftp://ours",
        "http://",
        "http://ours:http",
        "http://ours:99999",
        "http://our s",
        "http://[::1",
    ):
        with pytest.raises(SettingsError, match=f"^otlp_endpoint = {re.escape(repr(wrong))}"):
            otlp_endpoint(Settings(otlp_endpoint=wrong), env)
        with pytest.raises(SettingsError, match=r"^OTEL_EXPORTER_OTLP_ENDPOINT = "):
            otlp_endpoint(Settings(), {"OTEL_EXPORTER_OTLP_ENDPOINT": wrong})
