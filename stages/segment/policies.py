"""The policy in force in this process: read before the first lane starts, and again whenever a version is added.

Always true: it is the highest version that this build can read whole, and it only grows. What cannot be read is not
taken: the process goes on by the version before it, as those that ran already do, and says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from contracts.budgets import POLICY_FRESH
from contracts.errors import UnreadableError, WireFormatError
from contracts.rules import BUILT_IN, DEFAULT_POLICY, Policy, decode_policy
from contracts.subjects import CONTROL, POLICY_PATTERN, policy_subject, policy_version
from contracts.telemetry import POLICY_HITS, POLICY_MISSES, POLICY_VERSION
from stages.runtime.api import Api, RequestRefusedError
from stages.runtime.messages import StoredMessage

log = logging.getLogger(__name__)


class _Subjects(msgspec.Struct):
    """The parts of a stream's description that name its subjects."""

    class State(msgspec.Struct):
        subjects: dict[str, int] | None = None

    state: State
    total: int = 0


async def list_versions(api: Api) -> dict[int, int]:
    """Every version there is a key of, ascending → how many values it holds. More than one: written by hand.

    Raises:
        TopologyError, RequestRefusedError: the bucket is not there.
    """
    found: dict[int, int] = {}
    seen = 0
    while True:
        what = {"subjects_filter": POLICY_PATTERN, "offset": seen}
        answer = await api.ask(CONTROL, f"$JS.API.STREAM.INFO.{CONTROL}", msgspec.json.encode(what), _Subjects)
        page = answer.state.subjects or {}
        seen += len(page)
        found |= {policy_version(subject): values for subject, values in page.items()}
        if not page or seen >= answer.total:
            # Version 1 is built in; a key of that name, or of no number, is nobody's.
            return {version: found[version] for version in sorted(found) if version > BUILT_IN}


async def read_version(api: Api, version: int) -> Policy:
    """One version. Its first value counts: it was written once, whatever was put over it by hand.

    Raises:
        WireFormatError: this build cannot read it.
        UnreadableError: nor can the server.
    """
    if version == BUILT_IN:
        return DEFAULT_POLICY
    subject = policy_subject(version)
    # Where there is none, the last one tells whether the server passes over it.
    message = await api.first_message(CONTROL, subject) or await api.last_message(CONTROL, subject)
    return decode_policy(b"" if message is None else message.data, version)


class Policies:
    """See the module's text.

    Args:
        api: the process's connection.
        changed: called after another version is in force.
    """

    def __init__(self, api: Api, changed: Callable[[], None]) -> None:
        self._api = api
        self._changed = changed
        self._policy = DEFAULT_POLICY
        self._taking = asyncio.Lock()
        self._hits = api.telemetry.counter(POLICY_HITS, {})
        self._misses = api.telemetry.counter(POLICY_MISSES, {})
        api.telemetry.read_from(POLICY_VERSION, lambda: [({}, self._policy.version)])

    @property
    def version(self) -> int:
        """The one in force."""
        return self._policy.version

    def for_frame(self) -> Policy:
        """The policy that a frame is judged by, which begins now."""
        self._hits.add()
        return self._policy

    async def take(self, told: StoredMessage | None = None) -> None:
        """Reads what versions there are, and takes the highest that can be read.

        Raises:
            WireFormatError: one that is higher than that cannot be read.
            UnreadableError: nor by the server, as it says: it is taken once another one leads.
        """
        async with self._taking:
            problems = []
            for version in reversed(await list_versions(self._api)):
                if version <= self._policy.version:
                    break
                try:
                    policy = await read_version(self._api, version)
                except UnreadableError:
                    raise
                except WireFormatError as error:
                    problems.append(str(error))
                    continue
                self._misses.add()
                before, self._policy = self._policy.version, policy
                log.warning("policy %d by %s is in force, after %d: %s", version, policy.by, before, policy.note or "-")
                self._changed()
                break
            if problems:
                raise WireFormatError(f"{'; '.join(problems)}; policy {self._policy.version} stays in force")

    async def refresh(self) -> None:
        """Looks now. A lane does so before it goes on where another process stopped, so that versions do not go back.

        Where the bucket does not answer in time, what is known holds: that is no reason to keep events waiting.
        """
        try:
            async with asyncio.timeout(POLICY_FRESH.s):
                await self.take()
        except (TimeoutError, RequestRefusedError):
            log.warning("%s does not answer: going on by policy %d", CONTROL, self._policy.version)
        except WireFormatError as error:
            log.debug("%s", error)
