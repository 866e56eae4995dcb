"""What users import: all of it named, typed, documented, and nothing that does not exist yet."""

from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any

import pytest

import magnetar.client
import magnetar.client.errors
import magnetar.client.sync

MODULES = [magnetar.client, magnetar.client.sync]

PAIRS = ["Client", "Producer", "StreamConsumer", "QueueConsumer", "Reader"]
ADMIN = ["topics", "subscriptions", "ledgers", "brokers", "bookies", "cluster", "rebalance"]
SCOPES = {"__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__", "__anext__": "__next__"}

LATER = {"schema", "dead_letter", "redelivery", "ack_timeout", "delay", "deliver_at", "deliver_after"}


def public(kind: type) -> dict[str, Any]:
    return {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize("module", MODULES)
def test_what_is_exported_exists_and_has_a_docstring(module: ModuleType) -> None:
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, type):
            assert inspect.getdoc(value), name
            for member, function in public(value).items():
                if inspect.isfunction(function):
                    assert inspect.getdoc(function), f"{name}.{member}"
                elif isinstance(function, property):
                    assert function.fget is not None
        elif callable(value):
            assert inspect.getdoc(value), name


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_exported(module: ModuleType) -> None:
    defined = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and getattr(value, "__module__", "").startswith("magnetar.client")
    }
    if module is magnetar.client:
        assert defined <= set(module.__all__)
    else:
        own = {name for name in defined if getattr(module, name).__module__ == module.__name__}
        assert own <= set(module.__all__)


def test_the_tree_of_errors_is_drawn_and_complete() -> None:
    drawing = magnetar.client.errors.__doc__ or ""
    drawn: list[tuple[int, str]] = []
    for line in drawing.splitlines():
        if match := re.match(r"(\s+(?:│\s+)?(?:[├└]── )?)([A-Z]\w+)", line):
            drawn.append((len(match[1]), match[2]))
    parents: list[tuple[int, str]] = []
    for depth, name in drawn:
        while parents and parents[-1][0] >= depth:
            parents.pop()
        kind = getattr(magnetar.client.errors, name)
        if parents:
            assert issubclass(kind, getattr(magnetar.client.errors, parents[-1][1])), name
        parents.append((depth, name))
    kinds = {
        name
        for name, value in vars(magnetar.client.errors).items()
        if isinstance(value, type) and issubclass(value, magnetar.client.MagnetarError)
    }
    assert {name for _, name in drawn} == kinds
    assert kinds <= set(magnetar.client.__all__)


@pytest.mark.parametrize("name", PAIRS)
def test_both_faces_have_the_same_methods_and_arguments(name: str) -> None:
    asynchronous, blocking = getattr(magnetar.client, name), getattr(magnetar.client.sync, name)
    theirs = set(public(asynchronous))
    # What the asynchronous one has as a plain attribute is a property here.
    assert theirs == set(public(blocking)) - {"topic", "name", "subscription"}
    for member in theirs:
        function = getattr(asynchronous, member)
        if inspect.isfunction(function):
            assert arguments(function) == arguments(getattr(blocking, member)), member
    for one, other in SCOPES.items():
        assert hasattr(asynchronous, one) == hasattr(blocking, other), one


def test_both_faces_have_the_same_administration() -> None:
    asynchronous = magnetar.client.connect("localhost:1").admin
    blocking = magnetar.client.sync.connect("localhost:1").admin
    assert set(vars(asynchronous)) == set(vars(blocking)) == set(ADMIN)
    for part in ADMIN:
        one, other = type(getattr(asynchronous, part)), type(getattr(blocking, part))
        assert set(public(one)) == set(public(other))
        for member, function in public(one).items():
            assert arguments(function) == arguments(getattr(other, member)), member


def test_both_faces_connect_alike() -> None:
    assert arguments(magnetar.client.connect) == arguments(magnetar.client.sync.connect)


@pytest.mark.parametrize("module", MODULES)
def test_what_comes_later_is_not_accepted_yet(module: ModuleType) -> None:
    for name in PAIRS:
        for member, function in public(getattr(module, name)).items():
            if inspect.isfunction(function):
                assert not LATER & set(inspect.signature(function).parameters), f"{name}.{member}"
    assert not {"Backoff", "DeadLetter", "SchemaMismatch"} & set(module.__all__)


def arguments(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
