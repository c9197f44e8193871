"""What transports of nats-py do not offer. They hold a connection's socket, over TCP or TLS; a WebSocket has none."""

from __future__ import annotations

import fcntl
import struct
import termios
from typing import Any, Final

_INT: Final = struct.Struct("i")


def unwritten_bytes(transport: Any) -> int:
    """Bytes that the kernel has not taken yet; 1 where nothing may be written now.

    That is a WebSocket, which sends when drained, and a connection that was lost before anybody was told.
    """
    writer = getattr(transport, "_io_writer", None)
    if writer is None or writer.transport.is_closing():
        return 1
    unwritten: int = writer.transport.get_write_buffer_size()
    bare = getattr(transport, "_bare_io_writer", writer)
    # TLS hands what it has encrypted to a transport of its own.
    return unwritten if bare is writer else unwritten + bare.transport.get_write_buffer_size()


def unsent_bytes(transport: Any) -> int:
    """Bytes that the other end's kernel has not taken yet, as far as can be known; 0 of a connection that was lost."""
    writer = getattr(transport, "_io_writer", None)
    if writer is None or writer.transport.is_closing():
        return 0
    try:
        held = fcntl.ioctl(writer.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(_INT.size))
    except (OSError, ValueError):  # Of a socket that was closed just now.
        held = bytes(_INT.size)
    return unwritten_bytes(transport) + int(_INT.unpack(held)[0])


def cut(transport: Any) -> None:
    """Ends a connection now, and drops what the kernel has not taken.

    Closed, it would wait until the other end takes all of that, and over TLS for its farewell: of a frozen server, or
    one that is cut off, without end.
    """
    writer = getattr(transport, "_io_writer", None)
    if writer is not None:
        writer.transport.abort()
    elif transport is not None:
        transport.close()


def tell_of_tls(transport: Any) -> None:
    """Tells the stream of a connection that it goes over TLS now, which nats-py does not. Nothing was read from it yet.

    It would warn at every end of a connection, and take in without bounds what nobody has read yet.
    """
    writer = getattr(transport, "_io_writer", None)
    if writer is not None and writer.get_extra_info("sslcontext") is not None:
        protocol = writer.transport.get_protocol()
        if protocol is not None:  # It was not lost meanwhile.
            protocol.connection_made(writer.transport)
