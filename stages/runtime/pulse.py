"""Whether the server of a connection lives, and what it has surely read. A slow link is not a dead server."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

NOTHING: Final = -1


class Pulse:
    """Judges a server once an interval, each time before it is pinged.

    Whatever is read from it is a sign of life. Until the first ping that it owes an answer to has left, so is that
    something leaves: that ping waits behind what was written before it, 16 s behind 2 MB at 1 Mbit/s. Once it has left,
    bytes that leave say nothing: the kernel of a frozen server takes them.

    Positions are in bytes that were given to the client.

    Args:
        in_vain_max: as many pings in vain, without a sign of life, and the server is lost.
        left: how many bytes have left, now.

    Attributes:
        reached: how many bytes have surely come to the server, which shows signs of life; else `NOTHING` is known.
    """

    def __init__(self, in_vain_max: int, left: int) -> None:
        self._in_vain_max = in_vain_max
        self._in_vain = 0
        self._left = self._read = left
        self._pings: deque[tuple[asyncio.Future[bool], int]] = deque()
        self.reached = NOTHING

    def ping(self, given: int) -> asyncio.Future[bool]:
        """One that is sent now, after so many bytes: done when it is answered."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._pings.append((answer, given))
        return answer

    def beat(self, left: int, *, heard: bool) -> bool:
        """False when the server is lost.

        Args:
            left: how many bytes have left so far.
            heard: something was read since the last beat.
        """
        moves, self._left = left > self._left, left
        while self._pings and self._pings[0][0].done():
            self._read = self._pings.popleft()[1]
        owed = bool(self._pings)
        lives = heard or not owed or (moves and left < self._pings[0][1])
        self._in_vain = 0 if lives else self._in_vain + 1
        # A hop on the way may have taken what left; the answer to a ping comes behind what the server read before it.
        reached = self._read if owed else max(self._read, left)
        self.reached = reached if heard or moves else NOTHING
        return self._in_vain < self._in_vain_max
