"""A collector that does not take what it is sent is told of once, with the reason, and once when it does again."""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec
import pytest
from opentelemetry.sdk.metrics.export import MetricsData
from otlp_receiver import OtlpReceiver

from cluster.testing.waiting import until
from stages.runtime import otlp

INTERVAL_S = 0.02
REFUSED = "does not take telemetry"


def exporter_to(url: str) -> otlp.OtlpExporter:
    return otlp.OtlpExporter(url, INTERVAL_S, lambda: MetricsData(resource_metrics=[]), deque())


def told(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


@pytest.mark.parametrize("status", [302, 404])
async def test_an_answer_that_takes_nothing_is_told_once_with_its_status(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with OtlpReceiver() as receiver:
        receiver.status = status
        exporter = exporter_to(receiver.url)
        exporter.start()
        await until(lambda: receiver.requests > 3, "it is tried again and again")
        assert [f"HTTP {status} Status" in line for line in told(caplog, REFUSED)] == [True]
        receiver.status = 200
        await until(lambda: bool(told(caplog, "takes telemetry again")), "it takes telemetry again")
        await asyncio.to_thread(exporter.close)
    assert len(told(caplog, REFUSED)) == 1


async def test_an_answer_that_does_not_end_is_told_while_it_lasts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    # Each drop of an answer begins the request's own limit anew: here it is as if they never ceased.
    monkeypatch.setattr(otlp, "OTLP_REQUEST", msgspec.structs.replace(otlp.OTLP_REQUEST, s=600.0))
    monkeypatch.setattr(otlp, "OTLP_ANSWER", msgspec.structs.replace(otlp.OTLP_ANSWER, s=0.1))
    ends = asyncio.Event()

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            if reader.at_eof():
                break
            await ends.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            break
        writer.close()

    async with await asyncio.start_server(slowly, "127.0.0.1", 0) as server:
        exporter = exporter_to(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        exporter.start()
        await until(lambda: bool(told(caplog, REFUSED)), "the log tells of it")
        assert "no whole answer within 0.1 s" in told(caplog, REFUSED)[0]
        ends.set()
        await until(lambda: bool(told(caplog, "takes telemetry again")), "it takes telemetry again")
        await asyncio.to_thread(exporter.close)
