"""The README's Python runs as it stands, and shows what is stored. The gateway team's test is one of ours."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from cryptography.exceptions import InvalidSignature
from shard_maker import CLUSTER, PartitionMaker, new_store
from witnessed import SIGNER, Witnessed, events_of

from cluster.feed import LineChecker
from contracts.evidence import encode_evidence
from stages.persist.prove import prove_event
from stages.persist.store import EventStore

README = Path(__file__).resolve().parents[2] / "README.md"
CONSULTATION = UUID("aac18039-54dd-5c5d-a12f-d0aaa1882a18")


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PartitionMaker:
    """A store in `.fi` of the working directory: a sealed shard and a live one with a commit that is not accepted."""
    (tmp_path / ".fi").mkdir()
    maker = PartitionMaker(new_store(tmp_path / ".fi" / "shards"), 3)
    maker.consultations = [CONSULTATION.bytes]
    maker.begin()
    maker.commit(4)
    maker.seal()
    live = maker.begin()
    maker.commit(3)
    maker.commit(0)
    maker.commit(2)
    shown = live.commits
    maker.commit(5)
    del maker.events[-5:]
    live.set_watermark(shown)
    maker.close()
    monkeypatch.chdir(tmp_path)
    return maker


def test_the_event_store_example_shows_the_consultation(
    maker: PartitionMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, object] = {}
    exec(snippets()[1], names)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{event.timestamp_ns} {event.event_type} {event.payload!r}" for event in maker.events]
    assert len(names["frame"]) == len(maker.events)  # type: ignore[arg-type]


def test_the_plain_h5py_example_shows_every_committed_event_and_no_other(
    maker: PartitionMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(snippets()[2], {})
    lines = capsys.readouterr().out.splitlines()
    live, first = maker.events[4:], maker.events[0]
    expected = [f"{event.event_id.hex()} {event.event_type} {event.payload!r}" for event in live]
    assert lines == [*expected, f"4 {first.event_type} {first.payload!r}"]


def test_the_auditors_example_takes_a_proof_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    maker = Witnessed(tmp_path / "store")
    maker.fill(*events_of(maker))
    monkeypatch.chdir(tmp_path)
    ids = list(verified_ids(maker))
    for number, event_id in enumerate(ids):
        proof = prove_event(maker.store.directory, event_id, maker.receipts)
        Path("proof.json").write_bytes(encode_evidence(proof))
        exec(snippets()[3], {})
        said = f"in partition 3 of cluster {CLUSTER} as event {number}, says {SIGNER.public_key}\n"
        assert capsys.readouterr().out == said
        whole = json.loads(Path("proof.json").read_bytes())
        # What is printed is what was signed; `check-proof` refuses this one.
        Path("proof.json").write_text(json.dumps(whole | {"partition": 0, "event_id": str(UUID(int=99))}))
        exec(snippets()[3], {})
        assert capsys.readouterr().out == said
        other = base64.b64encode(base64.b64decode(whole["record"]) + b"\0").decode()
        for change in ({"record": other}, {"index": number + 1}, {"path": whole["path"][1:]}, {"path": ["00" * 32]}):
            if change.get("path", None) == whole["path"]:
                continue
            Path("proof.json").write_text(json.dumps(whole | change))
            with pytest.raises(AssertionError):
                exec(snippets()[3], {})
        head = whole["head"] | {"statement": whole["head"]["statement"] | {"origin": 1 << 40}}
        Path("proof.json").write_text(json.dumps(whole | {"head": head}))
        with pytest.raises(InvalidSignature):
            exec(snippets()[3], {})


def verified_ids(maker: Witnessed) -> Iterator[UUID]:
    with EventStore(maker.store.directory) as store:
        yield from [UUID(bytes=stored.event.event_id) for stored in store.iterate()]


def test_the_event_that_the_first_commands_publish_may_be_published_and_is_the_one_they_look_for() -> None:
    (written,) = re.findall(r"^echo '(.*)' > consultations\.ndjson$", README.read_text(), re.MULTILINE)
    checked = LineChecker().check(1, written.encode())
    assert checked is not None
    assert checked.consultation == str(CONSULTATION)
    assert f"fictl events {checked.consultation}" in README.read_text()


def test_no_command_of_the_readme_needs_an_environment_before_it_is_made() -> None:
    first = README.read_text().split("source .venv/bin/activate")[0]
    commands = "".join(re.findall(r"^```\n(.*?)^```$", first, re.MULTILINE | re.DOTALL))
    assert not re.search(r"^(python|fictl|pytest) ", commands, re.MULTILINE)


def test_the_gateway_teams_example_is_the_test_that_we_run() -> None:
    assert snippets()[4] == (README.parent / "tests" / "integration" / "test_gateway_example.py").read_text()
