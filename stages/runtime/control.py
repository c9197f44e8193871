"""What operators told all processes: a process's ear for the keys of the bucket `FI_CONTROL`.

The bucket is the truth. What is heard as it is published only says that a look is due; a look is taken with every
`member_renew_s` anyway. Whoever listens is told the last message under its pattern at first, and then whenever that is
another one; what it could not do is told again at the next look, so nothing that was told is ever missed for good.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from contracts.budgets import CONTROL_LOOK
from contracts.errors import ClusterUnavailableError, TopologyError, UnreadableError, WireFormatError
from contracts.subjects import CONTROL
from stages.runtime.api import Api, RequestRefusedError
from stages.runtime.health import Check
from stages.runtime.messages import StoredMessage

log = logging.getLogger(__name__)

LOOK_REQUESTS: Final = 4
"""A look may take as long as so many requests."""
LOOKS_MAX: Final = 10
"""How often the bucket is looked at again when it does not show yet what was heard."""

Told = Callable[[StoredMessage | None], Awaitable[None]]
"""Takes the last message under a pattern; None when there is none. Raises `WireFormatError` for what it cannot obey:
that is shown, and stands until there is another message. Raises `ClusterUnavailableError` to be told again, and so
`UnreadableError`, which is shown too."""


class _Listener:
    """One pattern, and who is told."""

    def __init__(self, pattern: str, told: Told) -> None:
        self.pattern = pattern
        self.told = told
        self.seq: int | None = None
        """Stream sequence of what was told; 0: that there is nothing; None: nothing was told yet."""
        self.problem = ""
        self.unreadable = ""
        """Why the server cannot read what was said; empty while it can."""
        self.heard = asyncio.Event()


class Control:
    """One process's ear. `listen` before or while `run` runs.

    Args:
        api: the process's connection.
        changed: called after somebody was told something.
    """

    def __init__(self, api: Api, changed: Callable[[], None]) -> None:
        self._api = api
        self._changed = changed
        self._listeners: list[_Listener] = []
        self._due = asyncio.Event()
        self._looks = LOOKS_MAX
        self._silent = False
        self._looked = False

    async def listen(self, pattern: str, told: Told) -> None:
        """Lets `told` know of `pattern`, now and from now on. Returns once it was told for the first time.

        `run` must be running: it is what tells.
        """
        listener = _Listener(pattern, told)
        self._listeners.append(listener)
        self._due.set()
        await listener.heard.wait()

    def check(self) -> Check:
        """Whether everything that was told is obeyed, and whether the bucket can be read."""
        told = [why for listener in self._listeners for why in (listener.problem, listener.unreadable) if why]
        problems = list(dict.fromkeys(told))
        if self._silent:
            problems.append(f"{CONTROL} cannot be read now; what was told before holds")
        return Check(not problems, "; ".join(problems) or "obeys what was told")

    async def run(self) -> None:
        """Looks and tells until cancelled.

        Raises:
            TopologyError: the bucket is not there.
            ClusterUnavailableError: the connection was closed.
        """
        subscribed: dict[str, Subscription] = {}
        try:
            while True:
                self._due.clear()
                for listener in tuple(self._listeners):
                    if listener.pattern not in subscribed:
                        subscribed[listener.pattern] = await self._api.client.subscribe(listener.pattern, cb=self._hear)
                    await self._look(listener)
                await self._rest()
        finally:
            for subscription in subscribed.values():
                if not self._api.client.is_closed:
                    await subscription.unsubscribe()

    async def _hear(self, message: Msg) -> None:
        """Something was published; whether it is stored, the bucket will show."""
        self._looks = 0
        self._due.set()

    async def _look(self, listener: _Listener) -> None:
        """Looks for one listener, and tells it if there is something new."""
        settings = self._api.settings
        try:
            async with asyncio.timeout(LOOK_REQUESTS * settings.api_timeout_s):
                last = await self._api.last_message(CONTROL, listener.pattern)
                seq = 0 if last is None else last.seq
                if seq != listener.seq:
                    await self._tell(listener, last)
                    listener.seq = seq
                    listener.heard.set()
                    self._looks = LOOKS_MAX
                    self._changed()
        except TopologyError:
            if not self._looked:
                raise
            self._note_silence("is not there")
        except UnreadableError as error:
            # Something was said. What was told before holds; who was told nothing yet waits.
            if not listener.unreadable:
                log.error("%s; what was told before holds", error)
            listener.unreadable = str(error)
        except (TimeoutError, ClusterUnavailableError, RequestRefusedError) as error:
            if self._api.client.is_closed:
                raise ClusterUnavailableError("the connection was closed") from error
            self._note_silence("does not answer")
        else:
            self._looked, self._silent, listener.unreadable = True, False, ""

    async def _tell(self, listener: _Listener, last: StoredMessage | None) -> None:
        try:
            await listener.told(last)
        except UnreadableError:
            raise
        except WireFormatError as error:
            if listener.problem != str(error):
                log.error("%s; what was told before holds", error)
            listener.problem = str(error)
        else:
            listener.problem = ""

    def _note_silence(self, why: str) -> None:
        if not self._silent:
            log.warning("%s %s: what was told before holds; looking again", CONTROL, why)
        self._silent = True

    async def _rest(self) -> None:
        limit_s = self._api.settings.member_renew_s
        if self._looks < LOOKS_MAX:
            self._looks += 1
            limit_s = CONTROL_LOOK.s
        try:
            async with asyncio.timeout(limit_s):
                await self._due.wait()
        except TimeoutError:
            return
