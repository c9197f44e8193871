"""The project's own container image, made without a registry: this Python, what stages need of it, a NATS server.

Always true: nothing in it runs as root; it holds no compiler, shell or package manager; entries are sorted, with fixed
times and owners, so that the same inputs give the same files. Two layers: Python with the libraries, which changes
seldom, and the project itself.

``python -m cluster.deploy.image --wheel FILE`` builds it with the local Docker engine (`make image`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import marshal
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from cluster.nodes import find_nats_server
from contracts.errors import DefiniteError

NAME: Final = "fi-pipeline"
BASE_NAME: Final = "fi-pipeline-base"
HOME: Final = "opt/fi"
PYTHON: Final = f"/{HOME}/bin/python3"
NATS_SERVER: Final = f"/{HOME}/bin/nats-server"
USER_ID: Final = 65532
"""Who runs in it: the number that images without a distribution use for "nobody in particular"."""

_PACKAGES: Final = ("contracts", "stages", "cluster")
_NOT_NEEDED: Final = {"grpcio", "opentelemetry-exporter-otlp-proto-grpc", "opentelemetry-exporter-otlp"}
"""Named by the exporter's own package; stages export by OTLP/HTTP alone."""
_STDLIB_NOT_NEEDED: Final = {
    *("test", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "site-packages", "pydoc_data", "__pycache__"),
    *("distutils", "venv", "unittest"),
}
_SUFFIXES_NOT_NEEDED: Final = {".a", ".c", ".h", ".pyi", ".pyx", ".pxd", ".pyc", ".cpp", ".hpp", ".o"}
_UNCHECKED_HASH: Final = (1).to_bytes(4, "little")
"""In a compiled file (PEP 552): it has its source's hash, and nobody is to compare it."""
_KEPT: Final = 4
_FILES: Final = {
    "etc/passwd": f"fi:x:{USER_ID}:{USER_ID}:fi:/data:/none\n",
    "etc/group": f"fi:x:{USER_ID}:\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
}
_ENVIRONMENT: Final = {
    "LD_LIBRARY_PATH": f"/{HOME}/lib",
    "PATH": f"/{HOME}/bin",
    "PYTHONUTF8": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": f"/{HOME}/app",
}

Tree = Mapping[str, bytes | Path]
"""Path in the image → its bytes, or the file that has them."""


class ImageError(DefiniteError):
    """The image cannot be built here."""


