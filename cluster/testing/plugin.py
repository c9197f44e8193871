"""The test kit in pytest: the fixture `fi_cluster`, the flag ``--fi-backend``, logs of failed tests, and a leak check.

Installed with the package (entry point ``pytest11``). It costs a suite that uses none of it nothing: what is heavy is
imported by the fixtures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Generator
from typing import Any, Literal

import pytest

pytest_asyncio: Any
try:
    import pytest_asyncio
except ImportError:
    pytest_asyncio = None

Scope = Literal["session", "package", "module", "class", "function"]

_BACKENDS = ("auto", "embedded", "docker")
_LEAKS_INI = "fi_leaks"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--fi-backend`` and the ini option ``fi_leaks``."""
    group = parser.getgroup("fi", "clusters of the fi pipeline")
    group.addoption(
        "--fi-backend",
        choices=_BACKENDS,
        default=os.environ.get("FICLUSTER_BACKEND") or "auto",
        help="where FiCluster runs: containers, processes, or containers where there is a Docker engine "
        "(default: FICLUSTER_BACKEND, else auto)",
    )
    parser.addini(_LEAKS_INI, "fail a test that leaves a task, process, thread, file or port behind", "bool", False)


def pytest_configure(config: pytest.Config) -> None:
    """Markers; the leak check where it is asked for."""
    config.addinivalue_line("markers", "fi_cluster(**arguments): arguments of the FiCluster that `fi_cluster` starts")
    # Its image would have to come from a registry. What it is for, `FiCluster` does itself.
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    if config.getini(_LEAKS_INI):
        from cluster.testing import leaks

        config.pluginmanager.register(leaks, "fi-leaks")


@pytest.fixture(scope="session")
def fi_backend(request: pytest.FixtureRequest) -> str:
    """``embedded`` or ``docker``, as ``--fi-backend`` says. Parametrize it, ``indirect``, to run a test on both.

    Where no Docker engine answers, a test that a parameter puts there is skipped. One that the command line or
    ``FICLUSTER_BACKEND`` puts there fails: a run that was asked for and did not happen must not look well.
    """
    from cluster.testing.errors import NotSupportedError
    from cluster.testing.ficluster import choose_backend

    by_parameter = hasattr(request, "param")
    try:
        chosen = choose_backend(request.param if by_parameter else request.config.getoption("--fi-backend"))
    except NotSupportedError as error:
        where = "the parameter of fi_backend" if by_parameter else "FICLUSTER_BACKEND"
        raise pytest.fail.Exception(f"{where}: {error}", pytrace=False) from None
    if chosen == "docker":
        from cluster.testing.containers import engine_missing

        if reason := engine_missing():
            told = pytest.skip if by_parameter else pytest.fail
            told(f"needs a Docker engine, or the backend embedded: {reason}")
    return chosen


def cluster_fixture(scope: Scope = "function", *, loop_scope: Scope | None = None, **arguments: Any) -> Any:
    """A fixture that gives a running `FiCluster`, fresh for each `scope`.

    Args:
        scope: how long one cluster serves. Its tests must run in a loop of that scope.
        loop_scope: pytest-asyncio's; None: as `scope`.
        arguments: of `FiCluster`. The marker ``fi_cluster`` of a test, class or module is stronger.
    """
    if pytest_asyncio is None:

        @pytest.fixture(scope=scope)
        def without_asyncio() -> None:
            pytest.fail("a FiCluster needs pytest-asyncio: install this package with its extra `test`", pytrace=False)

        return without_asyncio

    @pytest_asyncio.fixture(scope=scope, loop_scope=loop_scope or scope)  # type: ignore[untyped-decorator]
    async def fi_cluster(
        request: pytest.FixtureRequest, fi_backend: str, tmp_path_factory: pytest.TempPathFactory
    ) -> AsyncIterator[Any]:
        """A running cluster; see `FiCluster`."""
        from cluster.testing.errors import NotSupportedError
        from cluster.testing.ficluster import FiCluster

        marker = request.node.get_closest_marker("fi_cluster")
        if marker is not None and marker.args:
            given = ", ".join(map(repr, marker.args))
            pytest.fail(f"fi_cluster({given}): write arguments by name, such as nodes=1", pytrace=False)
        chosen = {"backend": fi_backend, **arguments, **(marker.kwargs if marker else {})}
        cluster = FiCluster(tmp_path_factory.mktemp("fi"), **chosen)
        try:
            await cluster.open()
        except NotSupportedError as error:
            pytest.skip(str(error))
        try:
            yield cluster
        finally:
            await cluster.close()

    return fi_cluster


fi_cluster = cluster_fixture()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the logs of the clusters that run while a test fails to its report."""
    report = yield
    kit = sys.modules.get("cluster.testing.ficluster")
    if report.failed and kit is not None:
        for cluster in list(kit.opened):
            report.sections.append((f"FiCluster in {cluster.directory}", cluster.read_logs(40)))
    return report
