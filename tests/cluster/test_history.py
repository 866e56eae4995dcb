"""The judge of histories finds every anomaly it is there for, in histories made by hand, and nothing in a good one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cluster.history import ANOMALIES, INBOX_S, History, Verdict

COUNT = 6
KEYS = 2
SHARD = 3


class Story:
    """A run of one producer with two keys into one shard, a stream consumer and two queue consumers, event by event.

    Each call is one event, one second after the one before.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[dict[str, Any]] = []
        self._tell("producer", producer=0, name=None, keys=KEYS)
        self._tell("consumer", subscription="s", consumer="s0", kind="stream")
        self._tell("consumer", subscription="q", consumer="q0", kind="queue")
        self._tell("consumer", subscription="q", consumer="q1", kind="queue")

    def _tell(self, event: str, **facts: Any) -> None:
        self.now += 1.0
        self.events.append({"event": event, "time": self.now, **facts})

    def sent(self, count: int = COUNT) -> None:
        self._tell("sent", producer=0, count=count)

    def answered(self, numbers: Sequence[int] = range(COUNT), offsets: Sequence[int | None] | None = None) -> None:
        offsets = numbers if offsets is None else offsets
        self._tell("answered", producer=0, numbers=[*numbers], shards=[SHARD] * len(offsets), offsets=[*offsets])

    def failed(self, *numbers: int) -> None:
        self._tell("failed", producer=0, numbers=[*numbers], error="ClusterUnavailable")

    def delivered(self, consumer: str, *offsets: int, numbers: Sequence[int] | None = None) -> None:
        numbers = offsets if numbers is None else numbers
        self._tell(
            "delivered", subscription=consumer[0], consumer=consumer, shard=SHARD,
            offsets=[*offsets], producers=[0] * len(offsets), numbers=[*numbers],
        )  # fmt: skip

    def acked(self, consumer: str, *offsets: int) -> None:
        facts: dict[str, Any] = {"through": offsets[-1]} if consumer[0] == "s" else {"offsets": [*offsets]}
        self._tell("acked", subscription=consumer[0], consumer=consumer, shard=SHARD, asked=self.now, **facts)

    def fault(self, *, redelivers: bool = True, lasts_s: float = 1.0) -> None:
        self._tell("fault", what="SIGKILL", until=self.now + lasts_s, redelivers=redelivers)

    def stored(self, *numbers: int, first: int = 0) -> None:
        self._tell("stored", shard=SHARD, first=first, producers=[0] * len(numbers), numbers=[*numbers])

    def backlog(self, s: int = 0, q: int = 0) -> None:
        self._tell("backlog", subscription="s", messages=s)
        self._tell("backlog", subscription="q", messages=q)

    # --- whole parts, as they should be ---

    def published(self) -> None:
        self.sent()
        self.answered()

    def streamed(self) -> None:
        self.delivered("s0", *range(COUNT))
        self.acked("s0", COUNT - 1)

    def queued(self) -> None:
        """One key to each consumer."""
        for consumer, first in (("q0", 0), ("q1", 1)):
            self.delivered(consumer, *range(first, COUNT, 2))
            self.acked(consumer, *range(first, COUNT, 2))

    def ended(self) -> None:
        self.stored(*range(COUNT))
        self.backlog()

    def judge(self) -> Verdict:
        return History(self.events).judge()


@pytest.fixture
def story() -> Story:
    return Story()


def anomalies(verdict: Verdict) -> dict[str, int]:
    """Those that were found; `problems` tells exactly these."""
    found = {name: count for name in ANOMALIES if (count := getattr(verdict, name))}
    assert {problem.partition(":")[0] for problem in verdict.problems} == set(found)
    return found


def test_a_run_without_anomalies_is_judged_to_have_none(story: Story) -> None:
    story.published()
    story.streamed()
    story.queued()
    story.ended()
    verdict = story.judge()
    assert anomalies(verdict) == {}
    assert (verdict.sent, verdict.acked, verdict.unknown, verdict.stored) == (COUNT, COUNT, 0, COUNT)
    assert (verdict.delivered, verdict.redelivered) == (2 * COUNT, 0)


def published(story: Story) -> Story:
    """A run in which only the log can be wrong: nobody consumes."""
    story.events = [event for event in story.events if event["event"] != "consumer"]
    story.published()
    return story


def test_an_answered_message_that_is_not_stored_is_lost(story: Story) -> None:
    published(story).stored(*range(COUNT - 1))
    assert anomalies(story.judge()) == {"lost": 1}


def test_a_message_of_unknown_outcome_may_be_stored_or_not(story: Story) -> None:
    published(story).sent(2)
    story.failed(COUNT, COUNT + 1)
    story.stored(*range(COUNT), COUNT + 1)
    verdict = story.judge()
    assert anomalies(verdict) == {}
    assert verdict.unknown == 2


