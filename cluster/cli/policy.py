"""`fictl policy show|set|history`: the rules that segment holds events to, and changing them while events flow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from cluster.cli.common import (
    DEFAULT_DIRECTORY,
    DirectoryOption,
    JsonOption,
    NatsOption,
    NotReadyError,
    console,
    find_servers,
    finite,
    login_place,
    print_json,
    progress_bar,
    run_async,
    say,
    with_api,
)
from contracts.budgets import POLICY_SPREAD
from contracts.errors import DefiniteError, SettingsError
from contracts.rules import (
    BUILT_IN,
    NOTE_CHARS_MAX,
    Difference,
    Policy,
    Rules,
    change_rules,
    diff_rules,
    parse_rules,
)
from contracts.wire import UNREADABLE
from stages.persist.files import read_small

if TYPE_CHECKING:
    from cluster.policies import Spread, Versions
    from stages.runtime.api import Api


def show(
    version: Annotated[int | None, typer.Argument(help="Which. Default: the one in force.", show_default=False)] = None,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Shows a version of the policy: its rules, who set it when and why, and which processes judge by it.

    The version in force is stored with every event that it passed (`policy_version`).

    Example: fictl policy show 3 --json
    """

    async def work(api: Api) -> tuple[Policy, Versions, Spread]:
        from cluster.policies import find_version, look_at_spread, read_versions

        versions = await read_versions(api, lambda done, total: None, only_in_force=True)
        policy = versions.in_force if version is None else await find_version(api, version)
        return policy, versions, await look_at_spread(api)

    with progress_bar("reading"):
        policy, versions, spread = run_async(with_api(find_servers(directory, nats), work))
    _warn(versions)
    if as_json:
        print_json(
            msgspec.structs.asdict(policy)
            | {"in_force": versions.in_force.version, "unreadable": versions.unreadable, "processes": spread.holders}
        )
        return
    is_in_force = policy.version == versions.in_force.version
    say(f"policy {policy.version}{', in force' if is_in_force else ''}: {_origin_words(policy)}")
    for name, value in msgspec.structs.asdict(policy.rules).items():
        typer.echo(f"{name} = {msgspec.json.encode(value).decode()}")
    for holder in spread.holders:
        say(f"{holder.name} on {holder.node} judges by {holder.version}")


def history(
    directory: DirectoryOption = DEFAULT_DIRECTORY, nats: NatsOption = None, as_json: JsonOption = False
) -> None:
    """Lists every version there ever was, oldest first: who set it when and why, and what it changed.

    Example: fictl policy history
    """

    async def work(api: Api) -> Versions:
        from cluster.policies import read_versions

        with progress_bar("reading") as tell:
            return await read_versions(api, tell)

    versions = run_async(with_api(find_servers(directory, nats), work))
    _warn(versions)
    rules = {policy.version: policy.rules for policy in versions.policies}
    changes = {p.version: diff_rules(rules.get(p.follows, Rules()), p.rules) for p in versions.policies}
    if as_json:
        rows = [msgspec.structs.asdict(policy) | {"changes": changes[policy.version]} for policy in versions.policies]
        print_json({"versions": rows, "unreadable": versions.unreadable, "rewritten": versions.rewritten})
        return
    for policy in versions.policies:
        console().print(f"{policy.version}  {_origin_words(policy)}")
        for change in changes[policy.version]:
            console().print(f"   {_change_words(change)}")


