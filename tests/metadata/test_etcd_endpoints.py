"""Addresses of etcd, and the order in which its endpoints are asked."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magnetar.metadata.backoff import MAX_S
from magnetar.metadata.etcd_endpoints import STEADY_S, EndpointChoice, parse_endpoints
from magnetar.metadata.store import MetadataError

ABC = ("a:1", "b:1", "c:1")


@pytest.mark.parametrize(
    ("url", "endpoints"),
    [
        ("etcd://127.0.0.1:2379", ("127.0.0.1:2379",)),
        ("etcd://a:1,b:2, c:3/", ("a:1", "b:2", "c:3")),
        ("etcd://metadata.example", ("metadata.example:2379",)),
        ("etcd://[::1]:2379,[fe80::1]", ("[::1]:2379", "[fe80::1]:2379")),
    ],
)
def test_an_address_names_endpoints_in_order(url: str, endpoints: tuple[str, ...]) -> None:
    assert parse_endpoints(url) == endpoints


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a:1",
        "http://a:1",
        "etcd://",
        "etcd://a:1,",
        "etcd://a:0",
        "etcd://a:65536",
        "etcd://a:b",
        "etcd://a:²",
        "etcd://:1",
        "etcd://::1",
        "etcd://a/b:1",
        "etcd://user@a:1",
        "etcd://a:1,a:1",
        "etcd://" + ",".join(f"h{i}:1" for i in range(17)),
    ],
)
def test_what_is_no_address_is_refused_with_its_text(url: str) -> None:
    with pytest.raises(MetadataError, match=r"metadata store.*address=`"):
        parse_endpoints(url)


def test_endpoints_are_tried_in_the_order_they_are_named_each_at_once() -> None:
    choice = EndpointChoice(ABC, random.Random(1))
    tried = []
    for _ in ABC:
        index, wait_s = choice.next(0.0)
        assert wait_s == 0
        tried.append(index)
        choice.failed(index, 0.0)
    assert tried == [0, 1, 2]


def test_when_all_have_failed_the_one_whose_pause_ends_first_is_waited_for() -> None:
    choice = EndpointChoice(ABC, random.Random(1))
    for index in (0, 1, 2):
        choice.failed(index, float(index))
    index, wait_s = choice.next(2.0)
    assert (index, wait_s) == (0, 0.0)  # its short pause is over by now
    choice.failed(0, 2.0)
    choice.failed(1, 2.0)
    choice.failed(2, 2.0)
    index, wait_s = choice.next(2.0)
    assert wait_s > 0
    assert choice.next(2.0 + wait_s) == (index, 0.0)


def test_the_endpoint_after_the_one_that_failed_is_next() -> None:
    choice = EndpointChoice(ABC, random.Random(1))
    choice.serves(1, 0.0)
    assert choice.next(1.0)[0] == 1
    choice.failed(1, 100.0)
    assert choice.next(100.0)[0] == 2


def pause_after_failures(choice: EndpointChoice, failures: int, served_s: float) -> float:
    now = 0.0
    for _ in range(failures):
        now += choice.next(now)[1]
        choice.serves(0, now)
        now += served_s
        choice.failed(0, now)
    return choice.next(now)[1]


def test_pauses_grow_for_one_that_fails_soon_after_it_began_to_serve() -> None:
    assert MAX_S / 2 <= pause_after_failures(EndpointChoice(["a:1"], random.Random(1)), 20, 0.1) <= MAX_S


def test_one_that_served_for_long_is_tried_again_soon() -> None:
    assert pause_after_failures(EndpointChoice(["a:1"], random.Random(1)), 20, STEADY_S) < 0.1


@given(st.lists(st.tuples(st.sampled_from(["fail", "serve"]), st.floats(0, 10)), max_size=40), st.integers(1, 4))
def test_there_is_always_an_endpoint_within_the_longest_pause(steps: list[tuple[str, float]], count: int) -> None:
    choice = EndpointChoice([f"h{i}:1" for i in range(count)], random.Random(1))
    now = 0.0
    for step, passed_s in steps:
        index, wait_s = choice.next(now)
        assert 0 <= index < count
        assert 0 <= wait_s <= MAX_S
        now += wait_s + passed_s
        if step == "fail":
            choice.failed(index, now)
        else:
            choice.serves(index, now)
