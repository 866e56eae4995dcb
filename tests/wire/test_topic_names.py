"""Names: what is one, and what a topic's name stands for."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from magnetar.wire.names import NAME_LENGTH_MAX, InvalidName, TopicName, check_name

names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,40}", fullmatch=True)


@pytest.mark.parametrize("name", ["a", "0", "_", "Orders-2024.v1", "a..b", "x" * NAME_LENGTH_MAX])
def test_letters_digits_and_inner_dots_make_a_name(name: str) -> None:
    assert check_name("topic", name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", ".a", "a b", "a/b", "a\n", "a\0", "é", "٣", "a" * (NAME_LENGTH_MAX + 1)]
)
def test_anything_else_is_refused_as_what_it_should_name(name: str) -> None:
    with pytest.raises(InvalidName, match=r"^subscription is not") as caught:
        check_name("subscription", name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


def test_a_bare_topic_stands_in_the_default_namespace() -> None:
    assert TopicName.parse("orders") == TopicName("public", "default", "orders")
    assert str(TopicName.parse("orders")) == "public/default/orders"


@pytest.mark.parametrize("text", ["", "/", "a/b", "a/b/", "/a/b", "a//b", "a/b/c/d", "a/b/c ", "persistent://a/b/c"])
def test_a_topic_has_one_part_or_three(text: str) -> None:
    with pytest.raises(InvalidName):
        TopicName.parse(text)


def test_a_topic_cannot_be_made_of_invalid_parts() -> None:
    with pytest.raises(InvalidName, match="namespace"):
        TopicName("public", "a/b", "orders")


@settings(derandomize=True, deadline=None)
@given(tenant=names, namespace=names, topic=names)
def test_str_and_parse_are_inverse(tenant: str, namespace: str, topic: str) -> None:
    name = TopicName(tenant, namespace, topic)
    assert TopicName.parse(str(name)) == name


@settings(derandomize=True, deadline=None)
@given(st.text(max_size=300))
@example("\ud800")
def test_any_text_is_a_topic_or_an_invalid_name(text: str) -> None:
    try:
        name = TopicName.parse(text)
    except InvalidName:
        return
    assert str(name).endswith(text)
