"""What the test kit cannot do, and why."""

from __future__ import annotations

from contracts.errors import DefiniteError


class NotSupportedError(DefiniteError):
    """This backend, machine or user cannot do that. The message says why, and what to do instead."""


class NoEngineError(NotSupportedError):
    """There is no Docker engine to use."""
