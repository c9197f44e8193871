"""The versions of the policy in a cluster: what there is, setting another, and who judges by which."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

import msgspec

from cluster.members import keep_looking
from contracts.budgets import POLICY_WRITE
from contracts.errors import (
    ClusterUnavailableError,
    DefiniteError,
    FencedError,
    NotAppliedError,
    SettingsError,
    WireFormatError,
)
from contracts.membership import Member
from contracts.rules import BUILT_IN, DEFAULT_POLICY, Policy, encode_policy
from contracts.subjects import (
    CONTROL,
    MEMBERS,
    VERSION_DIGITS_MAX,
    members_pattern,
    pause_subject,
    policy_subject,
)
from stages.runtime.api import NO_STREAM, Api, RequestRefusedError
from stages.runtime.membership import readable
from stages.runtime.writer import FencedWriter
from stages.segment.policies import list_versions, read_version


class Unreadable(msgspec.Struct, frozen=True):
    """A version that this build cannot read, and why. It is never in force in processes of this build."""

    version: int
    why: str


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """Every version there is.

    Attributes:
        policies: those that can be read, ascending; the built-in one first. The last is in force.
        unreadable: those that cannot, ascending.
        rewritten: versions that something was written over by hand. Their first value counts.
    """

    policies: tuple[Policy, ...]
    unreadable: tuple[Unreadable, ...] = ()
    rewritten: tuple[int, ...] = ()

    @property
    def in_force(self) -> Policy:
        """The highest that can be read."""
        return self.policies[-1]

    @property
    def newest(self) -> int:
        """The highest there is."""
        return max(self.in_force.version, *(one.version for one in self.unreadable), BUILT_IN)


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """A process of segment, and the version it judges by."""

    name: str
    node: str
    version: int


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """How far a version has come.

    Attributes:
        holders: every process of segment.
        paused: the stage is paused.
    """

    holders: tuple[Holder, ...]
    paused: bool

    def behind(self, version: int) -> list[Holder]:
        """Those that do not judge by `version` or a later one."""
        return [holder for holder in self.holders if holder.version < version]


async def read_versions(api: Api, tell: Callable[[float, float], None], *, only_in_force: bool = False) -> Versions:
    """What there is; with `only_in_force` the one in force, and what cannot be read above it.

    Raises:
        NotAppliedError: the bucket is not there.
    """
    found = await _list_versions(api)
    policies: list[Policy] = []
    unreadable: list[Unreadable] = []
    for done, version in enumerate(reversed(found), 1):
        try:
            policies.append(await read_version(api, version))
        except WireFormatError as error:
            unreadable.append(Unreadable(version, str(error)))
        tell(done, len(found))
        if policies and only_in_force:
            break
    if not policies or not only_in_force:
        policies.append(DEFAULT_POLICY)
    return Versions(
        policies=tuple(reversed(policies)),
        unreadable=tuple(reversed(unreadable)),
        rewritten=tuple(version for version, values in found.items() if values > 1),
    )


async def _list_versions(api: Api) -> dict[int, int]:
    try:
        return await list_versions(api)
    except RequestRefusedError as refused:
        if refused.error.err_code == NO_STREAM:
            raise NotAppliedError(f"stream {CONTROL} does not exist; run `fictl cluster apply`") from refused
        raise


async def find_version(api: Api, version: int) -> Policy:
    """One version.

    Raises:
        SettingsError: there is none of that number.
        WireFormatError: this build cannot read it.
    """
    if version != BUILT_IN and version not in await _list_versions(api):
        raise SettingsError(f"there is no policy {version}; `fictl policy history` lists them")
    return await read_version(api, version)


async def set_policy(api: Api, policy: Policy) -> None:
    """Stores a version that there is not yet. Of two who store the same one at once, one is refused.

    Raises:
        DefiniteError: somebody else was faster; nothing was changed.
        ClusterUnavailableError: not answered in time; it may be stored or not.
    """
    if len(str(policy.version)) > VERSION_DIGITS_MAX:
        raise DefiniteError(f"{policy.version} is too large: the version before it was written by hand; see history")
    writer = FencedWriter(api, CONTROL, policy_subject(policy.version), f"policy-{secrets.token_hex(6)}")
    try:
        async with asyncio.timeout(POLICY_WRITE.s):
            await writer.publish(encode_policy(policy), str(policy.version))
    except FencedError:
        raise DefiniteError(
            f"policy {policy.version} was set by somebody else just now; look at it with `fictl policy show`, "
            "then set again"
        ) from None
    except TimeoutError:
        raise ClusterUnavailableError(
            f"{CONTROL} did not answer within {POLICY_WRITE.s:g} s; whether policy {policy.version} is set, "
            "`fictl policy history` shows"
        ) from None


async def look_at_spread(api: Api) -> Spread:
    """Who judges by which version now. Raises `ClusterUnavailableError`."""
    members: dict[str, Member] = readable(await api.last_messages(MEMBERS, [members_pattern("segment")]))
    pause = (await api.last_messages(CONTROL, [pause_subject("segment")])).get(pause_subject("segment"))
    holders = tuple(Holder(name=m.name, node=m.node, version=m.policy) for _, m in sorted(members.items()))
    return Spread(holders=holders, paused=pause is not None and bool(pause.data))


async def wait_for_spread(api: Api, version: int, limit_s: float, tell: Callable[[float, float], None]) -> Spread:
    """Looks until every process judges by `version` or a later one, for `limit_s` at most; gives what it saw last.

    Raises:
        ClusterUnavailableError: the members could not be seen at all.
    """

    def settled(spread: Spread) -> bool:
        behind = len(spread.behind(version))
        tell(len(spread.holders) - behind, len(spread.holders))
        return not behind

    return await keep_looking(lambda: look_at_spread(api), settled, limit_s)
