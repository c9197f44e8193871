"""Verifying a store: every byte of every shard, and that the shards of a partition join on to each other.

Each shard is read by a process of its own kind (`check`) under a time limit, so that a file that hangs or crashes its
reader is one problem among others. A store is held against itself here, and against the seal records beside its
shards. Whoever can write it can lay it all down anew so that it agrees: what is sealed then shows against a public key,
and all of it against the receipts in the cluster. Events removed from its very end show against the receipts alone.
"""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import msgspec
import numpy as np

from contracts.budgets import SHARD_CHECK, SHARD_READER
from contracts.errors import ShardError
from contracts.hashing import HASH_BYTES, MerkleFrontier
from contracts.wire import plain
from stages.persist.check import Finding, ShardCheck
from stages.persist.columns import as_text
from stages.persist.export.manifest import exported_path, list_manifests, manifest_path
from stages.persist.files import check_regular
from stages.persist.header import read_live_header
from stages.persist.idfilter import ID_BYTES
from stages.persist.names import FIRST_SHARD, ShardFile, list_shards, parse_name, parse_prepared
from stages.persist.records import KeptRecords
from stages.persist.store import PartitionEnd, find_store
from stages.persist.storedir import Store, read_store

READER_COMMAND = [sys.executable, "-P", "-m", "stages.persist.reading"]
"""The process that reads files: paths in, results out, one JSON value a line."""

EXPORT_PART_BYTES = 256 * 1024 * 1024
"""An export may be of any size: each such part of it may take as long as a shard."""

_READER_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
_WORKERS_MAX = 2
_READ_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        shard: file name.
        where: the commit and event in it, or the part of the file.
        what: what is wrong.
    """

    shard: str
    where: str
    what: str


@dataclass(frozen=True, slots=True)
class ShardContents:
    """What a shard was found to hold.

    Attributes:
        shard: the file.
        check: its commits, leaf hashes and ids, and what is wrong in it.
        before: the partition's Merkle tree before its first event; None where the shards do not tell.
    """

    shard: ShardFile
    check: ShardCheck
    before: MerkleFrontier | None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify_store` found.

    Attributes:
        shards, events: how many were read.
        ok: nothing is wrong.
        problems: what is, by partition and shard.
        unseen_commits: whole commits of live shards whose receipt was not known to be accepted.
        partitions: where each partition ends.
        exports: how many manifests of exports lay there; what is wrong with theirs is among the problems.
        seal_records, signed_records: how many sealed shards have a seal record beside them, and a signed one.
    """

    shards: int
    events: int
    ok: bool
    problems: list[Problem]
    unseen_commits: int
    partitions: list[PartitionEnd]
    exports: int
    seal_records: int
    signed_records: int


def verify_store(
    path: Path | str,
    *,
    trusted: Collection[str] = (),
    shard_timeout_s: float = SHARD_CHECK.s,
    on_progress: Callable[[int, int], None] | None = None,
    on_shard: Callable[[ShardContents], None] | None = None,
) -> VerifyReport:
    """Checks all shards of the store at `path` (or in its child ``shards``), also while persist writes them.

    Exports that lie there with their manifests are checked too.

    Args:
        path: where.
        trusted: public keys (64 hex digits); see `KeptRecords`.
        shard_timeout_s: how long reading one shard may take.
        on_progress: told how many shards and exports of how many are done.
        on_shard: given what each shard holds, by partition and number.

    Raises:
        ShardError: there is no store, or its identity cannot be read.
        OSError: the directory cannot be read.
    """
    directory = find_store(Path(path))
    store = read_store(directory)
    shards = [shard for lane in list_shards(directory).values() for shard in lane]
    problems = list(_strangers(directory))
    chains: dict[int, _Chain] = {}
    exports = [manifest for place in dict.fromkeys([Path(path), directory]) for manifest in list_manifests(place)]
    exported: list[Problem] = []
    events = unseen = 0
    tell = on_progress or (lambda done, total: None)
    with _Pool(shard_timeout_s) as pool:
        for done, (shard, check) in enumerate(pool.check_all(directory, shards), 1):
            problems += [Problem(shard.path.name, finding.where, finding.what) for finding in check.findings]
            chain = chains.setdefault(shard.partition, _Chain(shard.partition, KeptRecords(trusted)))
            problems += chain.join(shard, check, store)
            if on_shard is not None:
                on_shard(ShardContents(shard, check, chain.before))
            events += check.events
            unseen += check.unseen
            tell(done, len(shards) + len(exports))
        for done, manifest in enumerate(exports, len(shards) + 1):
            wrong = pool.check_export(manifest)
            exported += [Problem(plain(manifest.name), finding.where, finding.what) for finding in wrong]
            tell(done, len(shards) + len(exports))
    for chain in chains.values():
        problems += [*chain.repeated_ids(), *chain.unrecorded()]
    ends = [chain.end() for chain in chains.values()]
    problems += exported
    kept = [chain.records for chain in chains.values()]
    found, signed = sum(one.found for one in kept), sum(one.signed for one in kept)
    return VerifyReport(len(shards), events, not problems, problems, unseen, ends, len(exports), found, signed)


