"""The example settings name every key, with the default where they say so, and the real loader takes them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from magnetar.cli.roles.process import SETTINGS
from magnetar.node.settings_loading import DEFAULT, SettingsError, load_settings

SETTINGS_FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "settings"
COMMENTED = re.compile(r"^#(?=[a-z_]+ = )", re.MULTILINE)

every_role = pytest.mark.parametrize("role", SETTINGS)


def example(role: str) -> str:
    return (SETTINGS_FOLDER / f"{role}.toml").read_text()


def test_there_is_one_example_for_each_role() -> None:
    assert {path.stem for path in SETTINGS_FOLDER.iterdir()} == set(SETTINGS)


@every_role
def test_an_example_loads_as_it_is_and_sets_only_what_is_required(role: str) -> None:
    model = SETTINGS[role]
    loaded = load_settings(model, role, file=SETTINGS_FOLDER / f"{role}.toml", environment={})
    required = {key for key, field in model.model_fields.items() if field.is_required()}
    assert {key for key, _, source in loaded.table() if source != DEFAULT} == required


@every_role
def test_an_example_shows_every_key_and_no_other(role: str) -> None:
    assert set(tomllib.loads(COMMENTED.sub("", example(role)))) == set(SETTINGS[role].model_fields)


@every_role
def test_what_an_example_shows_as_default_is_the_default(role: str, tmp_path: Path) -> None:
    opened = tmp_path / "all.toml"
    opened.write_text(COMMENTED.sub("", example(role)))
    shown = load_settings(SETTINGS[role], role, file=opened, environment={})
    as_it_is = load_settings(SETTINGS[role], role, file=SETTINGS_FOLDER / f"{role}.toml", environment={})
    assert shown.settings == as_it_is.settings
    assert DEFAULT not in shown.sources.values()


@every_role
def test_every_key_is_explained_right_above_it(role: str) -> None:
    lines = example(role).splitlines()
    for number, line in enumerate(lines):
        if re.match(r"#?[a-z_]+ = ", line):
            assert lines[number - 1].startswith("# "), line
            comment = "\n".join(lines[:number]).rpartition("\n\n")[2]
            assert re.search(r"Required|Default", comment), line


def test_a_key_that_does_not_exist_is_refused_in_a_file(tmp_path: Path) -> None:
    wrong = tmp_path / "bookie.toml"
    wrong.write_text(example("bookie") + "\nlease = 3\n")
    with pytest.raises(SettingsError, match="did you mean lease_s"):
        load_settings(SETTINGS["bookie"], "bookie", file=wrong, environment={})
