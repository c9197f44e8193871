"""A real OTLP/HTTP collector on loopback: decodes what processes export and keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Series(NamedTuple):
    """One series: of which process, which metric, with which attributes."""

    process: str
    name: str
    attributes: tuple[tuple[str, str], ...]


class Sample(NamedTuple):
    """The latest value of a series; of a histogram, its count, and the sum of what was counted."""

    metric: Metric
    value: float
    sum: float


class Traced(NamedTuple):
    """A span and the service that made it."""

    service: str
    span: Span


class OtlpReceiver:
    """Listens on a free port of 127.0.0.1 while the block runs.

    Attributes:
        url: for ``FI_OTLP_ENDPOINT``.
        samples: the latest value of every series.
        spans: every span, in order of arrival.
        requests: how many exports came.
        status: what is answered; another than 200 takes nothing in.
    """

    def __init__(self) -> None:
        self.url = ""
        self.samples: dict[Series, Sample] = {}
        self.spans: list[Traced] = []
        self.requests = 0
        self.status = 200
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> OtlpReceiver:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    def total(self, name: str, **attributes: str) -> float:
        """The sum, over processes and series with these attributes, of a metric's value (a histogram's count)."""
        return sum(sample.value for sample in self.of(name, **attributes))

    def of(self, name: str, **attributes: str) -> list[Sample]:
        """The series of a metric, over all processes, with these attributes; ``__`` in a key stands for a dot."""
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        return [
            sample
            for series, sample in self.samples.items()
            if series.name == name and wanted.items() <= dict(series.attributes).items()
        ]

    def names(self) -> set[str]:
        """Every metric that has come."""
        return {series.name for series in self.samples}

    def trace(self, trace_id: str) -> list[Traced]:
        """The spans of one trace, by their start."""
        found = [traced for traced in self.spans if traced.span.trace_id.hex() == trace_id]
        return sorted(found, key=lambda traced: traced.span.start_time_unix_nano)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                path = head[0].split(" ")[1]
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                body = await reader.readexactly(int(headers["content-length"]))
                assert headers["content-type"] == "application/x-protobuf"
                self.requests += 1
                answer = self._take(path, body) if self.status == 200 else b""
                writer.write(
                    f"HTTP/1.1 {self.status} Status\r\nContent-Type: application/x-protobuf\r\n"
                    f"Content-Length: {len(answer)}\r\n\r\n".encode()
                    + answer
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    def _take(self, path: str, body: bytes) -> bytes:
        if path == "/v1/metrics":
            self._take_metrics(ExportMetricsServiceRequest.FromString(body))
            return ExportMetricsServiceResponse().SerializeToString()
        assert path == "/v1/traces", path
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _plain(resource.resource.attributes)["service.name"]
            self.spans += [Traced(service, span) for scope in resource.scope_spans for span in scope.spans]
        return ExportTraceServiceResponse().SerializeToString()

    def _take_metrics(self, request: ExportMetricsServiceRequest) -> None:
        for resource in request.resource_metrics:
            attributes = _plain(resource.resource.attributes)
            # A restarted process counts from 0 again: it is another one.
            process = f"{attributes['service.instance.id']}/{attributes['process.pid']}"
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for series, sample in _samples(process, metric):
                        self.samples[series] = sample


def _samples(process: str, metric: Metric) -> list[tuple[Series, Sample]]:
    kind = metric.WhichOneof("data")
    found = []
    if kind == "histogram":
        for bars in metric.histogram.data_points:
            series = Series(process, metric.name, tuple(sorted(_plain(bars.attributes).items())))
            found.append((series, Sample(metric, bars.count, bars.sum)))
        return found
    for point in (metric.sum if kind == "sum" else metric.gauge).data_points:
        value = point.as_int if point.WhichOneof("value") == "as_int" else point.as_double
        series = Series(process, metric.name, tuple(sorted(_plain(point.attributes).items())))
        found.append((series, Sample(metric, value, value)))
    return found


def _plain(attributes: object) -> Mapping[str, str]:
    plain = {}
    for pair in attributes:  # type: ignore[attr-defined]
        assert isinstance(pair, KeyValue)
        kind = pair.value.WhichOneof("value")
        plain[pair.key] = str(getattr(pair.value, kind))
    return plain
