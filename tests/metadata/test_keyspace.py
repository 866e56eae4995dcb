"""Every key has one builder and one parser, and no name reaches another key."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.metadata.keyspace import NUMBER_MAX, VACANT_PLACE, KeyKind, Keyspace, UnknownKey
from magnetar.metadata.records import VACANT, Owner

NAMES = st.text(min_size=1, max_size=8).filter(lambda text: "/" not in text and text != VACANT_PLACE)
NUMBERS = st.integers(0, NUMBER_MAX)
TOPICS = st.tuples(NAMES, NAMES, NAMES).map("/".join)
OWNERS = st.builds(Owner, NAMES, NUMBERS)

# Each kind's builder, its arguments, and what its parser returns for them.
KINDS: dict[KeyKind, tuple[str, tuple[st.SearchStrategy[Any], ...]]] = {
    KeyKind.COUNTER: ("counter", (NAMES,)),
    KeyKind.TOPIC: ("topic", (TOPICS,)),
    KeyKind.SUBSCRIPTION: ("subscription", (TOPICS, NAMES)),
    KeyKind.PRODUCER: ("producer", (TOPICS, NAMES)),
    KeyKind.SHARD: ("shard", (NUMBERS,)),
    KeyKind.SHARD_LEDGER: ("shard_ledger", (NUMBERS, NUMBERS)),
    KeyKind.PAGE: ("page", (NUMBERS, NUMBERS)),
    KeyKind.LEDGER: ("ledger", (NUMBERS,)),
    KeyKind.INDEX: ("index", (NAMES, NUMBERS)),
    KeyKind.BROKER: ("broker", (NAMES,)),
    KeyKind.BOOKIE: ("bookie", (NAMES,)),
    KeyKind.COOKIE: ("cookie", (NAMES,)),
    KeyKind.OWNED: ("owned", (OWNERS, NUMBERS)),
    KeyKind.BROKER_DRAIN: ("broker_drain", (NAMES,)),
    KeyKind.ELECTION: ("election", (NAMES,)),
    KeyKind.COPY: ("copy", (NUMBERS, NAMES)),
    KeyKind.BOOKIE_DRAIN: ("bookie_drain", (NAMES,)),
    KeyKind.LOSS: ("loss", (NAMES,)),
    KeyKind.OPERATION: ("operation", (NAMES,)),
    KeyKind.MOVES: ("moves", (NAMES, NUMBERS)),
}

KEYSPACE = Keyspace("c1")


def test_every_kind_of_key_is_in_this_test_and_has_a_builder_and_a_parser() -> None:
    assert {*KINDS, KeyKind.INSTANCE, KeyKind.REPAIR} == set(KeyKind)
    public = {name for name, _ in inspect.getmembers(Keyspace, inspect.isfunction) if not name.startswith("_")}
    builders = {name for name, _ in KINDS.values()}
    parsers = {f"parse_{name}" for name in builders}
    assert builders | parsers <= public
    assert {name for name in public - builders - parsers if not name.endswith("_prefix")} == {
        "instance",
        "parse",
        "repair",
        "shard_neighbours",
    }


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=30, derandomize=True, database=None, deadline=None)
def test_a_parser_returns_what_the_builder_was_given_and_no_other_parser_accepts_it(
    kind: KeyKind, data: st.DataObject
) -> None:
    name, strategies = KINDS[kind]
    arguments = data.draw(st.tuples(*strategies))
    key = getattr(KEYSPACE, name)(*arguments)
    parse: Callable[[str], Any] = getattr(KEYSPACE, f"parse_{name}")
    assert parse(key) == (arguments if len(arguments) > 1 else arguments[0])
    assert KEYSPACE.parse(key)[0] is kind
    for other, (other_name, _) in KINDS.items():
        if other is not kind:
            with pytest.raises(UnknownKey):
                getattr(KEYSPACE, f"parse_{other_name}")(key)
    with pytest.raises(UnknownKey):
        Keyspace("c2").parse(key)


@given(data=st.data())
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_different_keys_never_collide(data: st.DataObject) -> None:
    built = set()
    wanted = set()
    for kind, (name, strategies) in KINDS.items():
        arguments = data.draw(st.tuples(*strategies))
        wanted.add((kind, arguments))
        built.add(getattr(KEYSPACE, name)(*arguments))
    built.add(KEYSPACE.instance())
    assert len(built) == len(wanted) + 1


@pytest.mark.parametrize("bad", ["", "a/b", "/", "a/"])
def test_no_name_can_reach_another_key(bad: str) -> None:
    owner = Owner(bad, 1)
    builders: list[Callable[[], str]] = [
        lambda: Keyspace(bad).root,
        lambda: KEYSPACE.counter(bad),
        lambda: KEYSPACE.subscription("t/n/topic", bad),
        lambda: KEYSPACE.producer("t/n/topic", bad),
        lambda: KEYSPACE.topic(f"t/n/{bad}"),
        lambda: KEYSPACE.topic(f"{bad}/n/topic"),
        lambda: KEYSPACE.index(bad, 1),
        lambda: KEYSPACE.broker(bad),
        lambda: KEYSPACE.bookie(bad),
        lambda: KEYSPACE.cookie(bad),
        lambda: KEYSPACE.owned(owner, 1),
        lambda: KEYSPACE.owned_prefix(owner),
        lambda: KEYSPACE.election(bad),
        lambda: KEYSPACE.bookie_drain(bad),
        lambda: KEYSPACE.broker_drain(bad),
        lambda: KEYSPACE.loss(bad),
        lambda: KEYSPACE.operation(bad),
        lambda: KEYSPACE.moves(bad, 1),
        lambda: KEYSPACE.subscriptions_prefix(f"t/{bad}/topic"),
    ]
    for build in builders:
        with pytest.raises(ValueError, match=r"part of a key|full topic name"):
            build()


def test_a_vacant_place_has_a_key_of_its_own() -> None:
    assert KEYSPACE.parse_copy(KEYSPACE.copy(7, VACANT)) == (7, VACANT)


@pytest.mark.parametrize("number", [-1, NUMBER_MAX + 1])
def test_a_number_beyond_64_bits_has_no_key(number: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        KEYSPACE.shard(number)


def test_the_order_of_keys_is_the_order_of_numbers() -> None:
    numbers = [0, 1, 9, 10, 15, 16, 255, 1 << 32, NUMBER_MAX]
    keys = [KEYSPACE.ledger(number) for number in numbers]
    assert keys == sorted(keys)


def test_sixteen_shards_and_no_others_are_read_together() -> None:
    beginning = KEYSPACE.shard_neighbours(0x25)
    for shard_id in range(0x20, 0x30):
        assert KEYSPACE.shard_neighbours(shard_id) == beginning
        assert KEYSPACE.shard(shard_id).startswith(beginning)
        assert KEYSPACE.shard_ledger(shard_id, 7).startswith(beginning)
    for other in (0x1F, 0x30, 0x2, 0x125, 0x250):
        assert not KEYSPACE.shard(other).startswith(beginning)


def test_prefixes_hold_their_keys_and_end_at_whole_parts() -> None:
    owner = Owner("b", 5)
    pairs = [
        (KEYSPACE.topics_prefix(), KEYSPACE.topic("t/n/x")),
        (KEYSPACE.topics_prefix("t"), KEYSPACE.topic("t/n/x")),
        (KEYSPACE.topics_prefix("t", "n"), KEYSPACE.topic("t/n/x")),
        (KEYSPACE.subscriptions_prefix("t/n/x"), KEYSPACE.subscription("t/n/x", "s")),
        (KEYSPACE.producers_prefix("t/n/x"), KEYSPACE.producer("t/n/x", "p")),
        (KEYSPACE.shards_prefix(), KEYSPACE.shard(1)),
        (KEYSPACE.shard_prefix(1), KEYSPACE.shard(1)),
        (KEYSPACE.shard_prefix(1), KEYSPACE.shard_ledger(1, 2)),
        (KEYSPACE.pages_prefix(1), KEYSPACE.page(1, 2)),
        (KEYSPACE.ledgers_prefix(), KEYSPACE.ledger(2)),
        (KEYSPACE.index_prefix(), KEYSPACE.index("b", 2)),
        (KEYSPACE.index_prefix("b"), KEYSPACE.index("b", 2)),
        (KEYSPACE.brokers_prefix(), KEYSPACE.broker("b")),
        (KEYSPACE.bookies_prefix(), KEYSPACE.bookie("b")),
        (KEYSPACE.cookies_prefix(), KEYSPACE.cookie("b")),
        (KEYSPACE.owned_prefix(), KEYSPACE.owned(owner, 1)),
        (KEYSPACE.owned_prefix(broker_id="b"), KEYSPACE.owned(owner, 1)),
        (KEYSPACE.owned_prefix(owner), KEYSPACE.owned(owner, 1)),
        (KEYSPACE.copies_prefix(), KEYSPACE.copy(2, "b")),
        (KEYSPACE.copies_prefix(2), KEYSPACE.copy(2, VACANT)),
        (KEYSPACE.bookie_drains_prefix(), KEYSPACE.bookie_drain("b")),
        (KEYSPACE.broker_drains_prefix(), KEYSPACE.broker_drain("b")),
        (KEYSPACE.operations_prefix(), KEYSPACE.operation("r-1")),
        (KEYSPACE.moves_prefix("r-1"), KEYSPACE.moves("r-1", 2)),
        (KEYSPACE.losses_prefix(), KEYSPACE.loss("b")),
    ]
    for prefix, key in pairs:
        assert key.startswith(prefix)
        assert prefix.endswith("/")
    for name in ("topics", "subscriptions", "producers", "shards", "pages", "ledgers", "index"):
        assert sum(key.startswith(f"{KEYSPACE.root}{name}/") for key in {key for _, key in pairs}) >= 1
    with pytest.raises(ValueError, match="missing"):
        KEYSPACE.topics_prefix("", "n")


@pytest.mark.parametrize(
    "key",
    [
        "/magnetar/c1/shards/1/record",
        "/magnetar/c1/shards/000000000000000A/record",
        "/magnetar/c1/shards/0000000000000001/records",
        "/magnetar/c1/shards/0000000000000001",
        "/magnetar/c10/shards/0000000000000001/record",
        "/magnetar/c1/index//0000000000000001",
        "/magnetar/c1/",
        "",
        "shards/0000000000000001/record",
    ],
)
def test_what_no_builder_makes_is_no_key(key: str) -> None:
    with pytest.raises(UnknownKey):
        KEYSPACE.parse(key)
