"""Waiting for a condition. Nothing here, or built on it, waits for time to pass."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, Final

SETTLED_LIMIT_S: Final = 120.0
"""How long a pipeline may take for whatever a test waits for, on a machine that does other work too."""
_POLL_S: Final = 0.05


async def until(condition: Callable[[], Any], what: str, limit_s: float = SETTLED_LIMIT_S) -> Any:
    """Polls a condition until it is true, and gives what it gave.

    Args:
        condition: gives a value, or an awaitable of one.
        what: is awaited; for the message.
        limit_s: seconds.

    Raises:
        AssertionError: it did not come true in time.
    """
    try:
        async with asyncio.timeout(limit_s):
            while True:
                value = condition()
                if inspect.isawaitable(value):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {limit_s:.0f} s: {what}") from None
