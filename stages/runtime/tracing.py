"""Traces: the gateway's `traceparent` leads through all four stages to the commit.

Each frame of each stage has one span for every sampled trace that its events belong to, at most `FRAME_TRACES_MAX`. Its
parent is the span of the stage before (for ingest, the gateway's), which the frame's header `Fi-Traces` names; so one
trace holds gateway → ingest → segment → hash → persist. Where a frame joins several traces, the span in the first of
them links to all the others, and theirs link to it: the same work, seen from each.

The gateway decides what is sampled: its flag is kept, both ways. Of messages without a trace, ingest starts one for the
share `trace_share`. A frame that carries no sampled event costs a look at its headers. Attributes and span names follow
OpenTelemetry's messaging conventions (docs/messaging/messaging-spans.md, 1.44).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from contracts.subjects import Stage, input_filter
from contracts.telemetry import (
    FRAME_TRACES_MAX,
    HEADER_TRACEPARENT,
    HEADER_TRACES,
    TraceContext,
    format_traceparent,
    messaging_attributes,
    parse_traceparent,
)
from stages.runtime.logs import current_trace
from stages.runtime.messages import StoredMessage

WAITING_MAX: Final = 2048
"""Spans that may wait for export; more are dropped and counted."""


class Tracer:
    """Makes the spans of one process.

    Attributes:
        waiting: ended spans, oldest first, for whoever exports them.
    """

    def __init__(self, resource: Resource, share: float, chance: Callable[[], float] = random.random) -> None:
        """
        Args:
            resource: whose spans they are.
            share: of messages without a trace, how many get one; 0 to 1.
            chance: gives a number in [0, 1).
        """
        self.waiting: deque[ReadableSpan] = deque()
        self._share = share
        self._chance = chance
        provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._processor = _Waiting(self.waiting)
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("fi")

    @property
    def spans_dropped(self) -> int:
        """Spans for which there was no room."""
        return self._processor.dropped

    def begin(self, stage: Stage, partition: int, messages: Sequence[StoredMessage]) -> FrameTrace | None:
        """The spans of work that begins on `messages`; None when none of them is sampled."""
        parents: list[TraceContext] = []
        fresh = 0
        for message in messages:
            if stage != "ingest":
                if text := message.headers.get(HEADER_TRACES):
                    parents += _sampled(text.split(","))
            elif text := message.headers.get(HEADER_TRACEPARENT):
                parents += _sampled((text,))
            elif self._share and self._chance() < self._share:
                fresh += 1
        if not parents and not fresh:
            return None
        by_trace: dict[int, list[TraceContext]] = {}
        for parent in parents:
            if parent.trace_id in by_trace or len(by_trace) < FRAME_TRACES_MAX:
                by_trace.setdefault(parent.trace_id, []).append(parent)
        subject = input_filter(stage, partition)
        common = messaging_attributes("process", subject)
        attributes: dict[str, str | int] = {
            **common,
            "messaging.operation.type": "process",
            "messaging.destination.name": subject,
            "messaging.destination.partition.id": str(partition),
            "messaging.batch.message_count": len(messages),
            "fi.stage": stage,
        }
        return self._start(
            f"process {common['messaging.destination.template']}", attributes, list(by_trace.values()), fresh
        )

    def _start(
        self, name: str, attributes: dict[str, str | int], traces: list[list[TraceContext]], fresh: int
    ) -> FrameTrace:
        now_ns = time.time_ns()
        spans: list[Span] = []
        roots: list[list[TraceContext]] = [[]] * min(fresh, FRAME_TRACES_MAX - len(traces))
        for parents in traces + roots:
            own = [_span_context(parent) for parent in parents]
            links = [Link(context) for context in own[1:FRAME_TRACES_MAX]]
            if spans:
                links.append(Link(spans[0].get_span_context()))
            else:
                links += [Link(_span_context(other[0])) for other in traces[1:]]
            context = set_span_in_context(NonRecordingSpan(own[0]), Context()) if own else Context()
            span = self._tracer.start_span(name, context, SpanKind.CONSUMER, attributes, links=links, start_time=now_ns)
            assert isinstance(span, Span)
            spans.append(span)
        return FrameTrace(spans)


class FrameTrace:
    """The spans of one frame in one stage, from their start to `finished` or `abandoned`.

    While they are open, what the task logs names the first of them.
    """

    def __init__(self, spans: list[Span]) -> None:
        self._spans = spans
        self._contexts = [_trace_context(span) for span in spans]
        current_trace.set(self._contexts[0])

    def headers(self) -> dict[str, str]:
        """What the frame carries, so that the next stage goes on from here."""
        return {HEADER_TRACES: ",".join(map(format_traceparent, self._contexts))}

    def finished(self, first_origin: int, last_origin: int, events: int, *, durable_ns: int | None = None) -> None:
        """The frame is acknowledged (for persist: the receipt is accepted).

        Args:
            first_origin, last_origin: what it covers.
            events: how many it carries, or how many were committed.
            durable_ns: when it was on disk, for persist.
        """
        for span in self._spans:
            span.set_attributes({"fi.first_origin": first_origin, "fi.last_origin": last_origin, "fi.events": events})
            if durable_ns is not None:
                span.add_event("durable", timestamp=durable_ns)
        self._end()

    def abandoned(self, error: BaseException | None) -> None:
        """The work was given up: it is done again from what is stored."""
        for span in self._spans:
            span.set_status(Status(StatusCode.ERROR, "given up; done again from what is stored"))
            if error is not None:
                span.set_attribute("error.type", type(error).__name__)
        self._end()

    def _end(self) -> None:
        current_trace.set(None)
        end_ns = time.time_ns()
        for span in self._spans:
            span.end(end_ns)


class _Waiting(SpanProcessor):
    """Keeps ended spans until they are exported."""

    def __init__(self, waiting: deque[ReadableSpan]) -> None:
        self._waiting = waiting
        self.dropped = 0

    def on_end(self, span: ReadableSpan) -> None:
        if len(self._waiting) < WAITING_MAX:
            self._waiting.append(span)
        else:
            self.dropped += 1


def _sampled(texts: Sequence[str]) -> list[TraceContext]:
    contexts = map(parse_traceparent, texts)
    return [context for context in contexts if context is not None and context.sampled]


def _span_context(context: TraceContext) -> SpanContext:
    return SpanContext(context.trace_id, context.span_id, True, TraceFlags(TraceFlags.SAMPLED))


def _trace_context(span: Span) -> TraceContext:
    context = span.get_span_context()
    assert context is not None
    return TraceContext(context.trace_id, context.span_id, True)
