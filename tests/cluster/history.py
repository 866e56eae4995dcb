"""What clients saw of a cluster, and the judgement of it. Pure.

A history is a list of events, dicts as they stand in the files that the workload writes, one JSON object a line. Times
are of CLOCK_MONOTONIC, which all processes of one machine share.

| event | facts beside `event` and `time` |
|---|---|
| producer | producer, name (None = unnamed), keys: message n of producer p has key n % keys of p; 0: none has a key |
| consumer | subscription, consumer, kind: stream or queue |
| sent | producer, count: the next numbers from 0 on, handed to the client together |
| answered | producer, numbers, shards, offsets: what is durable, and where |
| failed | producer, numbers, error: the outcome is unknown |
| delivered | subscription, consumer, shard, offsets, producers, numbers |
| acked | subscription, consumer, shard, asked, and offsets (queue) or through (stream): answered now, asked for then |
| fault | what, until, redelivers: consumers may get again what they have not acknowledged |
| stored | shard, first, producers, numbers: what a reader finds at the end, in the order it finds it |
| backlog | subscription, messages: what the broker says at the end |

Rules of the judgement:

1. What was answered is stored, once, at the place that was answered. Nothing is stored twice, or was never sent.
2. Offsets of a shard are dense. The messages of a key are stored in the order they were sent.
3. A subscription gets everything that is stored, as it is stored, and a message for the first time only after all
   before it: in the shard for a stream, in its key for a queue.
4. A message comes again only where a fault that redelivers lies between two deliveries.
5. What a consumer acknowledged never comes to it again once that was answered; nor to another, but for what waited in
   its client already: `INBOX_S` at most.
6. At the end everything is acknowledged, and the broker says the same.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

INBOX_S = 5.0
"""A message may have waited this long in a consumer's client when another consumer's acknowledgement was answered."""

EXAMPLES_MAX = 5
"""Of one kind of anomaly told one by one; the rest is counted."""

ANOMALIES = (
    "lost", "duplicated", "reordered", "misplaced", "invented", "gaps", "repeated", "undelivered", "undone", "unacked",
)  # fmt: skip

Event = Mapping[str, Any]
Sent = tuple[int, int]
"""Producer and number of a message."""

Place = tuple[int, int]
"""Shard and offset."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of publishing, in milliseconds, over messages: from the call to the answer."""

    messages: int
    p50: float
    p99: float
    p999: float
    worst: float


