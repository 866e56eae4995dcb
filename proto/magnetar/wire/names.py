"""Names of topics, subscriptions, producers and ids: what a name may look like.

A name goes into keys of the metadata store, into file names and into messages as it is, so it holds no separator, no
blank and nothing that needs an escape, and it never starts with a dot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NAME_LENGTH_MAX = 249
DEFAULT_TENANT = "public"
DEFAULT_NAMESPACE = "default"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,248}", re.ASCII)
_SHOWN_LENGTH_MAX = 64


class InvalidName(ValueError):
    """A name that does not match `[A-Za-z0-9_][A-Za-z0-9_.-]{0,248}`, or a topic that is not made of such names."""


def check_name(kind: str, value: str) -> str:
    """Return the value if it is a valid name; raises InvalidName, which calls it by its kind."""
    if _NAME.fullmatch(value) is None:
        raise InvalidName(
            f"{kind} is not 1 to {NAME_LENGTH_MAX} letters, digits, '_', '.' or '-', "
            f"the first neither '.' nor '-': {kind}=`{_shown(value)}`"
        )
    return value


@dataclass(frozen=True, slots=True, order=True)
class TopicName:
    """`tenant/namespace/topic`. Its parts are checked names."""

    tenant: str
    namespace: str
    topic: str

    def __post_init__(self) -> None:
        check_name("tenant", self.tenant)
        check_name("namespace", self.namespace)
        check_name("topic", self.topic)

    @classmethod
    def parse(cls, text: str) -> TopicName:
        """Read `topic`, which stands for `public/default/topic`, or `tenant/namespace/topic`; raises InvalidName."""
        match text.split("/", 3):
            case [topic]:
                return cls(DEFAULT_TENANT, DEFAULT_NAMESPACE, topic)
            case [tenant, namespace, topic]:
                return cls(tenant, namespace, topic)
            case _:
                raise InvalidName(f"topic is neither a name nor tenant/namespace/topic: topic=`{_shown(text)}`")

    def __str__(self) -> str:
        return f"{self.tenant}/{self.namespace}/{self.topic}"


def _shown(value: str) -> str:
    """The value as one short printable line: it came from a user and goes into logs."""
    short = value if len(value) <= _SHOWN_LENGTH_MAX else value[:_SHOWN_LENGTH_MAX] + "..."
    return ascii(short)[1:-1]
