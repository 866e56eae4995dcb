"""The keys of the metadata store: every one is built and parsed here. Pure.

All keys stand under `/magnetar/<cluster>/`. Numbers are 16 lower-case hexadecimal digits, so that the order of keys is
the order of numbers. A part of a key is never empty and never holds a `/`, so that no name can reach another key.

key                                 record                      written by                          dies
instance                            instance id, text           first server of the cluster, CAS    never
ids/<counter>                       next number, decimal text   who needs a block of them, CAS      never
topics/<t>/<n>/<topic>              TopicRecord                 a broker that changes it, CAS       deletion's last step
subscriptions/<t>/<n>/<topic>/<s>   SubscriptionRecord          any broker, CAS                     with it or its topic
producers/<t>/<n>/<topic>/<p>       ProducerRecord              the broker that registers it, CAS   with its topic
shards/<shard>/record               ShardRecord                 its owner; a claimer                deletion's last step
shards/<shard>/ledgers/<ledger>     LedgerRecord, not CLOSED    the shard's owner; a claimer        closed: to ledgers/
pages/<shard>/<page>                older segments              the shard's owner                   trimmed
ledgers/<ledger>                    LedgerRecord, CLOSED        the shard's owner; repair, CAS      when unlinked
index/<bookie>/<ledger>             empty: it has a role there  who changes the ledger's record     with the role
brokers/<broker>                    BrokerRegistration, leased  the broker                          with its session
bookies/<bookie>                    BookieRegistration, leased  the bookie                          with its session
cookies/<bookie>                    Cookie                      the bookie, at its first start      decommissioned
owned/<broker>/<session>/<shard>    the claim's random mark     who changes the shard's owner       with the ownership
drains/brokers/<broker>             empty: it is to have none   any broker that is asked to         undrained
elections/<name>                    leader's name, leased       a candidate that finds it absent    with its lease
copies/<ledger>/<place>             CopyTask                    who closes it; the auditor, CAS     done, or not needed
drains/bookies/<bookie>             Drain                       any broker, for an operator, CAS    undrained, removed
losses/<bookie>                     Loss                        the auditor, CAS                    it is back, removed
repair                              RepairSettings              any broker, for an operator, CAS    never
operations/<operation>              Operation                   operator's broker; the runner, CAS  when many came after
moves/<operation>/<page>            Moves of it                 operator's broker; the runner, CAS  with the operation
"""

from __future__ import annotations

from enum import Enum

from magnetar.metadata.records import VACANT, Owner

COUNTER_SHARD = "shard"
COUNTER_LEDGER = "ledger"
COUNTER_SUBSCRIPTION = "subscription"

CLUSTERS_PREFIX = "/magnetar/"
NUMBER_MAX = (1 << 64) - 1
NAME = "*"
NUMBER = "#"
VACANT_PLACE = "-"
"""Stands in the key of a copy for a vacant place; ids of bookies begin with a letter or a digit."""
_NUMBER_DIGITS = 16
_NUMBER_ALPHABET = frozenset("0123456789abcdef")


class UnknownKey(ValueError):
    """A key that is not of the expected kind."""


class KeyKind(Enum):
    """Each kind's parts: NAME, NUMBER, or a word that stands for itself."""

    INSTANCE = ("instance",)
    COUNTER = ("ids", NAME)
    TOPIC = ("topics", NAME, NAME, NAME)
    SUBSCRIPTION = ("subscriptions", NAME, NAME, NAME, NAME)
    PRODUCER = ("producers", NAME, NAME, NAME, NAME)
    SHARD = ("shards", NUMBER, "record")
    SHARD_LEDGER = ("shards", NUMBER, "ledgers", NUMBER)
    PAGE = ("pages", NUMBER, NUMBER)
    LEDGER = ("ledgers", NUMBER)
    INDEX = ("index", NAME, NUMBER)
    BROKER = ("brokers", NAME)
    BOOKIE = ("bookies", NAME)
    COOKIE = ("cookies", NAME)
    OWNED = ("owned", NAME, NUMBER, NUMBER)
    BROKER_DRAIN = ("drains", "brokers", NAME)
    ELECTION = ("elections", NAME)
    COPY = ("copies", NUMBER, NAME)
    BOOKIE_DRAIN = ("drains", "bookies", NAME)
    LOSS = ("losses", NAME)
    REPAIR = ("repair",)
    OPERATION = ("operations", NAME)
    MOVES = ("moves", NAME, NUMBER)


