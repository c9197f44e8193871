"""Settings: which layer wins, what a mistake is told like, and what is never shown."""

from __future__ import annotations

import msgspec
import pytest

from contracts.errors import SettingsError
from contracts.settings import (
    Settings,
    SettingsFile,
    Source,
    hide_credentials,
    load_settings,
    resolve_settings,
    shown_value,
)


def toml(**values: object) -> SettingsFile:
    return SettingsFile("etc/fi.toml", values)


def test_each_layer_is_stronger_than_the_one_below_and_every_value_says_where_it_is_from() -> None:
    file = toml(replicas=1, partitions=2, drain_s=3)
    env = {"FI_PARTITIONS": "4", "FI_DRAIN_S": "5", "HOME": "/"}
    found = resolve_settings(env, {"drain_s": "6", "trim_s": None}, file=file, defaults=Settings(sealed_kept=7))
    assert found.settings == Settings(sealed_kept=7, replicas=1, partitions=4, drain_s=6.0)
    assert set(found.sources) == set(Settings.__struct_fields__)
    given = {name: source for name, source in found.sources.items() if source.layer != "default"}
    assert given == {
        "replicas": Source("file", "etc/fi.toml"),
        "partitions": Source("environment", "FI_PARTITIONS"),
        "drain_s": Source("command line", "--set drain_s"),
    }
    assert found.sources["sealed_kept"] == Source("default")


def test_the_file_beats_given_defaults_also_with_the_built_in_value() -> None:
    found = resolve_settings({}, file=toml(health_port=-1), defaults=Settings(health_port=0))
    assert found.settings.health_port == -1
    assert found.sources["health_port"].layer == "file"


def test_the_variable_that_names_the_file_is_no_setting() -> None:
    assert load_settings({"FI_CONFIG": "/etc/fi.toml"}) == Settings()


@pytest.mark.parametrize(
    ("env", "overrides", "file", "words"),
    [
        ({"FI_PARTITION": "4"}, {}, None, "environment variable FI_PARTITION names .*; did you mean FI_PARTITIONS?"),
        ({}, {"partition": "4"}, None, "command line: partition names .*; did you mean partitions?"),
        ({}, {}, toml(shard_byte=1), "etc/fi.toml: shard_byte names .*; did you mean shard_bytes?"),
        ({}, {}, toml(**{"FI_DRAIN-S": 1}), "etc/fi.toml: FI_DRAIN-S names .*; did you mean drain_s?"),
        ({}, {}, toml(xyzzy=1), "etc/fi.toml: xyzzy names .*`fictl config show`"),
        ({}, {}, toml(persist={"drain_s": 1}), "etc/fi.toml: persist is a section.* NAME = VALUE"),
    ],
)
def test_an_unknown_name_is_refused_with_its_place_and_the_nearest_name(
    env: dict[str, str], overrides: dict[str, str], file: SettingsFile | None, words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        load_settings(env, overrides, file=file)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (toml(partitions=0), "etc/fi.toml: partitions = 0: .*>= 1"),
        (toml(partitions="8"), "etc/fi.toml: partitions = '8': .*`int`"),
        (toml(drain_s=float("inf")), "etc/fi.toml: drain_s = inf"),
        (toml(drain_s=float("nan")), "etc/fi.toml: drain_s = nan"),
        (toml(seal_on_drain=1), "etc/fi.toml: seal_on_drain = 1: .*`bool`"),
        (toml(hop_storage="tape"), "etc/fi.toml: hop_storage = 'tape'"),
        (toml(pull_batch=[1]), "etc/fi.toml: pull_batch = "),
        # TOML takes it in hexadecimal; Python writes none of more than 4,300 digits.
        (toml(partitions=16**5000), "etc/fi.toml: partitions = a number of thousands of digits: "),
        (toml(health_host=""), "etc/fi.toml: health_host = ''"),
    ],
)
def test_a_value_of_the_wrong_type_or_out_of_range_names_file_and_key_though_the_environment_hides_it(
    file: SettingsFile, words: str
) -> None:
    (name,) = file.values
    with pytest.raises(SettingsError, match=words):
        load_settings({f"FI_{name.upper()}": str(getattr(Settings(), name))}, file=file)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(SettingsError) as told:
        load_settings({"FI_REPLICAS": "9", "FI_NONSENSE": "1"}, {"trim_s": "soon"}, file=toml(partitions=0))
    for word in ("FI_REPLICAS", "FI_NONSENSE", "trim_s", "etc/fi.toml: partitions"):
        assert word in str(told.value)


def test_announcing_less_often_than_members_expire_is_refused() -> None:
    assert load_settings({"FI_MEMBER_TTL_S": "9"}, file=toml(member_renew_s=5)).member_renew_s == 5
    with pytest.raises(SettingsError, match=r"member_renew_s = 5 .* member_ttl_s = 3"):
        load_settings({}, file=toml(member_renew_s=5))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("", ""),
        ("http://host:4318", "http://host:4318"),
        ("http://user:pass@host:4318/v1", "http://***@host:4318/v1"),
        ("https://token@host", "https://***@host"),
        ("http://host/path?token=pass", "http://host/path?***"),
        ("http://user:p@ss/w?rd#1@host", "http://***@host"),
        ("http://user:pass@host?mail=a@b", "http://***@b"),
        ("user:pass@host", "***@host"),
        ("http://user:pa\nss@[::1]:4318", "http://***@[::1]:4318"),
    ],
)
def test_user_password_and_query_of_a_url_are_hidden(url: str, shown: str) -> None:
    assert hide_credentials(url) == shown
    assert shown_value("otlp_endpoint", url) == shown


def test_a_mistake_in_a_secret_setting_does_not_show_it() -> None:
    with pytest.raises(SettingsError) as told:
        load_settings({}, file=toml(otlp_endpoint=["http://user:hunter2@host"]))
    assert "etc/fi.toml: otlp_endpoint = '***'" in str(told.value)
    assert "hunter2" not in str(told.value)


def test_only_secrets_are_hidden() -> None:
    values = msgspec.structs.asdict(Settings(signing_key_file="/etc/a@b?.pem"))
    assert {name: shown_value(name, value) for name, value in values.items()} == values
