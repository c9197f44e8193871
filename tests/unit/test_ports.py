"""Ports that a cluster keeps though nobody listens on them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster import ports as module
from cluster.ports import LOOPBACK, HeldPorts, NoFreePortError

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a port is only looked at")

HOLD_UNTIL_TOLD = """
import sys
from cluster.ports import HeldPorts
with HeldPorts() as held:
    print(*held.take(3), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held() -> Iterator[HeldPorts]:
    with HeldPorts() as ports:
        yield ports


def test_a_port_somebody_listens_on_is_not_given(held: HeldPorts) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        assert not held.take_again([taken.getsockname()[1]])


@linux
def test_what_one_holds_no_other_is_given_until_it_is_released(held: HeldPorts) -> None:
    mine = held.take(3)
    with HeldPorts() as other:
        assert not other.take_again(mine[2:])
        held.release()
        assert other.take_again(mine)


@linux
@pytest.mark.parametrize("kill", [False, True], ids=["ends", "is killed"])
def test_a_process_holds_its_ports_until_it(held: HeldPorts, kill: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_UNTIL_TOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        theirs = [int(port) for port in process.stdout.readline().split()]
        assert len(set(theirs)) == 3
        assert not any(held.take_again([port]) for port in theirs)
        if kill:
            process.kill()
        process.stdin.close()
        process.wait()
    assert held.take_again(theirs)


@linux
def test_a_server_can_listen_on_a_held_port_and_come_back_to_it(held: HeldPorts) -> None:
    (port,) = held.take(1)
    for _ in range(2):
        with socket.create_server((LOOPBACK, port)):
            pass


def test_ports_that_cannot_all_be_had_are_all_left(held: HeldPorts) -> None:
    mine = held.take(2)
    with HeldPorts() as other:
        spare = other.take(2)
        other.release()
        assert not held.take_again([*spare, mine[0]])
        assert other.take_again(spare)


def test_no_port_is_given_twice(held: HeldPorts, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two ports are left to choose from.
    monkeypatch.setattr(module, "_outgoing_min", lambda: module._PORT_MIN + 2)
    with pytest.raises(NoFreePortError, match="of 3 free loopback ports found; close some servers"):
        held.take(3)