@dataclass(slots=True)
class Verdict:
    """Counts are of messages. `problems`: what must not be, in words, with examples; empty = all rules hold."""

    sent: int = 0
    acked: int = 0
    unknown: int = 0
    stored: int = 0
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    misplaced: int = 0
    invented: int = 0
    gaps: int = 0
    delivered: int = 0
    redelivered: int = 0
    repeated: int = 0
    undelivered: int = 0
    undone: int = 0
    unacked: int = 0
    longest_pause_s: float = 0.0
    messages_per_s: float = 0.0
    latency: Latencies = field(default_factory=lambda: Latencies(0, 0.0, 0.0, 0.0, 0.0))
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class _Anomalies:
    """Counts anomalies by kind, and keeps the first of each kind in words."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, example: str, count: int = 1) -> None:
        self.counts[kind] += count
        if len(self.examples[kind]) < EXAMPLES_MAX:
            self.examples[kind].append(example)

    def told(self) -> list[str]:
        return [f"{kind}: {count}, such as {'; '.join(self.examples[kind])}" for kind, count in self.counts.items()]


class History:
    """The events of one run, in the order of time."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._events = sorted(events, key=lambda event: event["time"])

    @classmethod
    def read(cls, files: Iterable[Path]) -> History:
        """From files of one JSON object a line."""
        return cls(event for file in files for event in _events_of(file))

    def of(self, kind: str) -> Iterator[Event]:
        return (event for event in self._events if event["event"] == kind)

    def latencies(self, begin: float = float("-inf"), end: float = float("inf")) -> Latencies:
        """Of messages that were sent in this time and answered at all."""
        sent_at = self.sent_at()
        found: list[float] = []
        for event in self.of("answered"):
            times, now = sent_at[event["producer"]], event["time"]
            found += [now - times[number] for number in event["numbers"] if begin <= times[number] < end]
        return _percentiles(found)

    def sent_at(self) -> dict[int, array[float]]:
        """Of each producer, when each of its messages was sent."""
        times: defaultdict[int, array[float]] = defaultdict(lambda: array("d"))
        for event in self.of("sent"):
            times[event["producer"]].extend([event["time"]] * event["count"])
        return times

    def longest_pause(self, begin: float = float("-inf"), end: float = float("inf")) -> float:
        """The longest time that some producer had no answer in, though it had something under way, in seconds.

        begin, end   only the part of a pause that lies in this time counts
        """
        open_at: dict[int, float] = {}
        pending: Counter[int] = Counter()
        longest = 0.0
        for event in self._events:
            kind = event["event"]
            if kind == "sent":
                if not pending[event["producer"]]:
                    open_at[event["producer"]] = event["time"]
                pending[event["producer"]] += event["count"]
            elif kind in ("answered", "failed"):
                producer = event["producer"]
                longest = max(longest, min(event["time"], end) - max(open_at[producer], begin))
                open_at[producer] = event["time"]
                pending[producer] -= len(event["numbers"])
        for producer in +pending:
            longest = max(longest, min(self._events[-1]["time"], end) - max(open_at[producer], begin))
        return longest

    def rate(self, begin: float = float("-inf"), end: float = float("inf")) -> float:
        """Messages that were answered each second, from the first answer in this time to the last."""
        answers = [(e["time"], len(e["numbers"])) for e in self.of("answered") if begin <= e["time"] < end]
        if len(answers) < 2 or answers[-1][0] == answers[0][0]:
            return 0.0
        return sum(count for _, count in answers[1:]) / (answers[-1][0] - answers[0][0])

    def judge(self) -> Verdict:
        """Applies the rules above."""
        anomalies = _Anomalies()
        verdict = Verdict(
            sent=sum(event["count"] for event in self.of("sent")),
            acked=sum(len(event["numbers"]) for event in self.of("answered")),
            longest_pause_s=self.longest_pause(),
            messages_per_s=self.rate(),
            latency=self.latencies(),
        )
        verdict.unknown = verdict.sent - verdict.acked
        log = _judge_log(self, anomalies)
        verdict.stored = len(log.at)
        kinds = {event["subscription"]: event["kind"] for event in self.of("consumer")}
        for name, kind in sorted(kinds.items()):
            judge = _SubscriptionJudge(name, kind, log, anomalies, tuple(self.of("fault")))
            for event in self._events:
                if event.get("subscription") == name:
                    judge.take(event)
            judge.finish()
            verdict.delivered += judge.delivered
            verdict.redelivered += judge.redelivered
        for anomaly in ANOMALIES:
            setattr(verdict, anomaly, anomalies.counts[anomaly])
        verdict.problems = anomalies.told()
        return verdict


# --- the log ---


@dataclass(slots=True)
class _Log:
    """What is stored. `key_place`: how many messages of the same key are stored before it."""

    at: dict[Place, Sent]
    key_of: dict[Place, tuple[int, int]]
    key_place: dict[Place, int]
    ends: dict[int, int]


