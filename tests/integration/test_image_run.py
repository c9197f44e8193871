"""The container image at work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.deploy.image import NATS_SERVER, PYTHON, USER_ID
from cluster.testing.containers import engine_missing, image_name

pytestmark = pytest.mark.docker


@pytest.fixture
def engine() -> Iterator[Any]:
    if reason := engine_missing():
        pytest.skip(f"needs a Docker engine: {reason}")
    import docker

    client = docker.from_env()
    yield client
    client.close()


@pytest.mark.slow
def test_the_image_runs_as_nobody_in_particular_and_has_no_shell(engine: Any) -> None:
    import docker

    image = image_name()
    script = (
        "import os, h5py, uvloop, isal, stages.runtime.otlp, stages.persist.actor, cluster.testing.stage\n"
        "import opentelemetry.exporter.otlp.proto.http.metric_exporter\n"
        "open('/data/mine', 'w').close()\n"
        "print(os.getuid(), os.access('/opt/fi/app/cluster', os.W_OK))\n"
    )
    output = engine.containers.run(image, ["-c", script], entrypoint=[PYTHON], remove=True)
    assert output == f"{USER_ID} False\n".encode()
    assert b"fictl" in engine.containers.run(image, ["schema", "--help"], remove=True)
    assert b"nats-server" in engine.containers.run(image, ["--version"], entrypoint=[NATS_SERVER], remove=True)
    shell = engine.containers.create(image, entrypoint=["/bin/sh"])
    try:
        with pytest.raises(docker.errors.APIError, match="no such file"):
            shell.start()
    finally:
        shell.remove()
