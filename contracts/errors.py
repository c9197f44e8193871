"""Every failure the project raises on purpose, under one root.

A failure is *definite* (the other side refused: it did not happen) or *unknown* (a time-out: it may have
happened, so retry with the same identity). Callers choose by class, never by text.
"""

from __future__ import annotations


class FiError(Exception):
    """The root of every error raised by this project. The message says what to do next, and not at any length."""

    MESSAGE_CHARS_MAX = 4000

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= self.MESSAGE_CHARS_MAX else f"{text[: self.MESSAGE_CHARS_MAX]}…"


class DefiniteError(FiError):
    """The operation did not happen and will not happen by itself."""


class UnknownOutcomeError(FiError):
    """The operation may or may not have happened. Retry with the same identity."""


class SettingsError(DefiniteError):
    """A setting is missing, unknown or out of range. Names the setting and where it came from."""


class InvalidEventError(DefiniteError):
    """One event breaks the contract.

    Attributes:
        reason: short, bounded token for counters and headers, e.g. ``event_type.unknown``.
        field: the offending field, as a path such as ``payload.iteration``; empty for the whole message.
        detail: one sentence for a human, at most 300 characters.
    """

    DETAIL_CHARS_MAX = 300

    def __init__(self, reason: str, field: str, detail: str) -> None:
        self.reason = reason
        self.field = field
        self.detail = detail[: self.DETAIL_CHARS_MAX]
        super().__init__(f"{field or 'message'}: {self.detail} [{reason}]")

    def unraised(self) -> InvalidEventError:
        """The same to be kept: one that was raised holds every frame it went through, and what their variables hold."""
        return InvalidEventError(self.reason, self.field, self.detail)


class WireFormatError(DefiniteError):
    """Bytes that should be a frame, receipt or seal record are not, or are of a version this build cannot read."""


class UnreadableError(WireFormatError):
    """A server has a message and cannot read it any more: a file of its stream is damaged."""


class StrayFrameError(WireFormatError):
    """A message on a hop that no stage of any version wrote there: garbage, or a frame of another partition.

    Attributes:
        subject: where it lies.
    """

    def __init__(self, subject: str, seq: int, why: str) -> None:
        self.subject = subject
        super().__init__(f"{subject}: sequence {seq} does not belong there: {why}")


class FencedError(DefiniteError):
    """Another writer advanced the subject (or it was emptied): the server refused ours.

    Attributes:
        last_seq: the subject's true last sequence, when the server told it.
    """

    def __init__(self, subject: str, last_seq: int | None) -> None:
        self.subject = subject
        self.last_seq = last_seq
        super().__init__(f"{subject}: the last message is at sequence {last_seq}, written by somebody else")


class HoleError(DefiniteError):
    """The reader saw a frame that does not join on to its cursor: frames between them are gone."""

    def __init__(self, subject: str, cursor: int, prev: int) -> None:
        self.subject = subject
        self.cursor = cursor
        self.prev = prev
        super().__init__(f"{subject}: frames are missing between origin {cursor} and origin {prev}")


class CountsAnewError(DefiniteError):
    """`FI_EVENTS` gives sequences again that are settled: it is not, or no longer, the one they were given by."""


class TopologyError(DefiniteError):
    """The cluster's streams are not what the topology says, or a change to them would lose data."""


class NotAppliedError(TopologyError):
    """The cluster's streams were not made yet: it is to be set up first."""


class ClusterUnavailableError(UnknownOutcomeError):
    """No server answers, or the cluster has no leader now."""


class AccessDeniedError(ClusterUnavailableError):
    """A server does not let the URL's user do what is needed: it did not happen, and waiting does not help."""


class ShardError(DefiniteError):
    """A shard file cannot be used. Names the file and what to do."""


class ShardCorruptError(ShardError):
    """A shard's content contradicts its checksums or the receipts."""


class ShardLostError(ShardCorruptError):
    """The disk does not give a part of a shard: that is damaged, unless the disk comes to give it again.

    Its cause is the system's `OSError`.
    """


class StoreFailedError(FiError):
    """A write or fsync failed: the partition stops with nothing acknowledged that is not durable."""


class NotOursError(DefiniteError):
    """The partition's shards live in another store: this process must not write it."""


class ProofError(DefiniteError):
    """A proof, signature or witness does not show what it claims. Says what is wrong with it."""
