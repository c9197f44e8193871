"""The waits in one place: what each means, their order, and `fictl config budgets`."""

from __future__ import annotations

import json
import typing
from dataclasses import dataclass

import msgspec
import pytest
from commandline import Captured, fictl

from contracts.budgets import BUDGETS, ORDERS, SETTING_WAITS, disorders
from contracts.errors import SettingsError
from contracts.settings import Settings, resolve_settings


def test_every_budget_says_who_waits_for_what_and_what_then() -> None:
    for name, budget in BUDGETS.items():
        assert name.isupper()
        assert budget.s > 0
        assert ": " in budget.waits or budget.waits.startswith("the same"), name
        assert budget.then, name


def test_every_setting_of_seconds_says_what_is_waited_for() -> None:
    hints = typing.get_type_hints(Settings)
    seconds = {name for name in hints if name.endswith(("_s", "_s_min", "_s_max"))}
    assert seconds == set(SETTING_WAITS)


def test_the_defaults_keep_every_order() -> None:
    assert disorders(Settings()) == []


@dataclass(frozen=True)
class Wrong:
    changes: dict[str, float]
    names: tuple[str, str]
    breaks: bool


WRONG = (
    Wrong({"member_renew_s": 3.0}, ("member_renew_s", "member_ttl_s"), True),
    Wrong({"heartbeat_s": 5.0, "pull_expires_s": 9.0, "member_ttl_s": 60}, ("heartbeat_s", "pull_expires_s"), True),
    Wrong({"drain_s": 2.0}, ("publish_timeout_s", "drain_s"), False),
    Wrong({"api_timeout_s": 2.0}, ("api_timeout_s", "publish_timeout_s"), False),
    Wrong({"heartbeats_missed_max": 6.0}, ("heartbeats_missed_max", "member_ttl_s"), False),
    Wrong({"retry_s_max": 2.5}, ("retry_s_max", "publish_timeout_s"), False),
)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.names[0])
def test_a_wait_that_is_not_over_before_another_is_found(wrong: Wrong) -> None:
    (found,) = disorders(msgspec.structs.replace(Settings(), **wrong.changes))
    assert found.order.breaks == wrong.breaks
    assert all(name in str(found) for name in wrong.names)


def test_every_order_is_tried_here() -> None:
    assert len(WRONG) == len(ORDERS)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.names[0])
def test_settings_that_break_an_order_are_refused_with_both_names(wrong: Wrong) -> None:
    env = {f"FI_{name.upper()}": str(value) for name, value in wrong.changes.items()}
    if not wrong.breaks:
        resolve_settings(env)
        return
    with pytest.raises(SettingsError) as caught:
        resolve_settings(env)
    assert all(name in str(caught.value) for name in wrong.names)


def test_fictl_config_budgets_prints_every_wait_with_its_meaning(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert fictl("--config", "", "config", "budgets", "--json", "--set", "drain_s=1.5") == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in told["budgets"]}
    assert set(rows) == set(BUDGETS) | set(SETTING_WAITS)
    assert rows["drain_s"] == {
        "name": "drain_s",
        "seconds": 1.5,
        "source": "command line",
        "kind": "limit",
        "waits": SETTING_WAITS["drain_s"].waits,
        "then": SETTING_WAITS["drain_s"].then,
    }
    assert rows["LET_GO"]["source"] == "constant"
    assert [(row["shorter"], row["longer"]) for row in told["disorders"]] == [("publish_timeout_s", "drain_s")]

    assert fictl("--config", "", "config", "budgets", "--set", "drain_s=1.5") == 0
    printed = capsys.readouterr()
    assert all(name in printed.out for name in rows)
    assert "publish_timeout_s = 2 must be below drain_s = 1.5" in printed.err
