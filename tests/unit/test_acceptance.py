"""What counts as a stream's acceptance of a publish: its own answer, with a sequence, and nothing else."""

from __future__ import annotations

import pytest

from contracts.errors import TopologyError
from contracts.subjects import EVENTS
from stages.runtime.writer import PubAnswer, read_pub_answer


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"+OK",
        b"{}",
        b'{"ok":true}',
        b'{"stream":"FI_EVENTS"}',
        b'{"stream":"FI_EVENTS","seq":0}',
        b'{"stream":"FI_EVENTS","seq":-1}',
        b'{"stream":"FI_EVENTS","seq":"7"}',
        b'{"seq":7}',
        b'{"stream":"OTHER","seq":7}',
        b'{"stream":"\xff","seq":7}',
        b"[" * 100_000,
    ],
    ids=lambda data: str(data[:40]),
)
def test_what_another_one_answers_is_no_acceptance(data: bytes) -> None:
    with pytest.raises(TopologyError, match="something else than FI_EVENTS answers"):
        read_pub_answer(data, EVENTS, "fi.events.clinic-1.c")


def test_the_streams_own_answer_is_one_and_so_is_its_refusal() -> None:
    accepted = b'{"stream":"FI_EVENTS","seq":7,"duplicate":true,"domain":"hub"}'
    assert read_pub_answer(accepted, EVENTS, "s") == PubAnswer(EVENTS, 7, True)
    refused = (
        b'{"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"},"stream":"FI_EVENTS","seq":0}'
    )
    answer = read_pub_answer(refused, EVENTS, "s")
    assert answer.error is not None
    assert answer.error.err_code == 10077