def test_a_message_that_is_stored_twice_is_a_duplicate(story: Story) -> None:
    published(story).stored(*range(COUNT), 2)
    assert anomalies(story.judge()) == {"duplicated": 1}


def test_a_message_that_nobody_sent_is_invented(story: Story) -> None:
    published(story).stored(*range(COUNT), COUNT)
    assert anomalies(story.judge()) == {"invented": 1}


def test_a_key_that_is_stored_in_another_order_is_reordered(story: Story) -> None:
    story.events = [event for event in story.events if event["event"] != "consumer"]
    story.sent()
    story.answered(range(COUNT), (0, 1, 4, 3, 2, 5))
    story.stored(0, 1, 4, 3, 2, 5)
    assert anomalies(story.judge()) == {"reordered": 1}


def test_messages_of_two_keys_may_change_places(story: Story) -> None:
    story.events = [event for event in story.events if event["event"] != "consumer"]
    story.sent()
    story.answered(range(COUNT), (1, 0, 2, 3, 4, 5))
    story.stored(1, 0, 2, 3, 4, 5)
    assert anomalies(story.judge()) == {}


def test_messages_without_a_key_may_be_stored_in_any_order(story: Story) -> None:
    story.events = [event for event in story.events if event["event"] not in ("consumer", "producer")]
    story.events.insert(0, {"event": "producer", "time": 0.0, "producer": 0, "name": None, "keys": 0})
    story.sent()
    story.answered(range(COUNT), (5, 4, 3, 2, 1, 0))
    story.stored(5, 4, 3, 2, 1, 0)
    assert anomalies(story.judge()) == {}


def test_offsets_that_are_left_out_or_come_twice_are_gaps(story: Story) -> None:
    story.events = [event for event in story.events if event["event"] != "consumer"]
    story.sent()
    story.answered(range(COUNT), (0, 1, 2, 4, 5, 5))
    story.stored(0, 1, 2)
    story.stored(3, 4, first=4)
    story.stored(5, first=5)
    assert anomalies(story.judge()) == {"gaps": 2}


def test_a_message_that_stands_elsewhere_than_was_answered_is_misplaced(story: Story) -> None:
    story.events = [event for event in story.events if event["event"] != "consumer"]
    story.sent()
    story.answered(range(COUNT), (0, 1, 2, 3, 5, None))
    story.stored(*range(COUNT))
    assert anomalies(story.judge()) == {"misplaced": 1}


def test_what_is_delivered_but_not_stored_is_invented(story: Story) -> None:
    story.published()
    story.streamed()
    story.queued()
    story.delivered("s0", COUNT)
    story.ended()
    assert anomalies(story.judge()) == {"invented": 1}


def test_a_message_that_is_delivered_under_the_offset_of_another_is_invented(story: Story) -> None:
    story.published()
    story.streamed()
    story.queued()
    story.delivered("q0", 0, numbers=[2])
    story.ended()
    assert anomalies(story.judge()) == {"invented": 1}


def test_a_stream_that_leaves_out_a_message_is_reordered_and_undelivered(story: Story) -> None:
    story.published()
    story.queued()
    story.delivered("s0", 0, 1, 2, 4, 5)
    story.acked("s0", COUNT - 1)
    story.ended()
    assert anomalies(story.judge()) == {"reordered": 1, "undelivered": 1}


def test_a_message_that_goes_ahead_of_one_of_its_key_is_reordered_and_so_is_the_late_one(story: Story) -> None:
    story.published()
    story.streamed()
    story.delivered("q0", 0, 4)
    story.delivered("q1", 1, 2, 3, 5)
    story.acked("q0", 0, 4)
    story.acked("q1", 1, 2, 3, 5)
    story.ended()
    assert anomalies(story.judge()) == {"reordered": 2}


def test_a_message_may_come_again_after_a_fault(story: Story) -> None:
    story.published()
    story.streamed()
    story.delivered("q0", *range(COUNT))
    story.fault()
    story.delivered("q1", *range(COUNT))
    story.acked("q1", *range(COUNT))
    story.ended()
    verdict = story.judge()
    assert anomalies(verdict) == {}
    assert verdict.redelivered == COUNT


def test_a_message_that_comes_again_while_a_fault_still_lasts_is_no_anomaly(story: Story) -> None:
    story.published()
    story.streamed()
    story.fault(lasts_s=10.0)
    story.delivered("q0", *range(COUNT))
    story.delivered("q1", *range(COUNT))
    story.acked("q1", *range(COUNT))
    story.ended()
    assert anomalies(story.judge()) == {}


