"""What clients saw, and what can be concluded from it at once. The rest is concluded at the end, in `checkers`.

Every payload is sent by one producer, once, or again under the same sequence. So a payload names a message, and:

- one place: a message stands at one offset of one shard, wherever and however often it is seen (no duplicate);
- one log: at one offset of a shard stands one message, for every reader, consumer and answer to a producer, so nothing
  that an old owner wrote after its fence is ever served, and all see one order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from magnetar.managed_log import cursor as managed


class Violation(Exception):
    """An invariant does not hold. The first word of the message names it."""


@dataclass(slots=True)
class Sent:
    """A message as its producer knows it. `order` counts in the producer's life, a named one's through restarts."""

    producer: str
    order: int
    topic: str
    key: str | None
    ordered: bool
    """Keyless messages of one producer keep their order only if it has a name."""
    fenced: bool = False
    """Somebody else has the producer's name already: it must not be stored."""
    place: tuple[int, int] | None = None
    confirmed: bool = False


class Oracle:
    """See the module. `fail` ends the run with a Violation."""

    def __init__(self, now: Callable[[], float], fail: Callable[[str], NoReturn]) -> None:
        self.now = now
        self.fail = fail
        self.sent: dict[bytes, Sent] = {}
        self.log: dict[int, dict[int, bytes]] = {}
        self.topics: dict[int, str] = {}
        """Shard -> topic, as far as it was seen."""
        self.subscriptions: dict[tuple[str, str], SubscriptionOracle] = {}
        self.failed_calls = 0

    def sending(self, payload: bytes, sent: Sent) -> None:
        self.sent.setdefault(payload, sent)

    def confirmed(self, payload: bytes, shard: int, offset: int | None) -> None:
        """A producer was answered."""
        sent = self.sent[payload]
        sent.confirmed = True
        if offset is not None:
            self.stands(payload, shard, offset, f"confirmed to {sent.producer}")

    def stands(self, payload: bytes, shard: int, offset: int, where: str) -> Sent:
        sent = self.sent.get(payload)
        if sent is None:
            self.fail(f"integrity: nobody sent this message: {where} shard={shard} offset={offset} {payload[:40]!r}")
        if sent.fenced:
            self.fail(f"fence: a producer that had lost its name stored: {where} {payload[:40]!r}")
        there = self.log.setdefault(shard, {}).setdefault(offset, payload)
        if there != payload:
            self.fail(
                f"one order: two messages at one offset: {where} shard={shard} offset={offset} "
                f"{there[:40]!r} {payload[:40]!r}"
            )
        if sent.place is None:
            sent.place = (shard, offset)
            self.topics.setdefault(shard, sent.topic)
        elif sent.place != (shard, offset):
            self.fail(
                f"duplicate: one message at two places: {where} {sent.place} and {(shard, offset)} {payload[:40]!r}"
            )
        return sent

    def served(self, shard: int, cursors: Mapping[str, managed.Cursor]) -> None:
        """By a new owner, which begins with these: whoever answered an ack had made it durable."""
        topic = self.topics.get(shard)
        for subscription in self.subscriptions.values():
            if subscription.topic == topic and subscription.name in cursors:
                subscription.taken_over(shard, cursors[subscription.name])

    def subscription(self, topic: str, name: str) -> SubscriptionOracle:
        return self.subscriptions[topic, name]


@dataclass(slots=True)
class Cursor:
    """What is known of a subscription in one shard.

    floors       an ordered one: the ack floors that its cursor may have, by what was answered and what was not
    settled      when an ack or seek was last answered, and whether that is certain: see `SubscriptionOracle.received`
    answered     offset -> the same of the first ack that named it
    tried        offsets whose ack was sent, answered or not
    first        offsets in the order in which somebody received them for the first time
    """

    floors: set[int] = field(default_factory=lambda: {0})
    settled: tuple[float, bool] = (0.0, True)
    answered: dict[int, tuple[float, bool]] = field(default_factory=dict)
    tried: set[int] = field(default_factory=set)
    first: dict[int, None] = field(default_factory=dict)