def _judge_log(history: History, anomalies: _Anomalies) -> _Log:
    """Rules 1 and 2."""
    keys = {event["producer"]: event["keys"] for event in history.of("producer")}
    sent = {producer: len(times) for producer, times in history.sent_at().items()}
    log = _Log({}, {}, {}, {})
    places: dict[Sent, Place] = {}
    last_of_key: dict[tuple[int, int], int] = {}
    count_of_key: Counter[tuple[int, int]] = Counter()
    for event in history.of("stored"):
        shard = event["shard"]
        if event["first"] != log.ends.get(shard, 0):
            expected = log.ends.get(shard, 0)
            anomalies.add("gaps", f"shard {shard} goes on at {event['first']} where {expected} was to come")
        for offset, message in enumerate(zip(event["producers"], event["numbers"], strict=True), event["first"]):
            place = (shard, offset)
            producer, number = message
            log.at[place] = message
            if number >= sent.get(producer, 0):
                anomalies.add("invented", f"{_named(message)} at {_placed(place)} was never sent")
                continue
            if message in places:
                where = f"{_placed(places[message])} and {_placed(place)}"
                anomalies.add("duplicated", f"{_named(message)} stands at {where}")
                continue
            places[message] = place
            key = (producer, number % keys[producer] if keys[producer] else number)
            if number < last_of_key.get(key, -1):
                anomalies.add("reordered", f"{_named(message)} is stored behind number {last_of_key[key]} of its key")
            last_of_key[key] = number
            log.key_of[place] = key
            log.key_place[place] = count_of_key[key]
            count_of_key[key] += 1
        log.ends[shard] = event["first"] + len(event["numbers"])
    _judge_answers(history, places, anomalies)
    return log


def _judge_answers(history: History, places: Mapping[Sent, Place], anomalies: _Anomalies) -> None:
    for event in history.of("answered"):
        producer = event["producer"]
        for number, shard, offset in zip(event["numbers"], event["shards"], event["offsets"], strict=True):
            place = places.get((producer, number))
            if place is None:
                answered = f"answered at {event['time']:.3f} with {shard}:{'-' if offset is None else offset}"
                anomalies.add("lost", f"{_named((producer, number))}, {answered}")
            # Of what was stored before its producer came back, only the shard may be known.
            elif place[0] != shard or offset not in (None, place[1]):
                answered = f"was answered with {shard}:{offset}"
                anomalies.add("misplaced", f"{_named((producer, number))} at {_placed(place)} {answered}")


# --- subscriptions ---