@pytest.mark.parametrize("fault", ["none", "one that is over", "one that redelivers nothing"])
def test_a_message_that_comes_again_without_a_reason_is_repeated(story: Story, fault: str) -> None:
    story.published()
    story.streamed()
    if fault == "one that is over":
        story.fault(lasts_s=0.5)
    story.delivered("q0", *range(COUNT))
    if fault == "one that redelivers nothing":
        story.fault(redelivers=False)
    story.delivered("q1", 0)
    story.acked("q0", *range(COUNT))
    story.ended()
    assert anomalies(story.judge()) == {"repeated": 1}


@pytest.mark.parametrize("consumer", ["s0", "q0"])
def test_what_comes_to_a_consumer_after_its_acknowledgement_was_answered_undoes_it(story: Story, consumer: str) -> None:
    story.published()
    story.streamed()
    story.queued()
    story.fault()
    story.delivered(consumer, 0)
    story.ended()
    assert anomalies(story.judge()) == {"undone": 1}


def test_what_waited_in_another_consumers_client_undoes_nothing(story: Story) -> None:
    story.published()
    story.streamed()
    story.delivered("q0", *range(COUNT))
    story.fault()
    story.acked("q0", *range(COUNT))
    story.delivered("q1", 0)
    story.ended()
    assert anomalies(story.judge()) == {}


def test_what_comes_to_another_consumer_long_after_an_answered_acknowledgement_undoes_it(story: Story) -> None:
    story.published()
    story.streamed()
    story.queued()
    story.now += INBOX_S
    story.fault()
    story.delivered("q1", 0)
    story.ended()
    assert anomalies(story.judge()) == {"undone": 1}


def test_what_is_never_acknowledged_is_told(story: Story) -> None:
    story.published()
    story.queued()
    story.delivered("s0", *range(COUNT))
    story.acked("s0", 3)
    story.stored(*range(COUNT))
    story.backlog(s=2)
    assert anomalies(story.judge()) == {"unacked": 2}


def test_a_backlog_behind_answered_acknowledgements_tells_that_they_were_undone(story: Story) -> None:
    story.published()
    story.streamed()
    story.queued()
    story.stored(*range(COUNT))
    story.backlog(q=2)
    assert anomalies(story.judge()) == {"undone": 2}


def test_a_backlog_that_nobody_asked_for_is_no_empty_one(story: Story) -> None:
    story.published()
    story.streamed()
    story.queued()
    story.stored(*range(COUNT))
    assert anomalies(story.judge()) == {"undone": 2}


def test_a_pause_counts_while_something_is_under_way_and_only_then() -> None:
    story = Story()
    story.sent(4)
    story.now += 2.0
    story.answered([0, 1])
    story.now += 4.0
    story.answered([2, 3])
    story.now += 50.0
    story.sent(2)
    story.answered([4, 5])
    history = History(story.events)
    assert history.longest_pause() == 5.0
    assert history.longest_pause(end=9.5) == 3.0


def test_what_is_never_answered_is_a_pause_up_to_the_end() -> None:
    story = Story()
    story.sent(4)
    story.now += 9.0
    story.backlog()
    assert History(story.events).longest_pause() == 11.0


def test_latencies_are_of_messages_that_were_sent_in_the_time_asked_for() -> None:
    story = Story()
    story.sent(1000)
    middle = story.now + 0.5
    story.sent(2)
    story.answered(range(999))
    story.now += 7.0
    story.answered(range(999, 1002))
    history = History(story.events)
    early, late = history.latencies(end=middle), history.latencies(begin=middle)
    assert (early.messages, early.p50, early.p99, early.p999, early.worst) == (1000, 2e3, 2e3, 10e3, 10e3)
    assert (late.messages, late.p50) == (2, 9e3)
    assert history.latencies(end=0.0).messages == 0


def test_the_rate_is_that_between_the_first_answer_and_the_last() -> None:
    story = Story()
    story.sent(100)
    story.answered(range(10))
    story.answered(range(10, 40))
    story.now += 1.0
    story.answered(range(40, 100))
    assert History(story.events).rate() == 30.0


def test_half_a_line_at_the_end_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text('{"event": "sent", "time": 2.0, "producer": 0, "count": 1}\n{"event": "se')
    two.write_text('{"event": "producer", "time": 1.0, "producer": 0, "name": null, "keys": 1}\n')
    verdict = History.read([one, two]).judge()
    assert (verdict.sent, verdict.unknown) == (1, 1)


def test_only_some_examples_of_an_anomaly_are_told(story: Story) -> None:
    published(story).stored()
    (problem,) = story.judge().problems
    assert problem.startswith("lost: 6, such as message 0/0, answered at 6.000 with 3:0; message 0/1")
    assert problem.count("message") == 5
