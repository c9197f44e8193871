"""Turns of the event loop, where a test judges what is done in which of them."""

from __future__ import annotations

import asyncio


async def turns(count: int = 5) -> None:
    """Lets everything else that is ready run, `count` times."""
    for _ in range(count):
        await asyncio.sleep(0)