def verify_export(manifest: Path, *, timeout_s: float) -> list[Finding]:
    """What is wrong with the exported file that lies beside its manifest. `timeout_s`: for each `EXPORT_PART_BYTES`."""
    with _Pool(timeout_s) as pool:
        return pool.check_export(manifest)


def _strangers(directory: Path) -> Iterator[Problem]:
    """HDF5 files that are no shards, prepared ones or exports: a shard under a wrong name is not read by anybody."""
    for path in sorted(directory / name for name in os.listdir(directory) if name.endswith(".h5")):
        if parse_name(path) is not None or manifest_path(path).exists():
            continue
        prepared = parse_prepared(path)
        if prepared is None:
            yield Problem(plain(path.name), "file name", "is not the name of a shard")
            continue
        try:
            check_regular(path)
            header = read_live_header(path)
        except FileNotFoundError:
            continue
        except (ShardError, OSError) as error:
            yield Problem(path.name, "header", f"is no prepared shard ({error}); persist removes it when it starts")
            continue
        if (header.partition, header.shard) != prepared:
            what = f"is shard {header.shard} of partition {header.partition}, but its name says another"
            yield Problem(path.name, "header", what)


@dataclass(slots=True)
class _Chain:
    """Holds each shard of one partition against the one before it."""

    partition: int
    records: KeptRecords
    before: MerkleFrontier | None = None
    """The tree before the shard that joined last."""
    _number: int = FIRST_SHARD - 1
    _origin: int | None = None
    _tree: MerkleFrontier | None = None
    _known: bool = True
    _ids: list[tuple[str, bytes]] = field(default_factory=list)

    def join(self, shard: ShardFile, check: ShardCheck, store: Store) -> list[Problem]:
        """Takes the next shard; gives what does not fit."""
        found: list[Problem] = []

        def report(where: str, what: str) -> None:
            found.append(Problem(shard.path.name, where, what))

        if shard.shard != self._number + 1 and not (check.begins and shard.shard > self._number):
            first, last = self._number + 1, shard.shard - 1
            what = f"shards {first} to {last} of partition {self.partition} are missing" if first < last else ""
            report("before it", what or f"shard {first} of partition {self.partition} is missing or there twice")
        if check.store and (check.store, check.cluster) != (store.store_id, store.cluster_id):
            report("header", f"belongs to store {check.store} of cluster {check.cluster}, not to this one")
        gap = check.prev_origin is not None and self._origin is not None and check.prev_origin != self._origin
        if gap and not check.begins:
            report("commit 1", f"goes on from origin {check.prev_origin}, but the shard before ends at {self._origin}")
        self._number = shard.shard
        self._origin = check.last_origin if check.last_origin is not None else self._origin
        self._grow(shard, check, report)
        self._ids.append((shard.path.name, check.ids))
        if shard.sealed and not check.missing:
            found += [Problem(name, "seal record", what) for name, what in self.records.take(shard, check.sha256)]
        return found

    def _grow(self, shard: ShardFile, check: ShardCheck, report: Callable[[str, str], None]) -> None:
        """Carries the Merkle tree through the shard's events."""
        if check.tree_size_before is not None:
            before = MerkleFrontier.from_bytes(check.tree_size_before, check.frontier_before)
            known = self._tree
            if known is None and shard.shard == FIRST_SHARD and check.prev_origin == 0:
                known = MerkleFrontier()
            if check.begins:
                known = None
            if self._known and known is not None and before.to_bytes() != known.to_bytes():
                report("merkle", f"goes on from a tree of {before.size} events that is not that of the shards before")
            self._tree = before
        elif self._tree is None and shard.shard == FIRST_SHARD and check.prev_origin in (0, None):
            self._tree = MerkleFrontier()
        # After a damaged shard the tree is not known, so a neighbour is not blamed for it.
        self._known = not check.findings
        self.before = None if self._tree is None else self._tree.copy()
        if self._tree is not None:
            for at in range(0, len(check.leaves), HASH_BYTES):
                self._tree.append(check.leaves[at : at + HASH_BYTES])

    def repeated_ids(self) -> list[Problem]:
        """Event ids that are stored more than once in the partition."""
        joined = b"".join(ids for _, ids in self._ids)
        text = as_text(np.frombuffer(joined, np.uint8).reshape(-1, ID_BYTES))
        order = np.argsort(text, kind="stable")
        repeats = order[1:][text[order][1:] == text[order][:-1]]
        ends = np.cumsum([len(ids) // ID_BYTES for _, ids in self._ids])
        problems = []
        for row in sorted(repeats.tolist()):
            name = self._ids[int(np.searchsorted(ends, row, "right"))][0]
            event_id = UUID(bytes=joined[row * ID_BYTES : (row + 1) * ID_BYTES])
            problems.append(Problem(name, f"event {event_id}", "is stored before in this partition"))
        return problems

    def unrecorded(self) -> list[Problem]:
        """What the seal records lack, now that all are known."""
        return [Problem(name, "seal record", what) for name, what in self.records.end()]

    def end(self) -> PartitionEnd:
        """Where the partition ends."""
        tree = self._tree if self._known else None
        size, root = (None, None) if tree is None else (tree.size, tree.root().hex())
        return PartitionEnd(self.partition, self._origin, size, root)


class _Pool:
    """A few checking processes, each replaced when it hangs or dies.

    A second one is started when the first is not soon done with all: a small store is read sooner than that takes.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._choosing = threading.Lock()
        self._second_from = time.monotonic() + SHARD_READER.s
        self._closed = False
        self._threads = ThreadPoolExecutor(_WORKERS_MAX, thread_name_prefix="verify")

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        # Who waits for an answer sees the process end; a pipe that is closed while it is waited on wakes nobody.
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown()
        for worker in self._workers:
            worker.stop()

    def check_all(self, directory: Path, shards: list[ShardFile]) -> Iterator[tuple[ShardFile, ShardCheck]]:
        """Every shard with its result, in order, as they come."""
        return self._threads.map(lambda shard: self._check(directory, shard), shards)

    def check_export(self, manifest: Path) -> list[Finding]:
        """What is wrong with an exported file."""
        worker = self._worker()
        try:
            size_bytes = exported_path(manifest).stat().st_size
        except OSError:
            size_bytes = 0
        try:
            return worker.ask(manifest, self._timeout_s * (1 + size_bytes // EXPORT_PART_BYTES)).findings
        finally:
            self._idle.put(worker)

    def _check(self, directory: Path, shard: ShardFile) -> tuple[ShardFile, ShardCheck]:
        worker = self._worker()
        try:
            check = worker.ask(shard.path, self._timeout_s)
            if check.missing and not shard.sealed:
                # Sealed since the directory was listed: look at what took its place.
                lane = list_shards(directory).get(shard.partition, [])
                shard = next((other for other in lane if other.shard == shard.shard), shard)
                check = worker.ask(shard.path, self._timeout_s)
            if check.missing:
                check.report("file", "vanished while the store was verified")
            return shard, check
        finally:
            self._idle.put(worker)

    def _worker(self) -> _Worker:
        """One that nobody uses. Raises `ShardError` once the pool is closed: nobody wants to know any more."""
        with self._choosing:
            worker = None
            if self._workers:
                more = len(self._workers) < _WORKERS_MAX
                wait_s = max(0.0, self._second_from - time.monotonic()) if more else None
                with contextlib.suppress(queue.Empty):
                    worker = self._idle.get(timeout=wait_s)
            if worker is None:
                worker = _Worker()
                self._workers.append(worker)
            if self._closed:
                raise ShardError("the verification was ended")
            return worker


class _Worker:
    """One checking process, started when first asked. One thread uses it; any may kill it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self._killed = False

    def ask(self, path: Path, timeout_s: float) -> ShardCheck:
        """The process's answer for one shard; a hang or a crash is an answer too."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(os.fsencode(path)) + b"\n")
            process.stdin.flush()
            line = self._read_line(process, time.monotonic() + timeout_s)
        except BrokenPipeError:
            line = b""
        if line is None:
            self.stop()
            return ShardCheck(findings=[Finding("file", f"reading it took longer than {timeout_s:g} s; it is damaged")])
        if not line.endswith(b"\n"):
            self.stop()
            return ShardCheck(findings=[Finding("file", f"its reader died (exit {process.returncode}); it is damaged")])
        return msgspec.json.decode(line, type=ShardCheck)

    def kill(self) -> None:
        """Ends the process for good, and leaves its pipes to whoever asked it: that one sees their end."""
        with self._starting:
            self._killed = True
            if (process := self._process) is not None:
                process.kill()

    def stop(self) -> None:
        """Ends the process and closes its pipes. Not while it is asked by another thread."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._starting:
            if self._killed:
                raise ShardError("the verification was ended")
            # A terminal gives Ctrl-C to both: this process ends the other one, which would print where it was.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._process = subprocess.Popen(
                    READER_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | _READER_ENVIRONMENT
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return self._process

    @staticmethod
    def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
        """One line; less when the process died; None when the time is over."""
        assert process.stdout is not None
        pieces: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                piece = os.read(process.stdout.fileno(), _READ_BYTES)
                pieces.append(piece)
                if not piece or piece.endswith(b"\n"):
                    return b"".join(pieces)
