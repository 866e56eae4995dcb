"""Reads the settings of a role: `--set` over the environment over the file over the defaults.

Every key that is not known is an error, wherever it stands, and so is a value that does not fit. An error is one line
that names the key, where it came from, and what to write instead.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from magnetar.node.settings import NAME_PATTERN, Settings

FILE_BYTES_MAX = 1 << 20
DEFAULT = "default"
SHOWN_MAX = 80
"""Characters of a refused value in its refusal."""
ALIKE = 0.5
"""How alike a key must be to be proposed, from 0 to 1."""

SettingsT = TypeVar("SettingsT", bound=Settings)


class SettingsError(Exception):
    """The settings cannot be used; the message is one line with cause and remedy."""


@dataclass(frozen=True, slots=True)
class Loaded(Generic[SettingsT]):
    """Settings, and for each key where its value came from."""

    settings: SettingsT
    sources: Mapping[str, str]

    def table(self) -> list[tuple[str, Any, str]]:
        """(key, value, source) in the order of the keys; values as JSON has them."""
        values = self.settings.model_dump(mode="json")
        return [(key, values[key], self.sources[key]) for key in sorted(values)]


@dataclass(frozen=True, slots=True)
class _Given:
    value: Any
    source: str


def load_settings(
    model: type[SettingsT],
    role: str,
    *,
    assignments: Sequence[str] = (),
    file: Path | None = None,
    environment: Mapping[str, str],
) -> Loaded[SettingsT]:
    """The settings of a role. `assignments` are `key=value`. Raises SettingsError."""
    known = list(model.model_fields)
    given: dict[str, _Given] = {}
    if file is not None:
        given |= {key: _Given(value, str(file)) for key, value in _read_file(file, role, known).items()}
    given |= _read_environment(role, environment, known)
    given |= _read_assignments(assignments, known)
    settings = _checked(model, role, given)
    return Loaded(settings, {key: given[key].source if key in given else DEFAULT for key in known})


def make_settings(model: type[SettingsT], role: str, values: Mapping[str, Any], source: str) -> SettingsT:
    """Settings of values that a command has put together. Raises SettingsError."""
    return _checked(model, role, {key: _Given(value, source) for key, value in values.items()})


def _checked(model: type[SettingsT], role: str, given: Mapping[str, _Given]) -> SettingsT:
    try:
        return model.model_validate({key: one.value for key, one in given.items()})
    except ValidationError as error:
        raise SettingsError(_problem(error, role, given)) from None


def variable(role: str, key: str) -> str:
    """The environment variable of a key."""
    return f"{_prefix(role)}{key.upper()}"


def _prefix(role: str) -> str:
    return f"MAGNETAR_{role.upper()}__"


def _read_assignments(assignments: Sequence[str], known: Sequence[str]) -> dict[str, _Given]:
    given = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise SettingsError(f"--set takes key=value: got=`{assignment}`")
        given[_known(key, known, f"--set {assignment}")] = _Given(value, "--set")
    return given


def _read_environment(role: str, environment: Mapping[str, str], known: Sequence[str]) -> dict[str, _Given]:
    prefix = _prefix(role)
    given = {}
    for name, value in sorted(environment.items()):
        if name.startswith(prefix):
            given[_known(name.removeprefix(prefix).lower(), known, name)] = _Given(value, name)
        elif name.startswith(prefix[:-1]):
            raise SettingsError(f"variables of a {role} begin with {prefix}, with two underscores: found=`{name}`")
    return given


def _read_file(file: Path, role: str, known: Sequence[str]) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            data = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise SettingsError(
            f"cannot read the settings file: {(error.strerror or str(error)).lower()} file=`{file}`"
        ) from None
    if len(data) > FILE_BYTES_MAX:
        raise SettingsError(f"the settings file is larger than {FILE_BYTES_MAX} bytes: is it the right one? `{file}`")
    try:
        values = tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise SettingsError(f"the settings file is not UTF-8 text: file=`{file}`") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"the settings file is not TOML: {str(error).lower()} file=`{file}`") from None
    for key, value in values.items():
        if isinstance(value, dict):
            raise SettingsError(f"the settings of a {role} stand in no table: remove [{key}] file=`{file}`")
        _known(key, known, str(file))
    return values


def _known(key: str, known: Sequence[str], where: str) -> str:
    if key in known:
        return key
    alike = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1, cutoff=ALIKE)
    remedy = f"did you mean {alike[0]}?" if alike else f"known are {', '.join(sorted(known))}"
    raise SettingsError(f"unknown setting `{key}` in {where}: {remedy}")


def _problem(error: ValidationError, role: str, given: Mapping[str, _Given]) -> str:
    """The first thing that is wrong, in our words."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return str(first["ctx"]["error"])
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{key} is required: give it with --set {key}=..., {variable(role, key)} or in the --config file"
    return f"{key} {_demand(first)}: got=`{str(given[key].value)[:SHOWN_MAX]}` from=`{given[key].source}`"


_LIMITS = {
    "greater_than_equal": ("ge", "must be at least"),
    "greater_than": ("gt", "must be more than"),
    "less_than_equal": ("le", "must be at most"),
    "less_than": ("lt", "must be less than"),
}


def _demand(error: Any) -> str:
    """What the value must be."""
    kind: str = error["type"]
    context = error.get("ctx", {})
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        return f"{words} {context[name]}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch" and context.get("pattern") == NAME_PATTERN:
        return "must be 1 to 249 letters, digits, `_`, `.` or `-`, the first a letter, digit or `_`"
    if kind.startswith("int"):
        return "must be a whole number"
    if kind.startswith("float") or kind == "finite_number":
        return "must be a number"
    if kind.startswith("bool"):
        return "must be true or false"
    return "must be text" if kind.startswith("string") else "cannot be this"
