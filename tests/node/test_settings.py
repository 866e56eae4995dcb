"""Settings of the roles: where values come from, in which order, and what is refused with which words."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.node.settings import (
    BookieSettings,
    BrokerSettings,
    Listening,
    MetadataSettings,
    is_loopback,
    split_address,
)
from magnetar.node.settings_loading import DEFAULT, SettingsError, load_settings, variable

MODELS: dict[str, type[Listening]] = {"metadata": MetadataSettings, "bookie": BookieSettings, "broker": BrokerSettings}


def load(role: str, *assignments: str, file: Path | None = None, **environment: str) -> Any:
    return load_settings(MODELS[role], role, assignments=assignments, file=file, environment=environment)


def refusal(role: str, *assignments: str, file: Path | None = None, **environment: str) -> str:
    with pytest.raises(SettingsError) as refused:
        load(role, *assignments, file=file, **environment)
    message = str(refused.value)
    assert "\n" not in message
    assert not {"pydantic", "Input should", "Value error", "validation", "Field"} & {
        words for words in ("pydantic", "Input should", "Value error", "validation", "Field") if words in message
    }
    return message


def test_the_command_goes_before_the_environment_before_the_file_before_the_default(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('id = "of-file"\ncluster = "of-file"\nlease_s = 1\nsegment_s = 2.5\n')
    loaded = load(
        "broker",
        "id=of-set",
        file=file,
        MAGNETAR_BROKER__ID="of-environment",
        MAGNETAR_BROKER__CLUSTER="of-environment",
        MAGNETAR_BOOKIE__NO_SUCH_KEY="another role's",
    )
    settings = loaded.settings
    assert (settings.id, settings.cluster, settings.lease_s, settings.segment_s) == (
        "of-set", "of-environment", 1.0, 2.5,
    )  # fmt: skip
    assert settings.ack_quorum == 2
    sources = {key: source for key, _, source in loaded.table()}
    assert sources["id"] == "--set"
    assert sources["cluster"] == "MAGNETAR_BROKER__CLUSTER"
    assert sources["lease_s"] == str(file)
    assert sources["ack_quorum"] == DEFAULT
    assert set(sources) == set(BrokerSettings.model_fields)


def test_the_last_of_two_assignments_counts_and_a_value_may_hold_an_equals_sign() -> None:
    assert load("bookie", "id=a", "data_dir=/x", "id=b", "rack=row=3").settings.id == "b"
    assert load("bookie", "id=a", "data_dir=/x", "rack=row=3").settings.rack == "row=3"


def test_an_unknown_key_is_refused_wherever_it_stands_and_the_nearest_one_named(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text('id = "b"\nsegment_byte = 1\n')
    assert "segment_byte" in (message := refusal("broker", file=file))
    assert "did you mean segment_bytes?" in message
    assert str(file) in message
    assert "did you mean segment_bytes?" in refusal("broker", "id=b", "segment-bytes=1")
    message = refusal("broker", "id=b", MAGNETAR_BROKER__SEGMENT_BYTS="1")
    assert "MAGNETAR_BROKER__SEGMENT_BYTS" in message
    assert "did you mean segment_bytes?" in message
    assert "known are" in refusal("broker", "id=b", "xyzzy=1")
    assert "two underscores" in refusal("broker", "id=b", MAGNETAR_BROKER_ID="c")


def test_what_is_required_is_said_with_all_ways_to_give_it() -> None:
    message = refusal("bookie", "data_dir=/x")
    assert message.startswith("id is required")
    assert "--set id=" in message
    assert variable("bookie", "id") == "MAGNETAR_BOOKIE__ID"
    assert "MAGNETAR_BOOKIE__ID" in message
    assert refusal("bookie", "id=b").startswith("data_dir is required")
    assert refusal("metadata").startswith("data_dir is required")


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("id=a/b", "letters, digits"),
        ("id=", "letters, digits"),
        ("id=" + "x" * 250, "249"),
        ("segment_bytes=many", "whole number"),
        ("segment_bytes=2Mibble", "such as 64MiB"),
        ("segment_bytes=" + "9" * 400 + "MB", "such as 64MiB"),
        ("segment_bytes=1kB", "at least 65536"),
        ("segment_bytes=1.5", "whole number"),
        ("segment_bytes=1", "at least 65536"),
        ("lease_s=soon", "must be a number"),
        ("lease_s=nan", "must be a number"),
        ("lease_s=-1", "at least 0.1"),
        ("segment_s=0", "more than 0"),
        ("ensemble_size=17", "at most 16"),
        ("new_cluster=perhaps", "true or false"),
        ("listen=7650", "host:port"),
        ("listen=:7650", "host:port"),
        ("listen=::1:7650", "host:port"),
        ("listen=a:65536", "65535"),
        ("listen=a:٣", "65535"),
        ("advertised_address=0.0.0.0:1", "name this host"),
        ("metadata=localhost:2379", "etcd://"),
        ("metadata=etcd://", "host:port"),
        ("metadata=etcd://a:1,", "host:port"),
        ("metadata=etcd://a:0", "port"),
        ("ack_quorum=4", "quorums must nest"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_would(assignment: str, words: str) -> None:
    message = refusal("broker", "id=b", assignment)
    assert words in message
    if not assignment.startswith("ack_quorum"):
        assert message.startswith(assignment.partition("=")[0])
        assert "from=`--set`" in message


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("2MiB", 2 << 20), ("10MB", 10_000_000), ("1GB", 10**9), ("1.5 GiB", 3 << 29), ("65536", 65_536)],
)
def test_a_size_may_have_a_unit(tmp_path: Path, text: str, size_bytes: int) -> None:
    assert load("broker", "id=b", f"segment_bytes={text}").settings.segment_bytes == size_bytes
    assert load("broker", "id=b", MAGNETAR_BROKER__SEGMENT_BYTES=text).settings.segment_bytes == size_bytes
    (tmp_path / "broker.toml").write_text(f'id = "b"\nsegment_bytes = "{text}"\ncache_bytes = 1048576\n')
    settings = load("broker", file=tmp_path / "broker.toml").settings
    assert (settings.segment_bytes, settings.cache_bytes) == (size_bytes, 1 << 20)


def test_a_directory_has_a_name_and_its_home_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "must name a directory" in refusal("bookie", "id=b", "data_dir=")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load("bookie", "id=b", "data_dir=~/data").settings.data_dir == Path("/home/somebody/data")


def test_a_bookie_is_writable_again_below_where_it_becomes_read_only() -> None:
    assert "writable_at must be below" in refusal("bookie", "id=b", "data_dir=/x", "read_only_at=0.5")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"id =", "not TOML"),
        (b"id = \xff", "not UTF-8"),
        (b"[broker]\nid = 'b'", "remove [broker]"),
        (b"id = 5", "must be text"),
        (b"id = ['b']", "must be text"),
        (b"#" * (1 << 20) + b"#", "larger than"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_bytes(content)
    message = refusal("broker", file=file)
    assert words in message
    assert str(file) in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert "no such file" in refusal("broker", file=tmp_path / "absent")
    assert "is a directory" in refusal("broker", file=tmp_path)


def test_an_assignment_without_an_equals_sign_is_refused() -> None:
    assert "--set takes key=value" in refusal("broker", "id")


@given(
    st.sampled_from(sorted(MODELS)), st.dictionaries(st.sampled_from(sorted(BookieSettings.model_fields)), st.text())
)
def test_whatever_is_given_is_taken_or_refused(role: str, values: dict[str, str]) -> None:
    with suppress(SettingsError):
        load(role, *(f"{key}={value}" for key, value in values.items()))


def test_http_is_served_one_port_above_unless_it_is_told_otherwise() -> None:
    assert load("broker", "id=b").settings.http_address == "127.0.0.1:7651"
    assert load("broker", "id=b", "listen=[::1]:80").settings.http_address == "[::1]:81"
    assert load("broker", "id=b", "listen=127.0.0.1:0").settings.http_address == "127.0.0.1:0"
    assert "set http_listen too" in refusal("broker", "id=b", "listen=127.0.0.1:65535")
    assert load("broker", "id=b", "http_listen=127.0.0.1:9").settings.http_address == "127.0.0.1:9"


def test_addresses_are_split_as_they_are_written() -> None:
    assert split_address("[::1]:80") == ("[::1]", 80)
    assert split_address("host:0") == ("host", 0)
    assert is_loopback("127.0.0.9")
    assert is_loopback("localhost")
    assert not is_loopback("10.0.0.1")
