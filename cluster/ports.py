"""TCP ports of the loopback interface that are kept for one user, none of them fixed.

Ports come from below the range the kernel hands out to outgoing connections: a client that keeps trying to reconnect to
a dead server's port could otherwise be given that very port, connect to itself, and keep the server out.
"""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from contracts.errors import DefiniteError

LOOPBACK = "127.0.0.1"
_PORT_MIN = 10_000
_PORT_MAX = 32_767
_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES_PER_PORT = 200


class NoFreePortError(DefiniteError):
    """No free port was found on the loopback interface."""


class HeldPorts:
    """Ports that nobody else who asks here is given until `release` or the end of this process, listened on or not.

    A server that is down finds its ports free when it comes back, though clusters start beside it in other processes.
    What keeps a port is a name in the kernel's abstract socket namespace (unix(7)), which goes by network like ports
    themselves and ends with its process; where there is none, as on macOS, a port is only looked at.
    """

    def __init__(self) -> None:
        self._rng = random.Random()
        self._names: dict[int, socket.socket] = {}

    def __enter__(self) -> HeldPorts:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, count: int) -> list[int]:
        """`count` ports, different from each other and from those already held, on which nobody listens now.

        Raises:
            NoFreePortError: too few were found; then none is taken.
        """
        found = list[int]()
        ceiling = min(_PORT_MAX, _outgoing_min() - 1)
        low = _PORT_MIN if ceiling > _PORT_MIN else 1024
        for _ in range(count * _TRIES_PER_PORT):
            if len(found) == count:
                break
            port = self._rng.randint(low, max(low, ceiling))
            if self._hold(port):
                found.append(port)
        if len(found) < count:
            self._drop(found)
            raise NoFreePortError(
                f"{len(found)} of {count} free loopback ports found; close some servers and try again"
            )
        return found

    def take_again(self, ports: Sequence[int]) -> bool:
        """Takes exactly these, unless one of them is listened on or held; then none, and False."""
        for index, port in enumerate(ports):
            if not self._hold(port):
                self._drop(ports[:index])
                return False
        return True

    def release(self) -> None:
        """Others may have them all."""
        self._drop(list(self._names))

    def _hold(self, port: int) -> bool:
        if port in self._names:
            return False
        name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if sys.platform == "linux":
                name.bind(f"\0fi-port-{port}")
            _bind(port)
        except OSError:
            name.close()
            return False
        self._names[port] = name
        return True

    def _drop(self, ports: Sequence[int]) -> None:
        for port in ports:
            self._names.pop(port).close()


def _bind(port: int) -> None:
    """Raises `OSError` where a server could not listen on this loopback port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Connections of an earlier server in TIME_WAIT do not keep a new one out.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((LOOPBACK, port))


def _outgoing_min() -> int:
    try:
        return int(_RANGE_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _PORT_MAX + 1
