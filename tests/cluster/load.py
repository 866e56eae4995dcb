"""A load on a cluster, from its start to the judgement of what its clients saw."""

from __future__ import annotations

import gc
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.harness import Cluster, Process, pass_time, until
from cluster.history import Event, History, Verdict
from cluster.workload import GROUPS, QUEUE, STREAM, ConsumeConfig, PublishConfig, command

from magnetar.client import EARLIEST, LATEST

CONSUMERS = {STREAM: 2, QUEUE: 3}
PUBLISHERS = "publishers"
ANSWERED_FIRST = 1000
"""Messages answered before a load counts as running."""

DRAIN_S = 120.0
REDELIVERY_S = 3.0
"""How long after the end of a fault consumers may still get what they had not acknowledged."""


Window = tuple[float, float]
"""Begin and end of a time."""


@dataclass
class Load:
    """Producers at full speed, stream consumers and key-ordered queue consumers of one topic.

    Beside them the topic has a subscription that acknowledges nothing, so that all messages are still there at the end.
    """

    cluster: Cluster
    folder: Path
    topic: str = "t"
    shards: int = 8
    groups: tuple[int, ...] = GROUPS
    events: list[Event] = field(default_factory=list)
    processes: dict[str, Process] = field(default_factory=dict)
    history: History = field(default_factory=lambda: History(()))

    def start(self) -> None:
        """Runs on return."""
        with self.cluster.connect() as client:
            client.admin.topics.create(self.topic, shards=self.shards)
            client.admin.subscriptions.create(self.topic, "keep", start=EARLIEST)
        for kind, count in CONSUMERS.items():
            servers, history = self.cluster.servers, self._file(kind)
            self._launch(kind, ConsumeConfig(servers, self.topic, history, kind, kind, count))
        history = self._file(PUBLISHERS)
        config = PublishConfig(self.cluster.servers, self.topic, history, self.groups)
        self._launch(PUBLISHERS, config)
        for kind, count in CONSUMERS.items():
            until(f"{kind} consumers are open", lambda kind=kind, count=count: self._count(kind, "consumers") >= count)
        until("messages are answered", lambda: self._count(PUBLISHERS, "answered") >= ANSWERED_FIRST)

    def close(self) -> None:
        """Kills the clients. Fine if they ended."""
        for process in self.processes.values():
            process.kill()

    def run(self, seconds: float) -> Window:
        """Lets it go on; returns begin and end of this time."""
        begin = time.monotonic()
        pass_time(seconds)
        for process in self.processes.values():
            assert process.alive, f"{process.name} ended: {process.tail()}"
        return begin, time.monotonic()

    def run_until_answered(self, more: int) -> None:
        """Lets it go on until so many more messages are answered."""
        wanted = self._count(PUBLISHERS, "answered") + more
        until(f"{more} more messages are answered", lambda: self._count(PUBLISHERS, "answered") >= wanted)

    @contextmanager
    def fault(self, what: str, *, redelivers: bool) -> Iterator[None]:
        """While this lasts and shortly after, the fault is there.

        redelivers   consumers may get messages again: only the owner of a shard, or its session, can be the reason
        """
        begin = time.monotonic()
        yield
        end = time.monotonic()
        until = end + REDELIVERY_S
        fault = {"event": "fault", "time": begin, "what": what, "end": end, "until": until, "redelivers": redelivers}
        self.events.append(fault)

    def finish(self) -> Verdict:
        """Stops the producers, waits until everything is acknowledged, reads everything back, and judges `history`."""
        assert self.processes[PUBLISHERS].terminate() == 0, self.processes[PUBLISHERS].tail()
        failed = self._count(PUBLISHERS, "failed")
        self._drain()
        for kind in CONSUMERS:
            self.processes[kind].signal(signal.SIGTERM)
        for kind in CONSUMERS:
            assert self.processes[kind].wait() == 0, self.processes[kind].tail()
        self._read_back()
        assert not failed, f"{failed} messages were answered with an error: see {self._file(PUBLISHERS)}"
        own = self.folder / "test.jsonl"
        own.write_text("".join(json.dumps(event) + "\n" for event in self.events))
        # Millions of small objects, none of them garbage: the collector would take a third of the time.
        gc.disable()
        try:
            self.history = History.read([own, *(Path(self._file(name)) for name in self.processes)])
            return self.history.judge()
        finally:
            gc.enable()

    def pauses(self) -> list[str]:
        """The longest pause during each fault, in words; once the load has ended."""
        faults = [event for event in self.events if event["event"] == "fault"]
        longest = [self.history.longest_pause(fault["time"], fault["end"]) for fault in faults]
        return [f"{fault['what']}: {pause_s:.2f} s" for fault, pause_s in zip(faults, longest, strict=True)]

    def tails(self) -> list[tuple[str, str]]:
        """The last lines that each process of clients wrote to stderr."""
        return [(name, process.tail()) for name, process in self.processes.items()]

    def _drain(self) -> None:
        """Asks the broker for the backlogs until they are empty, or no longer shrink."""
        with self.cluster.connect() as client:

            def backlogs() -> dict[str, int]:
                found = client.admin.subscriptions.list(self.topic)
                return {one.subscription: one.backlog_messages for one in found if one.subscription in CONSUMERS}

            try:
                until("everything is acknowledged", lambda: not any(backlogs().values()), DRAIN_S)
            finally:
                for subscription, messages in backlogs().items():
                    now = time.monotonic()
                    self.events.append(
                        {"event": "backlog", "time": now, "subscription": subscription, "messages": messages}
                    )

    def _read_back(self) -> None:
        with self.cluster.connect() as client, client.reader(self.topic, start=EARLIEST, stop=LATEST) as reader:
            for batch in reader.batches():
                sent = [payload.split(b":", 2) for payload in batch.payloads]
                self.events.append({
                    "event": "stored", "time": time.monotonic(), "shard": batch.shard, "first": batch.offsets[0],
                    "producers": [int(parts[0]) for parts in sent], "numbers": [int(parts[1]) for parts in sent],
                })  # fmt: skip

    def _launch(self, name: str, config: PublishConfig | ConsumeConfig) -> None:
        self.processes[name] = Process(name, self.folder)
        self.processes[name].start(command(config))

    def _file(self, name: str) -> str:
        return str(self.folder / f"{name}.jsonl")

    def _count(self, name: str, what: str) -> int:
        """Of the progress that a process told last."""
        process = self.processes[name]
        assert process.alive or process.exit_code == 0, f"{name} ended: {process.tail()}"
        lines = process.lines()
        return int(json.loads(lines[-1]).get(what, 0)) if lines else 0


Judge = Callable[[Load], None]
"""Ends a load and fails for what must not be; the load's `history` is there on return."""

COLUMNS = (
    "run", "msgs/s", "acked", "delivered", "lost", "twice", "reordered", "undone", "redelivered", "pause s",
    "p50 ms", "p99 ms", "p99.9 ms",
)  # fmt: skip


def row(run: str, verdict: Verdict) -> list[str]:
    """What is printed of a run."""
    latency = verdict.latency
    return [
        run, f"{verdict.messages_per_s:,.0f}", f"{verdict.acked:,}", f"{verdict.delivered:,}", str(verdict.lost),
        str(verdict.duplicated + verdict.repeated), str(verdict.reordered), str(verdict.undone),
        f"{verdict.redelivered:,}", f"{verdict.longest_pause_s:.2f}",
        f"{latency.p50:.0f}", f"{latency.p99:.0f}", f"{latency.p999:.0f}",
    ]  # fmt: skip


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns, a header first."""
    cells = [COLUMNS, *rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return ["  ".join(line) for line in aligned]
