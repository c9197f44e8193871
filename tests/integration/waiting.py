"""The type of the `eventually` fixture."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

Condition = Callable[[], object]
"""Gives something true, or an awaitable of it, once it holds."""
Eventually = Callable[[Condition], Awaitable[None]]
