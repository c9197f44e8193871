"""Telemetry of one process, from its first value to the last export."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING

from contracts.errors import SettingsError
from contracts.settings import Settings
from contracts.telemetry import SPANS_DROPPED
from stages.runtime.telemetry import OFF, Telemetry, otlp_endpoint

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

    from stages.runtime.meters import Meters
    from stages.runtime.otlp import OtlpExporter


class Observed:
    """Instruments that are on, and their export. `close` flushes what is left, within a limit.

    Args:
        settings: the process's.
        service, name: ``service.name`` and ``service.instance.id``.
        endpoint: of the collector; empty for none.

    Raises:
        SettingsError: one of OpenTelemetry's own variables is not what it should be.
    """

    def __init__(self, settings: Settings, service: str, name: str, endpoint: str) -> None:
        from stages.runtime.meters import Meters

        self.meters: Meters = Meters()
        self._service = service
        self._name = name
        self._exporter: OtlpExporter | None = None
        if endpoint:
            # OpenTelemetry takes 0.2 s to load: only who uses it pays for it.
            from stages.runtime.otlp import OtlpExporter, metrics_data
            from stages.runtime.tracing import Tracer

            try:
                tracer = Tracer(self.resource, settings.trace_share)
            except ValueError as error:
                raise SettingsError(f"OpenTelemetry cannot use a variable of the environment: {error}") from error
            collect = partial(metrics_data, self.meters, self.resource)
            exporter = OtlpExporter(endpoint, settings.otlp_interval_s, collect, tracer.waiting)
            self.meters.tracer, self._exporter = tracer, exporter
            self.meters.read_from(SPANS_DROPPED, lambda: [({}, tracer.spans_dropped + exporter.spans_dropped)])
            exporter.start()
        else:
            self.meters.read_from(SPANS_DROPPED, lambda: [({}, 0)])

    @cached_property
    def resource(self) -> Resource:
        """Who this process is, in OpenTelemetry's words. Loads that part of it."""
        from opentelemetry.sdk.resources import Resource

        host = socket.gethostname()
        attributes: dict[str, str | int] = {
            "service.namespace": "fi",
            "service.instance.id": f"{host}/{self._name}",
            "host.name": host,
            "process.pid": os.getpid(),
        }
        if "OTEL_SERVICE_NAME" not in os.environ:
            attributes["service.name"] = self._service
        return Resource.create(attributes)

    async def close(self) -> None:
        """Exports what is left and ends it."""
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.close)


@asynccontextmanager
async def observing(settings: Settings, service: str, name: str, env: Mapping[str, str]) -> AsyncIterator[Telemetry]:
    """Telemetry for a process that is no stage, exported if the settings or `env` name a collector.

    Args as `Observed`. Raises `SettingsError` for an endpoint that is no URL, and as `Observed`.
    """
    endpoint = otlp_endpoint(settings, env)
    if not endpoint:
        yield OFF
        return
    observed = Observed(settings, service, name, endpoint)
    try:
        yield observed.meters
    finally:
        await observed.close()