def runtime_distributions() -> dict[str, importlib.metadata.Distribution]:
    """Name → installed distribution, for all that the stages need at run time, our own not among them.

    Raises:
        ImageError: one of them is not installed.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = _requirements(NAME)
    while wanted:
        name = wanted.pop()
        if name in found or name in _NOT_NEEDED - {"opentelemetry-exporter-otlp"}:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # A requirement of another platform or Python: what is needed here is installed here.
            continue
        wanted += _requirements(name)
    return {name: dist for name, dist in sorted(found.items()) if name not in _NOT_NEEDED}


def _requirements(name: str) -> list[str]:
    """Names of what a distribution requires without any extra."""
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise ImageError(f"{name} is not installed in this Python; run `make setup`") from None
    plain = [line for line in lines if "extra ==" not in line]
    return [re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", line)[0]).lower() for line in plain]


def base_tree() -> dict[str, bytes | Path]:
    """This Python, the runtime distributions and nats-server, without the system's libraries they are linked with.

    Raises:
        ImageError: this is not Linux, or something needed is not installed.
        ServerMissingError: there is no nats-server.
    """
    if sys.platform != "linux":
        raise ImageError("the image is made of this machine's own Python: build it on Linux")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    tree: dict[str, bytes | Path] = {path: text.encode() for path, text in _FILES.items()}
    tree[PYTHON[1:]] = Path(sys.executable).resolve()
    tree[NATS_SERVER[1:]] = find_nats_server()
    for path, file in _stdlib():
        tree[f"{HOME}/lib/{version}/{path}"] = file
    for distribution in runtime_distributions().values():
        for path, file in _distribution_files(distribution):
            tree[f"{HOME}/lib/{version}/site-packages/{path}"] = file
    return tree


def _stdlib() -> Iterator[tuple[str, Path]]:
    home = Path(sysconfig.get_path("stdlib"))
    for file in _files(home, _STDLIB_NOT_NEEDED):
        parts = file.relative_to(home).parts
        if parts[0].startswith("config-"):
            continue
        if parts[0] == "lib-dynload" and re.match(r"_?(test|tkinter|xxtest|xxlimited|ctypes_test)", parts[-1]):
            continue
        yield "/".join(parts), file


def _distribution_files(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, Path]]:
    for entry in distribution.files or []:
        path = PurePosixPath(entry)
        file = Path(str(distribution.locate_file(entry)))
        if ".." in path.parts or {"tests", "test", "_pyinstaller"} & set(path.parts[:-1]):
            continue
        if _needed(file):
            yield str(path), file


def _needed(file: Path) -> bool:
    return file.suffix not in _SUFFIXES_NOT_NEEDED and file.is_file()


def _files(home: Path, without: Collection[str] = ()) -> Iterator[Path]:
    """Files below `home` that are needed, but none below a directory of one of these names."""
    for place, directories, names in os.walk(home):
        directories[:] = [name for name in directories if name not in without]
        yield from (file for name in names if _needed(file := Path(place, name)))


def _is_elf(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"\x7fELF"


def library_tree(tree: Tree) -> dict[str, bytes | Path]:
    """What the binaries in `tree` are linked with, outside their own packages; and the loader, at the path they name.

    Raises:
        ImageError: this Python is linked with none.
    """
    binaries = [str(file) for file in tree.values() if isinstance(file, Path) and _is_elf(file)]
    libraries: dict[str, bytes | Path] = {}
    loader = None
    listed = subprocess.run(["ldd", *binaries], capture_output=True, text=True)
    for line in listed.stdout.splitlines():
        match = re.match(r"\s+(?:\S+ => )?(/\S+) \(0x", line)
        if match is None:
            continue
        library = Path(match[1])
        if library.name.startswith("ld-"):
            loader = library
        elif "site-packages" not in library.parts:
            libraries[f"{HOME}/lib/{library.name}"] = library
    if loader is None:
        raise ImageError("this Python has no C library that could be taken along (is it static, or musl?)")
    return {**libraries, str(loader)[1:]: loader}


def app_tree(wheel: Path | None = None) -> dict[str, bytes | Path]:
    """The project itself: what `wheel` holds, else the packages that this Python imports."""
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            return {f"{HOME}/app/{name}": archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    tree: dict[str, bytes | Path] = {}
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        home = Path(str(spec and spec.origin)).parent
        tree |= {f"{HOME}/app/{package}/{file.relative_to(home)}": file for file in _files(home)}
    return tree


def fingerprint(tree: Tree, *more: str) -> str:
    """16 hex digits that change with any file of `tree`. Large files count by size, name and time."""
    digest = hashlib.sha256("\n".join(more).encode())
    for path, content in sorted(tree.items()):
        if isinstance(content, Path):
            found = content.stat()
            mark = (
                f"{found.st_size}/{found.st_mtime_ns}".encode() if "/site-packages/" in path else content.read_bytes()
            )
        else:
            mark = content
        digest.update(hashlib.sha256(path.encode() + b"\0" + mark).digest())
    return digest.hexdigest()[:16]


def layer(tree: Tree, *, directories: Mapping[str, int] | None = None) -> bytes:
    """A tar archive of `tree`, with compiled Python beside its source.

    Args:
        tree: see `Tree`.
        directories: path → mode, of directories that belong to the image's user.
    """
    out = io.BytesIO()
    entries: dict[str, bytes | Path] = dict(tree)
    for path, content in tree.items():
        if path.endswith(".py"):
            entries |= _compiled(path, content)
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path, mode in sorted((directories or {}).items()):
            about = tarfile.TarInfo(path)
            about.type, about.mode, about.uid, about.gid = tarfile.DIRTYPE, mode, USER_ID, USER_ID
            archive.addfile(about)
        for path, content in sorted(entries.items()):
            data = _bytes_of(content)
            about = tarfile.TarInfo(path)
            about.size = len(data)
            about.mode = 0o755 if data[:4] == b"\x7fELF" else 0o644
            archive.addfile(about, io.BytesIO(data))
    return out.getvalue()


def _bytes_of(content: bytes | Path) -> bytes:
    """What goes into the image: binaries without their debug information, where `strip` is installed."""
    if not isinstance(content, Path):
        return content
    strip = shutil.which("strip")
    # Wheels that bring libraries of their own were rewritten in ways that `strip` is known to break.
    bundled = content.parent.name.endswith(".libs") or any(
        list(up.parent.glob(f"{up.name}.libs")) for up in content.parents
    )
    if strip is None or bundled or not _is_elf(content):
        return content.read_bytes()
    with tempfile.NamedTemporaryFile() as stripped:
        done = subprocess.run([strip, "--strip-debug", "-o", stripped.name, str(content)], capture_output=True)
        return content.read_bytes() if done.returncode else Path(stripped.name).read_bytes()


def _compiled(path: str, content: bytes | Path) -> dict[str, bytes]:
    """Bytecode that is not checked against its source, whose time in the image means nothing."""
    source = content.read_bytes() if isinstance(content, Path) else content
    try:
        code = compile(source, f"/{path}", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return {}
    pure = PurePosixPath(path)
    name = f"{pure.parent}/__pycache__/{pure.stem}.{sys.implementation.cache_tag}.pyc"
    head = importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH + importlib.util.source_hash(source)
    return {name: head + marshal.dumps(code)}


def build(client: Any, wheel: Path | None = None, tag: str | None = None) -> str:
    """Builds the image if this engine does not have it; gives its name.

    Args:
        client: `docker.DockerClient`.
        wheel: see `app_tree`.
        tag: to give it beside the one made of its contents.

    Raises:
        ImageError, ServerMissingError: see `base_tree`, `library_tree`.
    """
    base, app = base_tree(), app_tree(wheel)
    base_name = f"{BASE_NAME}:{fingerprint(base, platform.machine(), Path(__file__).read_text())}"
    name = f"{NAME}:{fingerprint(app, base_name)}"
    known = {known for image in client.images.list() for known in image.tags}
    if base_name not in known:
        data = layer({**base, **library_tree(base)}, directories={"data": 0o777, "tmp": 0o1777})
        repository, _, version = base_name.partition(":")
        client.api.import_image_from_data(data, repository=repository, tag=version, changes=[f"USER {USER_ID}"])
    if name not in known:
        client.images.build(fileobj=io.BytesIO(_context(base_name, app)), custom_context=True, tag=name, rm=True)
        _forget(client, known - {name, base_name})
    if tag is not None:
        before = [image for image in client.images.list(NAME) if f"{NAME}:{tag}" in image.tags]
        client.images.get(name).tag(NAME, tag)
        for image in before:
            if image.tags == [f"{NAME}:{tag}"] and name not in client.images.get(image.id).tags:
                client.images.remove(image.id)
    return name


def _forget(client: Any, known: set[str]) -> None:
    """Removes all but the last few of the images that `known` names: every change of the project makes one more."""
    import docker

    for repository, kept in ((NAME, _KEPT), (BASE_NAME, 1)):
        made = [image for image in client.images.list(repository) if known & set(image.tags)]
        made.sort(key=lambda image: str(image.attrs["Created"]), reverse=True)
        for image in made[kept:]:
            for name in image.tags:
                if re.fullmatch(rf"{repository}:[0-9a-f]{{16}}", name):
                    # One that a container runs from is refused, and goes another time.
                    with contextlib.suppress(docker.errors.APIError):
                        client.images.remove(name)


def _context(base_name: str, app: Tree) -> bytes:
    lines = [
        f"FROM {base_name}",
        "ADD app.tar /",
        *(f"ENV {name}={value}" for name, value in _ENVIRONMENT.items()),
        "WORKDIR /data",
        "VOLUME /data",
        f"USER {USER_ID}:{USER_ID}",
        f'ENTRYPOINT ["{PYTHON}", "-P", "-m", "cluster"]',
    ]
    return layer({"Dockerfile": ("\n".join(lines) + "\n").encode(), "app.tar": layer(app)})


def main() -> None:
    """``python -m cluster.deploy.image [--wheel FILE] [--tag TAG]``: prints name and size."""
    parser = argparse.ArgumentParser(prog="python -m cluster.deploy.image", description=main.__doc__)
    parser.add_argument("--wheel", type=Path, help="the project's wheel; default: the installed packages")
    parser.add_argument("--tag", default="latest", help="given beside the tag made of the contents; default: latest")
    chosen = parser.parse_args()
    import docker

    client = docker.from_env()
    try:
        name = build(client, chosen.wheel, chosen.tag)
        size_mb = client.images.get(name).attrs["Size"] / 1e6
    finally:
        client.close()
    print(f"{NAME}:{chosen.tag} {name} {size_mb:.0f} MB")


if __name__ == "__main__":
    main()
