"""What goes into the container image, seen without a Docker engine."""

from __future__ import annotations

import io
import marshal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from cluster.deploy.image import HOME, USER_ID, app_tree, base_tree, fingerprint, layer, library_tree

linux = pytest.mark.skipif(sys.platform != "linux", reason="the image is made on Linux")


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: member for member in archive.getmembers()}


def test_a_layer_is_sorted_and_bears_no_time_or_owner_but_its_own(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text("answer = 42\n")
    data = layer({"b/late.py": tmp_path / "late.py", "a": b"first"}, directories={"data": 0o777})
    found = members(data)
    assert list(found) == ["data", "a", f"b/__pycache__/late.{sys.implementation.cache_tag}.pyc", "b/late.py"]
    assert {(m.mtime, m.uid) for m in found.values()} == {(0, 0), (0, USER_ID)}
    assert data == layer({"a": b"first", "b/late.py": b"answer = 42\n"}, directories={"data": 0o777})


def test_compiled_python_in_a_layer_is_what_the_interpreter_runs(tmp_path: Path) -> None:
    data = layer({"app/told.py": b"answer = 42\n"})
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(tmp_path, filter="data")
    compiled = next((tmp_path / "app" / "__pycache__").iterdir())
    names: dict[str, object] = {}
    exec(marshal.loads(compiled.read_bytes()[16:]), names)
    assert names["answer"] == 42
    # With another source beside it, it is still the compiled one that is run.
    (tmp_path / "app" / "told.py").write_text("answer = 43\n")
    command = [sys.executable, "-c", "import told; print(told.answer)"]
    done = subprocess.run(command, cwd=tmp_path / "app", capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


def test_the_name_changes_with_any_byte_of_the_project(tmp_path: Path) -> None:
    wheel = tmp_path / "fi.whl"

    def named(text: str) -> str:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("cluster/__init__.py", text)
        return fingerprint(app_tree(wheel))

    assert named("a = 1") == named("a = 1")
    assert named("a = 1") != named("a = 2")


@linux
def test_the_base_has_what_the_stages_need_and_little_else() -> None:
    base = base_tree()
    names = [path.removeprefix(f"{HOME}/") for path in base]
    for needed in ("bin/python3", "bin/nats-server"):
        assert needed in names
    for package in ("nats", "h5py", "numpy", "msgspec", "uvloop", "isal", "cryptography", "opentelemetry"):
        assert any(f"/site-packages/{package}/" in path for path in base), package
    for unneeded in ("grpc", "pytest", "mypy", "matplotlib", "hypothesis", "pip", "docker"):
        assert not any(f"/site-packages/{unneeded}/" in path for path in base), unneeded
    libraries = library_tree(base)
    assert any("libc.so" in path for path in libraries)
    assert not set(libraries) & set(base)


def test_the_project_is_taken_from_where_it_is_imported() -> None:
    tree = app_tree()
    for module in ("contracts/settings.py", "stages/persist/actor.py", "cluster/cli/run.py"):
        assert f"{HOME}/app/{module}" in tree
