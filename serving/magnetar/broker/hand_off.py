"""The hand-off of a shard between living brokers: the protocol, and what a receiver does about what it hears. Pure.

    source                                        target
    SERVING                                       -
      | ReceiveShard ---------------------------->  reserves a ledger, expects the shard: EXPECTING
      | <------------- its session, the ledger      (whoever wants the shard here waits from now on)
    GIVING  accepts nothing more; sends everybody
      |     to the target; completes its pipeline,
      |     its cursors, closes its ledgers
      |  one transaction: owner = the target's session, next epoch, the new ledger linked;
      |  compares that session and every record it changes
    PASSED                                        its own: SERVING, without recovery
      | TakeShard(passed on, consumers, state) ---> serves it; queues wait for the consumers that were named
    -

A shard that the source owns and has not open needs none of this: there is nothing accepted and not stored, nobody to be
sent on. It passes by the transaction that the target's claim would be, made by the source (`ServedShards.give`). The
target opens it when it is wanted, as any shard of its own.

Invariants:

1. Before the transaction the source owns the shard, or who claims it when its lease has ended; after it the target
   does, or who claims it then. An unknown outcome is read again (`metadata/shards.py`). Nothing else names the owner.
2. What the source accepted is stored and answered before the transaction. What came later is not: producers send it to
   the target, where their last sequence is known from the state that the shard carries.
3. The source's ledgers are closed in that transaction, so that there is nothing to be fenced; the only open ledger is
   the target's, and empty.
4. A message is in the hands of one consumer: the source delivers nothing from GIVING on, and the target nothing of a
   queue until all consumers that the source named have said what they hold, at most REUNION_S.

Who dies, and when:

- The target before the transaction: the transaction fails on its session and the source opens the shard again; if its
  session outlives it, the shard waits for its lease. After the transaction: as any owner that dies.
- The source before the transaction: the target asks it after SILENCE_S, hears nothing, and claims with fencing; the
  source, if it lives after all, is fenced and finds the other claim. After the transaction: the record names the
  target, which learns it from its watch, from its question, or with the next request for the shard.
- A message between them that is lost is silence: the target asks, and the records decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

SILENCE_S = 1.0
"""How long a target waits for news of a shard that it expects before it asks the source, and for the answer."""


class Source(Enum):
    """What the source answered to the question whether the shard is still about to come."""

    GIVING = "it is"
    NOT_GIVING = "it is not, any more"
    SILENT = "no answer"


class Step(Enum):
    """What a target that expects a shard does next."""

    WAIT = "wait on"
    ACCEPT = "the records should give it to this session: read them"
    CLAIM = "claim it as any other shard: nobody's, or its owner is to be named"
    FENCE = "claim it from its owner, although that one's session lives"


@dataclass(slots=True)
class Expectation:
    """A shard that another broker is about to pass on, as its target sees it.

    told      what TakeShard said: it was passed on, or it stays; None = nothing yet
    recorded  a watch showed the records that give it to this broker
    source    the answer to the last question; None = none was asked since there was news
    """

    told: bool | None = None
    recorded: bool = False
    source: Source | None = None

    def next_step(self) -> Step:
        if self.told or self.recorded:
            return Step.ACCEPT
        if self.told is False:
            return Step.CLAIM
        match self.source:
            case Source.SILENT:
                return Step.FENCE
            case Source.NOT_GIVING:
                # It was passed on and the message lost, or the source started anew: the records know.
                return Step.CLAIM
            case Source.GIVING | None:
                return Step.WAIT