_KINDS_OF = {word: [kind for kind in KeyKind if kind.value[0] == word] for word in {kind.value[0] for kind in KeyKind}}
"""By the word that its keys begin with."""


def number(value: int) -> str:
    """The form of a number in keys; raises ValueError unless it has at most 64 bits and no sign."""
    if not 0 <= value <= NUMBER_MAX:
        raise ValueError(f"a number in a key has 64 bits: number=`{value}`")
    return f"{value:0{_NUMBER_DIGITS}x}"


def cluster_of(key: str) -> str:
    """The cluster under whose root a key stands; empty for a key of no cluster."""
    return key.removeprefix(CLUSTERS_PREFIX).partition("/")[0] if key.startswith(CLUSTERS_PREFIX) else ""


def _is_number(part: str) -> bool:
    return len(part) == _NUMBER_DIGITS and _NUMBER_ALPHABET.issuperset(part)


def _name(part: str) -> str:
    if not part or "/" in part:
        raise ValueError(f"a part of a key is not empty and has no slash: part=`{part}`")
    return part


def _topic_parts(topic: str) -> tuple[str, str, str]:
    parts = topic.split("/")
    if len(parts) != 3:
        raise ValueError(f"a full topic name is tenant/namespace/topic: topic=`{topic}`")
    return parts[0], parts[1], parts[2]


def _part(shape: str, value: str | int) -> str:
    if shape == NUMBER:
        assert isinstance(value, int)
        return number(value)
    assert isinstance(value, str)
    return _name(value)


def _render(kind: KeyKind, values: tuple[str | int, ...]) -> str:
    """The kind's parts up to the last value; all of them if the values are complete."""
    parts: list[str] = []
    used = 0
    for shape in kind.value:
        if shape not in (NAME, NUMBER):
            parts.append(shape)
        elif used < len(values):
            parts.append(_part(shape, values[used]))
            used += 1
        else:
            break
    assert used == len(values), "more values than the kind has places"
    return "/".join(parts)


