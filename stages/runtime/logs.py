"""Structured logs: one JSON object a line on stderr. Payloads never go in.

While a lane works on a frame that carries a sampled event, its lines name the trace and the span.
"""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

import msgspec

from contracts.events import format_rfc3339
from contracts.telemetry import TraceContext

_PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}

current_trace: ContextVar[TraceContext | None] = ContextVar("current_trace", default=None)
"""The span that the running task works under."""


class JsonFormatter(logging.Formatter):
    """Renders a record and its `extra` fields as one line of JSON."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "ts": format_rfc3339(int(record.created * 1000) * 1_000_000),
            "level": record.levelname,
            "process": self._process_name,
            "event": record.getMessage(),
            **{key: value for key, value in record.__dict__.items() if key not in _PLAIN},
        }
        if trace := current_trace.get():
            line |= {"trace_id": f"{trace.trace_id:032x}", "span_id": f"{trace.span_id:016x}"}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


def configure_logging(process_name: str, level: str = "INFO") -> None:
    """Sends all logs of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process_name))
    logging.basicConfig(level=level, handlers=[handler], force=True)