def set_(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE…", help="E.g. check_payload=false.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="JSON object of rules, as `policy show --json` has under rules.")
    ] = None,
    start: Annotated[
        int | None, typer.Option("--from", metavar="VERSION", help="Begin with the rules of this one: go back to it.")
    ] = None,
    note: Annotated[str, typer.Option(help="Why; kept with the version.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change; set nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until every process judges by it.")] = True,
    limit_s: Annotated[
        float, typer.Option("--timeout", min=0, callback=finite, help="Seconds to wait for the processes at most.")
    ] = POLICY_SPREAD.s,
    directory: DirectoryOption = DEFAULT_DIRECTORY,
    nats: NatsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sets the next version of the policy, and waits until every process of segment judges by it.

    What is given changes the rules in force, or those of --from: first what --file has, then each NAME=VALUE. The rules
    are check_payload, check_lifecycle, closed_remembered, payload_bytes_max, refused_types=TYPE,TYPE and
    criticality.TYPE=routine|elevated|critical (empty: as usual). It is checked before it is set, and holds from the
    next frame on: nothing is stopped, and what it refuses becomes a dead letter. Exits 3 if the time is up; it is set
    all the same.

    Example: fictl policy set payload_bytes_max=65536 refused_types=LLM_CALL_FAILED --note "ticket 12" --dry-run
    """
    if not words and file is None and start is None:
        raise SettingsError("say what to change, e.g. check_payload=false; or --file FILE, or --from VERSION")
    if len(note) > NOTE_CHARS_MAX:
        raise SettingsError(f"--note has {len(note)} characters; {NOTE_CHARS_MAX} are kept")
    given = None if file is None else _read_rules(file)

    async def work(api: Api) -> tuple[Policy, list[Difference], Spread | None]:
        from cluster.policies import set_policy, wait_for_spread

        with progress_bar("setting"):
            policy, changes = await _next(api, start, given or {}, words or [], note)
            if not dry_run:
                await set_policy(api, policy)
        if dry_run or not wait:
            return policy, changes, None
        with progress_bar("waiting for segment") as tell:
            return policy, changes, await wait_for_spread(api, policy.version, limit_s, tell)

    policy, changes, spread = run_async(with_api(find_servers(directory, nats), work))
    behind = [] if spread is None else spread.behind(policy.version)
    if as_json:
        print_json(
            msgspec.structs.asdict(policy)
            | {"changes": changes, "set": not dry_run, "settled": spread is not None and not behind}
            | {"processes": () if spread is None else spread.holders, "paused": spread is not None and spread.paused}
        )
    else:
        for change in changes:
            typer.echo(_change_words(change))
        say(f"policy {policy.version} {'would be' if dry_run else 'is'} set" + _spread_words(spread))
    if behind:
        late = ", ".join(f"{one.name} on {one.node} judges by {one.version or 'none'}" for one in behind)
        raise NotReadyError(
            f"policy {policy.version} is set, but after {limit_s:g} s {late}; `fictl health` and its log say why"
        )


async def _next(
    api: Api, start: int | None, given: dict[str, Any], words: list[str], note: str
) -> tuple[Policy, list[Difference]]:
    """The version after the newest: the rules in force, or of version `start`, with what `given` and `words` change.

    Gives it, and in what it differs from the one in force. Raises `DefiniteError`: in nothing.
    """
    from cluster.policies import find_version, read_versions

    versions = await read_versions(api, lambda done, total: None, only_in_force=True)
    _warn(versions)
    before = versions.in_force
    base = before if start is None else await find_version(api, start)
    rules = change_rules(base.rules, given)
    rules = change_rules(rules, parse_rules(words, rules))
    changes = diff_rules(before.rules, rules)
    if not changes:
        raise DefiniteError(f"nothing changes: policy {before.version}, which is in force, says just that")
    by, since_ns = login_place(), time.time_ns()
    version = versions.newest + 1
    return Policy(version=version, rules=rules, since_ns=since_ns, by=by, note=note, follows=before.version), changes


def _spread_words(spread: Spread | None) -> str:
    if spread is None:
        return ""
    if not spread.holders:
        return "; no process of segment runs: they read it when they start"
    return f"; {len(spread.holders)} processes of segment" + (", which is paused" if spread.paused else "")


def _read_rules(file: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(read_small(file), type=dict[str, Any])
    except UNREADABLE as error:
        raise SettingsError(f"{file} is no JSON object of rules: {error}") from None


def _warn(versions: Versions) -> None:
    for one in versions.unreadable:
        if one.version > versions.in_force.version:
            say(f"fi: {one.why}; policy {versions.in_force.version} stays in force until a version after it is set")
    for version in versions.rewritten:
        say(f"fi: policy.{version} was written over by hand; its first value counts")


def _origin_words(policy: Policy) -> str:
    if policy.version == BUILT_IN:
        return "built in"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(policy.since_ns / 1e9))
    return f"set {when} by {policy.by}, after {policy.follows}" + (f": {policy.note}" if policy.note else "")


def _change_words(change: Difference) -> str:
    rule, _, event_type = change.rule.partition(".")
    if rule == "refused_types":
        return f"{event_type}: {'refused' if change.after else 'no longer refused'}"
    before, after = (
        "as usual" if value is None else msgspec.json.encode(value).decode() for value in (change.before, change.after)
    )
    return f"{change.rule}: {before} -> {after}"