class Keyspace:
    """Builds and parses the keys of one cluster. Builders raise ValueError for parts that no key can hold, parsers
    UnknownKey for keys of another kind. Every `*_prefix` ends in `/` and matches nothing but whole parts."""

    __slots__ = ("cluster", "root")

    def __init__(self, cluster: str) -> None:
        self.cluster = _name(cluster)
        self.root = f"{CLUSTERS_PREFIX}{cluster}/"

    def __repr__(self) -> str:
        return f"Keyspace({self.cluster!r})"

    def _key(self, kind: KeyKind, *values: str | int) -> str:
        return self.root + _render(kind, values)

    def _prefix(self, kind: KeyKind, *values: str | int) -> str:
        return self.root + _render(kind, values) + "/"

    def parse(self, key: str) -> tuple[KeyKind, tuple[str | int, ...]]:
        """The key's kind and the values of its names and numbers; raises UnknownKey."""
        if key.startswith(self.root):
            parts = key[len(self.root) :].split("/")
            for kind in _KINDS_OF.get(parts[0], ()):
                values = _match(kind, parts)
                if values is not None:
                    return kind, values
        raise UnknownKey(f"not a key of this cluster: cluster=`{self.cluster}` key=`{key}`")

    def _values(self, kind: KeyKind, key: str) -> tuple[str | int, ...]:
        values = _match(kind, key[len(self.root) :].split("/")) if key.startswith(self.root) else None
        if values is None:
            raise UnknownKey(f"not a key of this kind: kind=`{kind.name}` key=`{key}`")
        return values

    def _names(self, kind: KeyKind, key: str) -> tuple[str, ...]:
        return tuple(value for value in self._values(kind, key) if isinstance(value, str))

    def _numbers(self, kind: KeyKind, key: str) -> tuple[int, ...]:
        return tuple(value for value in self._values(kind, key) if isinstance(value, int))

    # The cluster.

    def instance(self) -> str:
        return self._key(KeyKind.INSTANCE)

    def counter(self, name: str) -> str:
        return self._key(KeyKind.COUNTER, name)

    def parse_counter(self, key: str) -> str:
        return self._names(KeyKind.COUNTER, key)[0]

    def election(self, name: str) -> str:
        return self._key(KeyKind.ELECTION, name)

    def parse_election(self, key: str) -> str:
        return self._names(KeyKind.ELECTION, key)[0]

    # Copies that are to be made, and what makes them necessary.

    def copy(self, ledger_id: int, place: str) -> str:
        return self._key(KeyKind.COPY, ledger_id, VACANT_PLACE if place == VACANT else place)

    def copies_prefix(self, ledger_id: int | None = None) -> str:
        return self._prefix(KeyKind.COPY, *(() if ledger_id is None else (ledger_id,)))

    def parse_copy(self, key: str) -> tuple[int, str]:
        """(ledger, place)"""
        place = self._names(KeyKind.COPY, key)[0]
        return self._numbers(KeyKind.COPY, key)[0], VACANT if place == VACANT_PLACE else place

    def bookie_drain(self, bookie_id: str) -> str:
        return self._key(KeyKind.BOOKIE_DRAIN, bookie_id)

    def bookie_drains_prefix(self) -> str:
        return self._prefix(KeyKind.BOOKIE_DRAIN)

    def parse_bookie_drain(self, key: str) -> str:
        return self._names(KeyKind.BOOKIE_DRAIN, key)[0]

    def loss(self, bookie_id: str) -> str:
        return self._key(KeyKind.LOSS, bookie_id)

    def losses_prefix(self) -> str:
        return self._prefix(KeyKind.LOSS)

    def parse_loss(self, key: str) -> str:
        return self._names(KeyKind.LOSS, key)[0]

    def repair(self) -> str:
        return self._key(KeyKind.REPAIR)

    def operation(self, operation_id: str) -> str:
        return self._key(KeyKind.OPERATION, operation_id)

    def operations_prefix(self) -> str:
        return self._prefix(KeyKind.OPERATION)

    def parse_operation(self, key: str) -> str:
        return self._names(KeyKind.OPERATION, key)[0]

    def moves(self, operation_id: str, page: int) -> str:
        return self._key(KeyKind.MOVES, operation_id, page)

    def moves_prefix(self, operation_id: str) -> str:
        return self._prefix(KeyKind.MOVES, operation_id)

    def parse_moves(self, key: str) -> tuple[str, int]:
        """(operation, page)"""
        return self._names(KeyKind.MOVES, key)[0], self._numbers(KeyKind.MOVES, key)[0]

    # Topics. `topic` is always tenant/namespace/topic.

    def topic(self, topic: str) -> str:
        return self._key(KeyKind.TOPIC, *_topic_parts(topic))

    def topics_prefix(self, tenant: str = "", namespace: str = "") -> str:
        return self._prefix(KeyKind.TOPIC, *_given(tenant, namespace))

    def parse_topic(self, key: str) -> str:
        return "/".join(self._names(KeyKind.TOPIC, key))

    def subscription(self, topic: str, name: str) -> str:
        return self._key(KeyKind.SUBSCRIPTION, *_topic_parts(topic), name)

    def subscriptions_prefix(self, topic: str) -> str:
        return self._prefix(KeyKind.SUBSCRIPTION, *_topic_parts(topic))

    def parse_subscription(self, key: str) -> tuple[str, str]:
        """(topic, subscription)"""
        *topic, name = self._names(KeyKind.SUBSCRIPTION, key)
        return "/".join(topic), name

    def producer(self, topic: str, name: str) -> str:
        return self._key(KeyKind.PRODUCER, *_topic_parts(topic), name)

    def producers_prefix(self, topic: str) -> str:
        return self._prefix(KeyKind.PRODUCER, *_topic_parts(topic))

    def parse_producer(self, key: str) -> tuple[str, str]:
        """(topic, producer)"""
        *topic, name = self._names(KeyKind.PRODUCER, key)
        return "/".join(topic), name

    # Shards and ledgers.

    def shard(self, shard_id: int) -> str:
        return self._key(KeyKind.SHARD, shard_id)

    def shard_prefix(self, shard_id: int) -> str:
        """The shard's record and the records of its ledgers that are not CLOSED."""
        return self._prefix(KeyKind.SHARD, shard_id).removesuffix("record/")

    def shard_neighbours(self, shard_id: int) -> str:
        """Not a whole part: what `shard_prefix` of the shards begins with whose numbers differ in the last digit."""
        return self.shard_prefix(shard_id).removesuffix("/")[:-1]

    def shards_prefix(self) -> str:
        return self._prefix(KeyKind.SHARD)

    def parse_shard(self, key: str) -> int:
        return self._numbers(KeyKind.SHARD, key)[0]

    def shard_ledger(self, shard_id: int, ledger_id: int) -> str:
        return self._key(KeyKind.SHARD_LEDGER, shard_id, ledger_id)

    def parse_shard_ledger(self, key: str) -> tuple[int, int]:
        """(shard, ledger)"""
        shard_id, ledger_id = self._numbers(KeyKind.SHARD_LEDGER, key)
        return shard_id, ledger_id

    def page(self, shard_id: int, page: int) -> str:
        return self._key(KeyKind.PAGE, shard_id, page)

    def pages_prefix(self, shard_id: int) -> str:
        return self._prefix(KeyKind.PAGE, shard_id)

    def parse_page(self, key: str) -> tuple[int, int]:
        """(shard, page)"""
        shard_id, page = self._numbers(KeyKind.PAGE, key)
        return shard_id, page

    def ledger(self, ledger_id: int) -> str:
        return self._key(KeyKind.LEDGER, ledger_id)

    def ledgers_prefix(self) -> str:
        return self._prefix(KeyKind.LEDGER)

    def parse_ledger(self, key: str) -> int:
        return self._numbers(KeyKind.LEDGER, key)[0]

    def index(self, bookie_id: str, ledger_id: int) -> str:
        return self._key(KeyKind.INDEX, bookie_id, ledger_id)

    def index_prefix(self, bookie_id: str = "") -> str:
        return self._prefix(KeyKind.INDEX, *_given(bookie_id))

    def parse_index(self, key: str) -> tuple[str, int]:
        """(bookie, ledger)"""
        bookie_id, ledger_id = self._values(KeyKind.INDEX, key)
        return str(bookie_id), int(ledger_id)

    # Servers.

    def broker(self, broker_id: str) -> str:
        return self._key(KeyKind.BROKER, broker_id)

    def brokers_prefix(self) -> str:
        return self._prefix(KeyKind.BROKER)

    def parse_broker(self, key: str) -> str:
        return self._names(KeyKind.BROKER, key)[0]

    def broker_drain(self, broker_id: str) -> str:
        """The wish that this broker has no shards."""
        return self._key(KeyKind.BROKER_DRAIN, broker_id)

    def broker_drains_prefix(self) -> str:
        return self._prefix(KeyKind.BROKER_DRAIN)

    def parse_broker_drain(self, key: str) -> str:
        return self._names(KeyKind.BROKER_DRAIN, key)[0]

    def bookie(self, bookie_id: str) -> str:
        return self._key(KeyKind.BOOKIE, bookie_id)

    def bookies_prefix(self) -> str:
        return self._prefix(KeyKind.BOOKIE)

    def parse_bookie(self, key: str) -> str:
        return self._names(KeyKind.BOOKIE, key)[0]

    def cookie(self, bookie_id: str) -> str:
        return self._key(KeyKind.COOKIE, bookie_id)

    def cookies_prefix(self) -> str:
        return self._prefix(KeyKind.COOKIE)

    def parse_cookie(self, key: str) -> str:
        return self._names(KeyKind.COOKIE, key)[0]

    def owned(self, owner: Owner, shard_id: int) -> str:
        return self._key(KeyKind.OWNED, owner.broker_id, owner.session, shard_id)

    def owned_prefix(self, owner: Owner | None = None, *, broker_id: str = "") -> str:
        """What one session owns; with `broker_id` all sessions of that broker; else all sessions."""
        if owner is not None:
            return self._prefix(KeyKind.OWNED, owner.broker_id, owner.session)
        return self._prefix(KeyKind.OWNED, *_given(broker_id))

    def parse_owned(self, key: str) -> tuple[Owner, int]:
        """(owner, shard)"""
        session, shard_id = self._numbers(KeyKind.OWNED, key)
        return Owner(self._names(KeyKind.OWNED, key)[0], session), shard_id


def _given(*names: str) -> tuple[str, ...]:
    """The leading names that are not empty; a later one without the one before it is a mistake."""
    kept = tuple(name for name in names if name)
    if kept != names[: len(kept)]:
        raise ValueError(f"a part of a prefix is missing: parts=`{names}`")
    return kept


def _match(kind: KeyKind, parts: list[str]) -> tuple[str | int, ...] | None:
    shapes = kind.value
    if len(parts) != len(shapes):
        return None
    values: list[str | int] = []
    for shape, part in zip(shapes, parts, strict=True):
        if shape == NAME:
            if not part:
                return None
            values.append(part)
        elif shape == NUMBER:
            if not _is_number(part):
                return None
            values.append(int(part, 16))
        elif shape != part:
            return None
    return tuple(values)