class _SubscriptionJudge:
    """Rules 3 to 6 for one subscription. Takes its events in the order of time."""

    def __init__(self, name: str, kind: str, log: _Log, anomalies: _Anomalies, faults: Sequence[Event]) -> None:
        self.delivered = 0
        self.redelivered = 0
        self._name = name
        self._is_stream = kind == "stream"
        self._log = log
        self._anomalies = anomalies
        self._faults = [(fault["time"], fault["until"]) for fault in faults if fault["redelivers"]]
        self._last_delivery: dict[Place, Event] = {}
        self._next_of_shard: dict[int, int] = {}
        self._next_of_key: dict[tuple[int, int], int] = {}
        self._acked: dict[Place, list[tuple[str, float]]] = defaultdict(list)
        """Of a queue: whose acknowledgements of it were answered, and when."""
        self._through: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
        """Of a stream: what each consumer acknowledged in each shard, and when that was answered; both grow."""
        self._floor: dict[int, int] = defaultdict(lambda: -1)
        self._backlog: int | None = None

    def take(self, event: Event) -> None:
        match event["event"]:
            case "delivered":
                shard = event["shard"]
                messages = zip(event["producers"], event["numbers"], strict=True)
                for offset, message in zip(event["offsets"], messages, strict=True):
                    self._take_delivery((shard, offset), message, event)
            case "acked" if "through" in event:
                self._take_stream_ack(event)
            case "acked":
                for offset in event["offsets"]:
                    self._acked[event["shard"], offset].append((event["consumer"], event["time"]))
            case "backlog":
                self._backlog = event["messages"]

    def finish(self) -> None:
        unacked = 0
        for place, message in self._log.at.items():
            if place not in self._last_delivery:
                self._anomalies.add("undelivered", f"{_named(message)} at {_placed(place)} in {self._name}")
            if place not in self._acked and place[1] > self._floor[place[0]]:
                self._anomalies.add("unacked", f"{_named(message)} at {_placed(place)} in {self._name}")
                unacked += 1
        if self._backlog is None:
            self._anomalies.add("undone", f"nobody asked for the backlog of {self._name}")
        elif self._backlog > unacked:
            told = f"{self._name} has a backlog of {self._backlog} where {unacked} are not acknowledged"
            self._anomalies.add("undone", told, self._backlog - unacked)

    def _take_stream_ack(self, event: Event) -> None:
        shard = event["shard"]
        self._through[event["consumer"], shard].append((event["time"], event["through"]))
        self._floor[shard] = max(self._floor[shard], event["through"])

    def _take_delivery(self, place: Place, message: Sent, event: Event) -> None:
        self.delivered += 1
        if self._log.at.get(place) != message:
            self._tell("invented", place, message, event, f"where {self._log.at.get(place)} is stored")
            return
        if place in self._last_delivery:
            self._judge_repetition(place, message, event)
        else:
            self._judge_order(place, message, event)
        self._last_delivery[place] = event

    def _judge_order(self, place: Place, message: Sent, event: Event) -> None:
        """A first delivery."""
        shard, offset = place
        key = self._log.key_of.get(place)
        if self._is_stream:
            expected = self._next_of_shard.get(shard, 0)
            if offset != expected:
                self._tell("reordered", place, message, event, f"where offset {expected} was to come")
            if offset >= expected:
                self._next_of_shard[shard] = offset + 1
        elif key is not None:
            expected = self._next_of_key.get(key, 0)
            number = self._log.key_place[place]
            if number != expected:
                ahead = f"as number {number} of its key where {expected} was to come"
                self._tell("reordered", place, message, event, ahead)
            if number >= expected:
                self._next_of_key[key] = number + 1

    def _judge_repetition(self, place: Place, message: Sent, event: Event) -> None:
        before, now = self._last_delivery[place], event["time"]
        ack = self._undoes(place, event["consumer"], now)
        if ack is not None:
            self._tell("undone", place, message, event, f"acknowledged by {ack[0]}, answered at {ack[1]:.3f}")
        elif any(begin <= now and before["time"] <= until for begin, until in self._faults):
            self.redelivered += 1
        else:
            earlier = f"and to {before['consumer']} at {before['time']:.3f}, with no fault between"
            self._tell("repeated", place, message, event, earlier)

    def _tell(self, kind: str, place: Place, message: Sent, event: Event, why: str) -> None:
        told = f"{_named(message)} at {_placed(place)} to {event['consumer']} at {event['time']:.3f}, {why}"
        self._anomalies.add(kind, told)

    def _undoes(self, place: Place, consumer: str, now: float) -> tuple[str, float] | None:
        """The consumer and time of an answered acknowledgement that this delivery undoes."""
        acks = list(self._acked.get(place, ()))
        for (who, shard), answered in self._through.items():
            if shard == place[0]:
                index = bisect_left(answered, place[1], key=lambda ack: ack[1])
                if index < len(answered):
                    acks.append((who, answered[index][0]))
        for who, at in acks:
            if at + (0.0 if who == consumer else INBOX_S) < now:
                return who, at
        return None


# --- parts ---


def _events_of(file: Path) -> Iterator[Event]:
    with file.open() as lines:
        for line in lines:
            # A process that was killed may leave half a line, at the end only.
            if line.endswith("\n"):
                yield json.loads(line)


def _percentiles(found: list[float]) -> Latencies:
    if not found:
        return Latencies(0, 0.0, 0.0, 0.0, 0.0)
    found.sort()
    p50, p99, p999 = (found[int(len(found) * share)] * 1e3 for share in (0.5, 0.99, 0.999))
    return Latencies(len(found), p50, p99, p999, found[-1] * 1e3)


def _named(message: Sent) -> str:
    return f"message {message[0]}/{message[1]}"


def _placed(place: Place) -> str:
    return f"{place[0]}:{place[1]}"
