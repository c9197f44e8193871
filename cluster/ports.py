"""Free TCP ports on the loopback interface, none of them fixed.

Ports come from below the range the kernel hands out to outgoing connections: a client that keeps trying to reconnect to
a dead server's port could otherwise be given that very port, connect to itself, and keep the server out.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable
from pathlib import Path

from contracts.errors import DefiniteError

LOOPBACK = "127.0.0.1"
_PORT_MIN = 10_000
_PORT_MAX = 32_767
_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES_PER_PORT = 200


class NoFreePortError(DefiniteError):
    """No free port was found on the loopback interface."""


def is_free(port: int) -> bool:
    """True when a server could listen on this loopback port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Connections of an earlier server in TIME_WAIT do not keep a new one out.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def free_ports(count: int, rng: random.Random, avoid: Iterable[int] = ()) -> list[int]:
    """`count` different ports that are free now, none of them in `avoid`. They may be gone a moment later.

    Raises:
        NoFreePortError: too few were found.
    """
    taken, found = set(avoid), list[int]()
    ceiling = min(_PORT_MAX, _outgoing_min() - 1)
    low = _PORT_MIN if ceiling > _PORT_MIN else 1024
    for _ in range(count * _TRIES_PER_PORT):
        if len(found) == count:
            return found
        port = rng.randint(low, max(low, ceiling))
        if port not in taken and is_free(port):
            taken.add(port)
            found.append(port)
    raise NoFreePortError(f"{len(found)} of {count} free loopback ports found; close some servers and try again")


def _outgoing_min() -> int:
    try:
        return int(_RANGE_FILE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _PORT_MAX + 1
