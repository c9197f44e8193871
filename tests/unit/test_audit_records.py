"""A store that was changed with all care agrees with itself, but not with its receipts; what was changed is named."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from uuid import UUID

import h5py
import msgspec
import pytest
from commandline import Captured, fictl
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from shard_maker import CLUSTER, NOW_NS, PartitionMaker, id_text
from verifying import verify_here
from witnessed import SIGNER, Witnessed, events_of

from contracts.errors import ShardCorruptError, ShardError
from contracts.events import Event, encode_event
from contracts.evidence import check_evidence, encode_evidence
from contracts.receipts import Receipt, SealRecord, StoreEnd
from contracts.statements import Signer
from stages.persist.audit import Witnesses, audit_partition, in_force, name_record, repeated
from stages.persist.prove import kept_seals, prove_consistency, prove_event
from stages.persist.records import record_path
from stages.persist.verify import ShardContents

KEYS = [SIGNER.public_key]


def audit(maker: Witnessed, path: Path, witnesses: Witnesses | None = None, trusted: list[str] = KEYS) -> str:
    """All problems in one text, of the shards at `path` against what `maker` witnessed."""
    shards: list[ShardContents] = []
    report = verify_here(path, on_shard=shards.append)
    assert report.ok, report.problems
    found = audit_partition(
        3, shards, witnesses or Witnesses(maker.receipts, (), maker.seals), maker.store, trusted=trusted
    )
    return "\n".join([*(f"{one.shard}: {one.where}: {one.what}" for one in found.problems), found.unshown]).strip()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Witnessed:
    maker = Witnessed(tmp_path_factory.mktemp("made"))
    maker.fill(*events_of(maker))
    return maker


@pytest.fixture
def honest(made: Witnessed, tmp_path: Path) -> Witnessed:
    """A copy of the store, to change, with what was witnessed of it."""
    directory = shutil.copytree(made.store.directory, tmp_path / "honest")
    maker = copy.copy(made)
    maker.store = dataclasses.replace(made.store, directory=Path(directory))
    return maker


def forged(honest: Witnessed, path: Path, change: Callable[[list[list[Event]]], None]) -> Path:
    """A store with the same identity, laid down anew from changed events: every checksum in it is right."""
    path.mkdir()
    (path / "store.json").write_bytes((honest.store.directory / "store.json").read_bytes())
    maker = Witnessed(path)
    commits, origins = events_of(PartitionMaker(honest.store, 3))
    change(commits)
    maker.fill(commits, origins)
    return path


def test_an_honest_store_agrees_with_every_receipt_and_seal(honest: Witnessed) -> None:
    assert audit(honest, honest.store.directory) == ""
    half = Witnesses(honest.receipts[:4], honest.receipts[4:], honest.seals)
    assert audit(honest, honest.store.directory, half) == ""


def change_one(commits: list[list[Event]]) -> None:
    commits[1][2] = msgspec.structs.replace(commits[1][2], site="elsewhere")


def drop_one(commits: list[list[Event]]) -> None:
    del commits[1][2]


def add_one(commits: list[list[Event]]) -> None:
    commits[1].append(msgspec.structs.replace(commits[1][-1], index=1, event_id=bytes(16)))


def swap_two(commits: list[list[Event]]) -> None:
    a, b = commits[1][2:4]
    commits[1][2] = msgspec.structs.replace(b, origin=a.origin)
    commits[1][3] = msgspec.structs.replace(a, origin=b.origin)


@pytest.mark.parametrize("change", [change_one, drop_one, add_one, swap_two])
def test_a_forged_event_is_found_and_named_within_its_receipt(
    honest: Witnessed, tmp_path: Path, change: Callable[[list[list[Event]]], None]
) -> None:
    text = audit(honest, forged(honest, tmp_path / "forged", change))
    commits, _ = events_of(PartitionMaker(honest.store, 3))
    assert "not what was committed: the receipt of" in text
    by_count = change in (drop_one, add_one)
    named = [line for line in text.splitlines() if ("but the shards hold" if by_count else "not what was") in line]
    # What was dropped cannot be named by its id; the events of its commit that are left are.
    assert len(named) == 1
    assert id_text(commits[1][1]) in named[0]
    assert id_text(commits[0][0]) not in named[0]
    assert (str(UUID(int=0)) in named[0]) == (change is add_one)
    assert "seal record of shard 1: " in text


def test_a_single_changed_live_event_is_named_alone(honest: Witnessed, tmp_path: Path) -> None:
    text = audit(honest, forged(honest, tmp_path / "forged", another_event))
    commits, _ = events_of(PartitionMaker(honest.store, 3))
    assert text.startswith(f"partition 3: event {id_text(commits[-1][0])}: not what was committed")
    assert len(text.splitlines()) == 1


def lower(store: Path, commits: int) -> None:
    """Takes the last commits from readers."""
    with h5py.File(next(store.glob("*.live.h5")), "r+") as file:
        file["watermark"][0] -= commits


def test_a_lowered_watermark_is_found_and_what_it_hides_is_named(honest: Witnessed) -> None:
    lower(honest.store.directory, 2)
    text = audit(honest, honest.store.directory)
    last = events_of(PartitionMaker(honest.store, 3))[0][-1][0]
    assert "partition 3: events 35 to 40: the receipt of" in text
    assert "its live shard holds, and does not show, events " in text
    assert id_text(last) in text


def test_one_commit_that_is_not_shown_yet_is_told_of_and_is_no_problem(honest: Witnessed) -> None:
    """Persist was killed between its receipt and showing it."""
    lower(honest.store.directory, 1)
    text = audit(honest, honest.store.directory)
    last = events_of(PartitionMaker(honest.store, 3))[0][-1][0]
    assert text.startswith("readers do not see yet what the receipt of ")
    assert f"(event {id_text(last)}): it is whole in the live shard" in text
    assert len(text.splitlines()) == 1


def another_event(commits: list[list[Event]]) -> None:
    commits[-1][0] = msgspec.structs.replace(commits[-1][0], site="elsewhere")


def one_commit_before_was_changed(commits: list[list[Event]]) -> None:
    commits[-2][0] = msgspec.structs.replace(commits[-2][0], site="elsewhere")


@pytest.mark.parametrize("change", [another_event, one_commit_before_was_changed])
def test_a_commit_that_is_not_shown_is_a_problem_where_it_is_not_what_the_receipt_commits(
    honest: Witnessed, tmp_path: Path, change: Callable[[list[list[Event]]], None]
) -> None:
    store = forged(honest, tmp_path / "forged", change)
    lower(store, 1)
    assert "or the watermark was lowered" in audit(honest, store)


def test_a_commit_that_is_not_shown_and_no_receipt_speaks_of_does_not_make_good_for_one_that_is_missing(
    honest: Witnessed,
) -> None:
    lower(honest.store.directory, 1)
    ahead = msgspec.structs.replace(honest.receipts[-1], origin=honest.origin + 1)
    assert "or the watermark was lowered" in audit(
        honest, honest.store.directory, Witnesses([*honest.receipts, ahead], (), honest.seals), trusted=[]
    )


def test_events_removed_from_the_very_end_are_found(honest: Witnessed, tmp_path: Path) -> None:
    live = next(honest.store.directory.glob("*.live.h5"))
    with h5py.File(live, "r+") as file:
        file["watermark"][0] -= 1
        file["index"][2] = 0
    assert "events 40 to 40: the receipt of" in audit(honest, honest.store.directory)
    live.unlink()
    assert "events 33 to 40: the receipt of" in audit(honest, honest.store.directory)


def test_a_commit_that_no_receipt_speaks_of_is_found(honest: Witnessed) -> None:
    text = audit(honest, honest.store.directory, Witnesses(honest.receipts[:-1], (), honest.seals))
    last = events_of(PartitionMaker(honest.store, 3))[0][-1][0]
    assert f"event {id_text(last)}: the shards go on to origin" in text


def test_a_receipt_that_arrives_while_the_shards_are_read_is_no_problem(honest: Witnessed) -> None:
    assert audit(honest, honest.store.directory, Witnesses(honest.receipts[:-1], honest.receipts[-1:])) == ""
    live = next(honest.store.directory.glob("*.live.h5"))
    with h5py.File(live, "r+") as file:
        file["watermark"][0] -= 1
    assert audit(honest, honest.store.directory, Witnesses(honest.receipts[:-1], honest.receipts[-1:])) == ""


def test_what_is_wrong_with_the_witnesses_themselves_is_found(honest: Witnessed) -> None:
    def told(place: int, **changes: object) -> str:
        receipts = list(honest.receipts)
        receipts[place] = msgspec.structs.replace(receipts[place], **changes)
        return audit(honest, honest.store.directory, Witnesses(receipts, (), honest.seals))

    assert "its signature is not over what it states" in told(3, duplicates=9)
    assert "says 28 events, 9 duplicates" in told(3, duplicates=9)
    assert "is not signed" in told(-1, signature=msgspec.UNSET)
    assert "is of partition 4 of cluster" in told(3, partition=4)
    assert "after one that committed" in told(3, persisted=1)
    assert "no commit in" in told(3, origin=honest.receipts[3].origin - 1)
    assert "is signed with key" in audit(honest, honest.store.directory, trusted=["ab" * 32])


def test_receipts_from_before_there_was_a_key_are_vouched_for_by_later_ones(honest: Witnessed) -> None:
    receipts = [msgspec.structs.replace(one, signature=msgspec.UNSET) for one in honest.receipts]
    witnesses = Witnesses([*receipts[:4], *honest.receipts[4:]], (), honest.seals)
    assert audit(honest, honest.store.directory, witnesses) == ""
    assert "is not signed" in audit(honest, honest.store.directory, Witnesses(receipts, (), ()))
    assert audit(honest, honest.store.directory, Witnesses(receipts, (), ()), trusted=[]) == ""


def test_after_the_key_was_changed_the_new_one_alone_vouches_for_all_before(honest: Witnessed) -> None:
    later = Signer(Ed25519PrivateKey.generate())
    receipts = [*honest.receipts[:4], *map(later.sign, honest.receipts[4:])]

    def told(receipts: Sequence[Receipt], *trusted: Signer) -> str:
        witnesses, keys = Witnesses(receipts, (), honest.seals), [signer.public_key for signer in trusted]
        return audit(honest, honest.store.directory, witnesses, keys)

    assert told(receipts, later) == told(receipts, SIGNER, later) == ""
    assert f"is signed with key {later.public_key}, which is not the one given" in told(receipts, SIGNER)
    for place in (-1, 5):
        stolen = [*receipts]
        stolen[place] = SIGNER.sign(receipts[place])
        (line,) = told(stolen, later).splitlines()
        assert line == (
            f"partition 3: {name_record(stolen[place])}: it is signed with key {SIGNER.public_key}, which is not the "
            "one given"
        )


def test_once_there_was_a_key_an_unsigned_record_is_found_also_among_signed_ones(honest: Witnessed) -> None:
    for records in (honest.receipts, honest.seals):
        unsigned: list[Receipt | SealRecord] = [*records]
        unsigned[1] = msgspec.structs.replace(records[1], signature=msgspec.UNSET)
        receipts = [one for one in unsigned if isinstance(one, Receipt)] or honest.receipts
        seals = [one for one in unsigned if isinstance(one, SealRecord)] or honest.seals
        witnesses = Witnesses(receipts, (), seals)
        (line,) = audit(honest, honest.store.directory, witnesses).splitlines()
        assert line == f"partition 3: {name_record(records[1])}: is not signed"
        assert audit(honest, honest.store.directory, witnesses, trusted=[]) == ""


def test_a_proof_rests_on_the_seal_beside_the_shard_or_on_the_first_receipt(honest: Witnessed) -> None:
    path = honest.store.directory
    commits, _ = events_of(PartitionMaker(honest.store, 3))
    seals = kept_seals(path, 3)
    assert seals == honest.seals
    for at, event in enumerate(event for commit in commits for event in commit):
        proof = prove_event(path, UUID(bytes=event.event_id), [*seals, *honest.receipts])
        check_evidence(proof, KEYS)
        assert (proof.index, proof.record) == (at, encode_event(event))
        assert proof.head.tree_size == next(size for size in (28, 32, 34, 39, 40) if size > at)


def test_a_consistency_proof_joins_any_two_receipts(honest: Witnessed) -> None:
    sizes = [receipt.persisted for receipt in honest.receipts]
    for old in sizes:
        for new in (size for size in sizes if size >= old):
            check_evidence(prove_consistency(honest.store.directory, 3, old, new, honest.receipts), KEYS)
    unsigned = prove_consistency(honest.store.directory, 3, 5, None, ())
    assert unsigned.new.tree_size == 40
    check_evidence(unsigned)
    with pytest.raises(ShardError, match="holds 40 events"):
        prove_consistency(honest.store.directory, 3, 5, 41, ())
    with pytest.raises(ShardError, match=r"has no shard of partition 99; it has those of \d"):
        prove_consistency(honest.store.directory, 99, 0, None, ())


def test_a_proof_says_of_which_cluster_it_is_and_joins_no_roots_of_two(
    honest: Witnessed, tmp_path: Path, capsys: Captured
) -> None:
    """With one key for both."""
    file, key = tmp_path / "proof.json", SIGNER.public_key
    path, receipts = honest.store.directory, honest.receipts
    commits, _ = events_of(PartitionMaker(honest.store, 3))
    for proof in (
        prove_consistency(path, 3, 8, 40, receipts),
        prove_event(path, UUID(bytes=commits[0][0].event_id), receipts),
    ):
        file.write_bytes(encode_evidence(proof))
        assert fictl("check-proof", file, "--public-key", key) == 0
        assert f"events of partition 3 of cluster {CLUSTER}, root" in capsys.readouterr().out
    other = SIGNER.sign(msgspec.structs.replace(receipts[-1], cluster="cluster-2"))
    file.write_bytes(encode_evidence(prove_consistency(path, 3, 8, 40, [*receipts[:-1], other])))
    assert fictl("check-proof", file, "--public-key", key) == 4
    assert f"its roots are of different clusters, {CLUSTER} and cluster-2" in capsys.readouterr().err


def test_a_proof_against_a_receipt_that_says_otherwise_is_not_made(honest: Witnessed, tmp_path: Path) -> None:
    path = forged(honest, tmp_path / "forged", change_one)
    with pytest.raises(ShardCorruptError, match="the receipt says"):
        prove_consistency(path, 3, 8, 40, honest.receipts)


def test_a_proof_against_a_planted_seal_record_names_its_file(honest: Witnessed) -> None:
    commits, _ = events_of(PartitionMaker(honest.store, 3))
    (planted,) = (msgspec.structs.replace(seal, root="0" * 64) for seal in honest.seals[:1])
    with pytest.raises(ShardCorruptError, match=f"the seal record of {planted.file} says 000"):
        prove_event(honest.store.directory, UUID(bytes=commits[0][0].event_id), [planted])


def test_a_kept_record_that_cannot_be_read_is_passed_over(honest: Witnessed) -> None:
    first = next(iter(sorted(honest.store.directory.glob("*.h5.seal.json"))))
    first.write_bytes(b"{")
    assert kept_seals(honest.store.directory, 3) == honest.seals[1:]
    assert record_path(first.with_name(first.name.removesuffix(".seal.json"))) == first


def of_another_name(honest: Witnessed, path: Path, change: Callable[[list[list[Event]]], None]) -> Witnessed:
    """A forged store that says it is another one of the same cluster."""
    path.mkdir()
    identity = (honest.store.directory / "store.json").read_text()
    (path / "store.json").write_text(identity.replace(honest.store.store_id, "f" * 32))
    maker = Witnessed(path)
    commits, origins = events_of(PartitionMaker(honest.store, 3))
    change(commits)
    maker.fill(commits, origins)
    return maker


def test_a_forged_store_under_another_name_is_not_taken_for_one_that_was_moved_away(
    honest: Witnessed, tmp_path: Path
) -> None:
    stranger = of_another_name(honest, tmp_path / "forged", change_one)
    assert stranger.store.store_id != honest.store.store_id
    witnesses = Witnesses(honest.receipts, (), honest.seals)
    text = audit(stranger, stranger.store.directory, witnesses)
    assert f"no receipt or seal record of store {'f' * 32} speaks of anything after 0: it was added" in text
    # Nor where the partition went back: that was said of the other store's files.
    back = msgspec.structs.replace(honest.receipts[2], takeover=True)
    text = audit(stranger, stranger.store.directory, Witnesses(honest.receipts, (), honest.seals, [back]))
    assert "it was added" in text


def moved_on(honest: Witnessed) -> Receipt:
    """The receipt with which another store takes over after the last sealed shard."""
    last = honest.seals[-1]
    own = StoreEnd(shard=last.shard + 1, commits=0)
    return SIGNER.sign(
        msgspec.structs.replace(
            honest.receipts[-1],
            store="e" * 32,
            node="n9",
            ends={honest.store.store_id: own, "e" * 32: StoreEnd(shard=own.shard, commits=0, first=own.shard)},
            origin=last.last_origin,
            persisted=last.tree_size,
            root=last.root,
            takeover=True,
        )
    )


def test_a_store_whose_partition_was_moved_away_long_ago_is_vouched_for_by_its_seal_records(
    honest: Witnessed, tmp_path: Path
) -> None:
    taken = Witnesses([moved_on(honest)], (), honest.seals)
    text = audit(honest, honest.store.directory, taken)
    assert f"store {'e' * 32} on n9 took the partition over after" in text
    assert len(text.splitlines()) == 1
    next(honest.store.directory.glob("*.live.h5")).unlink()
    assert audit(honest, honest.store.directory, taken) == ""
    text = audit(honest, forged(honest, tmp_path / "forged", change_one), taken)
    assert "not what was committed: the seal record of shard 1" in text


def test_an_old_receipt_published_again_does_not_pass_for_a_partition_that_went_back(
    honest: Witnessed, tmp_path: Path
) -> None:
    """Its signature is right, and the store was cut to just what it says."""
    receipts = [
        SIGNER.sign(msgspec.structs.replace(one, committed_ns=NOW_NS + at)) for at, one in enumerate(honest.receipts)
    ]
    old = SIGNER.sign(msgspec.structs.replace(receipts[2], takeover=True))
    stream: list[Receipt | SealRecord] = [*receipts[:3], old, *receipts[3:], *honest.seals, old]
    cut = Witnessed(tmp_path / "cut")
    shutil.copy(honest.store.directory / "store.json", cut.store.directory)
    cut = Witnessed(cut.store.directory)
    live = cut.begin()
    commits, origins = events_of(PartitionMaker(honest.store, 3))
    for events, origin in list(zip(commits, origins, strict=True))[:3]:
        live.append(
            [encode_event(event) for event in events],
            prev_origin=cut.origin, origin=origin, duplicates=1, dead_lettered=0, committed_ns=NOW_NS,
        )  # fmt: skip
        cut.origin = origin
    live.sync()
    live.set_watermark(3)
    cut.close()

    def told(stream: list[Receipt | SealRecord], trusted: list[str] = KEYS) -> str:
        receipts, seals, rewinds = in_force(stream)
        witnesses = Witnesses(receipts, (), seals, rewinds, repeated(stream))
        return audit(cut, cut.store.directory, witnesses, trusted)

    assert f"{name_record(old)}: takes the partition back to 8 events, but is older" in told(stream)
    # Without a key whoever can publish can say anything; and made after what it follows, it is an honest one.
    assert told(stream, []) == ""
    now = SIGNER.sign(msgspec.structs.replace(old, committed_ns=receipts[-1].committed_ns + 1))
    assert told([*stream[:-1], now]) == ""