class SubscriptionOracle:
    """A subscription that was created before the first message, at EARLIEST. Seeks go to what was received before."""

    def __init__(self, oracle: Oracle, topic: str, name: str, *, ordered: bool, key_ordered: bool = False) -> None:
        self.topic = topic
        self.name = name
        self.ordered = ordered
        self.key_ordered = key_ordered
        self._oracle = oracle
        self.cursors: dict[int, Cursor] = {}

    def cursor(self, shard: int) -> Cursor:
        found = self.cursors.get(shard)
        if found is None:
            found = self.cursors[shard] = Cursor()
        return found

    def received(
        self, shard: int, offset: int, opened_at: float, *, again: bool = False, certain: Callable[[float], bool]
    ) -> None:
        """By a consumer that was opened then; `again`: it had received it before.

        certain   tells of a time whether no broker that was replaced and does not know it can have given anything out
                  since: such a one repeats what was acknowledged at its successor, which is no loss
        """
        cursor = self.cursor(shard)
        if self.ordered and offset not in cursor.first and offset != len(cursor.first):
            self._oracle.fail(
                f"order: {self._named(shard)} got offset {offset} before {len(cursor.first)} was received by anyone"
            )
        cursor.first.setdefault(offset)
        answered = cursor.answered.get(offset)
        if self.ordered and not again:
            answered = cursor.settled if offset < min(cursor.floors) else None
        if answered is None:
            return
        answered_at, was_certain = answered
        if (again or opened_at > answered_at) and was_certain and certain(answered_at):
            self._oracle.fail(
                f"ack undone: {self._named(shard)} got offset {offset}, whose ack was answered at {answered_at}"
            )

    def opened_at(self, shard: int, offset: int) -> None:
        """The first message of a shard that the only consumer got: where the cursor stood."""
        floors = self.cursor(shard).floors
        if offset not in floors and (offset < min(floors) or offset > max(floors)):
            self._oracle.fail(f"ack undone: {self._named(shard)} began at {offset}, and may stand at {sorted(floors)}")

    def taken_over(self, shard: int, found: managed.Cursor) -> None:
        """A new owner of the shard found this cursor."""
        cursor = self.cursor(shard)
        if self.ordered:
            undone = [] if found.floor >= min(cursor.floors) else [found.floor]
        else:
            undone = [offset for offset in cursor.answered if not found.is_acked(offset)]
        if undone:
            self._oracle.fail(f"ack undone: a new owner knows nothing of it: {self._named(shard)} offsets={undone}")

    def acking(self, shard: int, offset: int) -> None:
        """An ack is sent: cumulative, if ordered."""
        cursor = self.cursor(shard)
        if self.ordered:
            cursor.floors |= {max(floor, offset + 1) for floor in cursor.floors}
        else:
            cursor.tried.add(offset)

    def acked(self, shard: int, offset: int, *, certain: bool) -> None:
        """It was answered: durable from now on."""
        cursor = self.cursor(shard)
        answered = self._oracle.now(), certain
        if self.ordered:
            cursor.floors = {max(floor, offset + 1) for floor in cursor.floors}
            cursor.settled = answered
        # The first time counts: what was given out before it was acknowledged again may still wait at a consumer.
        cursor.answered.setdefault(offset, answered)

    def seeking(self, shard: int, offset: int) -> None:
        self.cursor(shard).floors.add(offset)

    def sought_to(self, shard: int, offset: int, *, certain: bool) -> None:
        cursor = self.cursor(shard)
        cursor.floors = {offset}
        cursor.settled = self._oracle.now(), certain

    def must_come(self, shard: int, offset: int) -> bool:
        """It is not acknowledged, whatever became of acks without an answer."""
        cursor = self.cursors.get(shard)
        if cursor is None:
            return True
        return offset >= max(cursor.floors) if self.ordered else offset not in cursor.tried

    def _named(self, shard: int) -> str:
        return f"subscription={self.name} topic={self.topic} shard={shard}"
