"""Export by OTLP over HTTP, in a thread of its own.

Always true: the pipeline never waits for the collector. What waits is bounded (`tracing.WAITING_MAX` spans; sums
take no room), each request has a time limit, and so has the end. A collector that does not take what it is sent is
told of once in the log, with the reason, and once more when it takes it again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import requests
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from contracts.budgets import OTLP_ANSWER, OTLP_CLOSE, OTLP_REQUEST
from contracts.settings import hide_credentials
from stages.runtime.instruments import Family, Histogram
from stages.runtime.meters import Meters

log = logging.getLogger(__name__)

SPANS_AT_ONCE: Final = 256


def metrics_data(meters: Meters, resource: Resource) -> MetricsData:
    """What the instruments hold now, as the exporter takes it; `resource` says whose they are."""
    now_ns = time.time_ns()
    metrics = [_metric(family, meters.begun_ns, now_ns) for family in meters.collect()]
    scope = ScopeMetrics(InstrumentationScope("fi"), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], resource.schema_url)])


def _metric(family: Family, begun_ns: int, now_ns: int) -> Metric:
    what = family.what
    return Metric(what.name, what.meaning, what.unit, _data(family, begun_ns, now_ns))


def _data(family: Family, begun_ns: int, now_ns: int) -> Sum | Gauge | HistogramData:
    if family.what.kind == "histogram":
        counted = [
            HistogramDataPoint(
                attributes=dict(attributes),
                start_time_unix_nano=begun_ns,
                time_unix_nano=now_ns,
                count=sum(value.counts),
                sum=value.sum,
                bucket_counts=value.counts,
                explicit_bounds=value.bounds,
                min=value.min if any(value.counts) else 0.0,
                max=value.max,
            )
            for attributes, value in family.points
            if isinstance(value, Histogram)
        ]
        return HistogramData(counted, AggregationTemporality.CUMULATIVE)
    points = [
        NumberDataPoint(dict(attributes), begun_ns, now_ns, value)
        for attributes, value in family.points
        if not isinstance(value, Histogram)
    ]
    if family.what.kind == "counter":
        return Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
    return Gauge(points)


class _Session(requests.Session):
    """Requests to the collector.

    Attributes:
        met: in words, how the last one ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = ""

    def request(self, *arguments: Any, **options: Any) -> requests.Response:
        """As that of `requests`, but an answer that leads elsewhere is an error: the exporters take it for a yes."""
        try:
            response = super().request(*arguments, **options)
        except Exception as error:
            self.met = type(error).__name__
            raise
        self.met = f"HTTP {response.status_code} {response.reason}"
        if 300 <= response.status_code < 400:
            raise requests.TooManyRedirects(self.met)
        return response


class OtlpExporter:
    """Sends metrics and spans every `interval_s`, and once more at the end.

    Args:
        endpoint: the collector's URL, without ``/v1/…``. Headers and certificates are taken from OpenTelemetry's own
            ``OTEL_EXPORTER_OTLP_…`` variables.
        interval_s: between two exports.
        collect: gives the metrics.
        spans: ended spans, oldest first; taken from here.

    Attributes:
        spans_dropped: how many spans were sent and not taken.
    """

    def __init__(
        self,
        endpoint: str,
        interval_s: float,
        collect: Callable[[], MetricsData],
        spans: deque[ReadableSpan],
    ) -> None:
        # It logs every try, each with its own words; what matters of that is said here, once.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL + 1)
        self._shown = hide_credentials(endpoint)
        self._interval_s = interval_s
        self._collect = collect
        self._spans = spans
        self.spans_dropped = 0
        self._session = _Session()
        options: dict[str, Any] = {"timeout": OTLP_REQUEST.s, "session": self._session}
        self._metric_exporter = OTLPMetricExporter(f"{endpoint}/v1/metrics", **options)
        self._span_exporter = OTLPSpanExporter(f"{endpoint}/v1/traces", **options)
        self._closing = threading.Event()
        self._failing = False
        # A daemon: nothing it does may keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)

    def start(self) -> None:
        """Begins exporting. Call once."""
        self._thread.start()

    def close(self) -> None:
        """Exports what is left, for at most `OTLP_CLOSE`. Blocking: call it in a thread."""
        self._closing.set()
        self._thread.join(OTLP_CLOSE.s)
        # Ends the waits of a request that is still retried.
        self._metric_exporter.shutdown()
        self._span_exporter.shutdown()  # type: ignore[no-untyped-call]

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            self._export()
        self._export()

    def _export(self) -> None:
        # A request's limit is for each part of its answer: one that comes drop by drop holds this thread up.
        late = threading.Timer(OTLP_ANSWER.s, self._tell, (False, f"no whole answer within {OTLP_ANSWER.s:g} s"))
        late.daemon = True
        late.start()
        try:
            taken = self._send()
        finally:
            late.cancel()
        self._tell(taken, self._session.met)

    def _send(self) -> bool:
        """Everything there is, up to the first request that fails; False if one did."""
        # Spans that end meanwhile go with the next export.
        batches = -(-len(self._spans) // SPANS_AT_ONCE)
        taken = self._metric_exporter.export(self._collect()) is MetricExportResult.SUCCESS
        for _ in range(batches if taken else 0):
            batch = [self._spans.popleft() for _ in range(min(SPANS_AT_ONCE, len(self._spans)))]
            if self._span_exporter.export(batch) is not SpanExportResult.SUCCESS:
                self.spans_dropped += len(batch)
                return False
        return taken

    def _tell(self, taken: bool, why: str) -> None:
        if taken == self._failing:
            self._failing = not taken
            if taken:
                log.info("the collector at %s takes telemetry again", self._shown)
            else:
                log.warning("the collector at %s does not take telemetry (%s); the pipeline goes on", self._shown, why)
