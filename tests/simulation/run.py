"""Runs seeds of the simulator: `make sim SEEDS=n`, `make sim SEED=x`. See README.md.

Each seed runs in a process of its own, forked from one that has imported everything: all begin alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
if __name__ == "__main__" and os.environ.get("PYTHONHASHSEED") != "0":
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})

import asyncio  # noqa: E402

import structlog  # noqa: E402
from simulation import entropy, planted  # noqa: E402
from simulation.checkers import HEALED_S, verify  # noqa: E402
from simulation.faults import Faults  # noqa: E402
from simulation.moves import Moves  # noqa: E402
from simulation.oracle import Oracle, Violation  # noqa: E402
from simulation.rebalancing import Rebalancing  # noqa: E402
from simulation.repair import Repair  # noqa: E402
from simulation.workload import CALLS, KEPT, TRIMMED, Scene, Workload  # noqa: E402
from simulation.world import Shape, World  # noqa: E402

REPAIRED_SEEDS = 0.6
"""Share of the seeds with busy collectors in which copies of closed ledgers are moved."""
MOVED_SEEDS = 0.6
"""Share of the seeds in which an operator moves shards between brokers."""
REBALANCED_SEEDS = 0.3
"""Share of the seeds without those in which an operator rebalances bookies, and they repair what is lost."""
RACKED_SEEDS = 0.4
"""Share of both in which bookies stand in racks."""
RACKS = ("r1", "r2", "r3", "r4", "r4")
SHORT_SEGMENT_S = 1.0
"""In these: so that there are ledgers to move."""
ALL_PLANTS = "all"
TOLD_EVERY = 500
FAULTS_S = 40.0
"""Virtual seconds after which faults end, if the calls are not used up before."""
SEED_BITS = 40
SEED_CPU_S_MAX = 60
"""A seed takes about one second of processor time; what takes so long spins."""


@dataclass(frozen=True)
class Outcome:
    seed: int
    violation: str
    digest: str = ""
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    turns: int = 0
    facts: str = ""
    tail: str = ""


class Simulation:
    """One run."""

    def __init__(self, seed: int, calls: int) -> None:
        self.seed = seed
        rng = random.Random(f"scene {seed}")
        resting = random.Random(f"resting {seed}")
        shape = Shape(
            rest_after_s=resting.choice([1.0, 1.0, 3.0, 3600.0]),
            trim_interval_s=resting.choice([0.3, 1.0, 5.0]),
            lease_s=rng.choice([1.0, 2.0, 5.0]),
            segment_s=rng.choice([3.0, 10.0, 3600.0]),
            gc_interval_s=rng.choice([0.5, 0.5, 5.0, 60.0]),
            cursor_ledger_bytes=rng.choice([300, 300, 4 << 20]),
        )
        scene = Scene.draw(rng, calls)
        self.repairs = shape.gc_interval_s < 1.0 and rng.random() < REPAIRED_SEEDS
        rebalances = not self.repairs and random.Random(f"rebalances {seed}").random() < REBALANCED_SEEDS
        if rebalances:
            shape = replace(shape, segment_s=SHORT_SEGMENT_S)
        if (self.repairs or rebalances) and random.Random(f"racks {seed}").random() < RACKED_SEEDS:
            shape = replace(shape, bookies=len(RACKS), racks=RACKS)
        self.world = World(seed, shape, self._unexpected)
        self.oracle = Oracle(self.world.loop.time, self._fail)
        self.world.watch_boundaries(self._fail)
        self.world.on_served = self.oracle.served
        self.workload = Workload(self.world, self.oracle, scene, seed)
        self.faults = Faults(self.world, seed)
        self.moves = random.Random(f"moving {seed}").random() < MOVED_SEEDS
        self.rebalancing = Rebalancing(self.world, [KEPT, TRIMMED], seed) if rebalances else None

    def run(self) -> str:
        """The invariant that was violated, or nothing."""
        entropy.take_over(self.seed, self.world.loop)
        try:
            self.world.loop.run(self._main())
        except Violation as violation:
            return str(violation)
        except Exception:
            return f"crash: {traceback.format_exc()}"
        return ""

    async def _main(self) -> None:
        world = self.world
        world.transcript.note("seed", self.seed, "faults", ", ".join(self.faults.kinds), self.workload.scene)
        await world.start()
        await self.workload.prepare()
        self.faults.start()
        kept = await self.workload.shards_of(KEPT)
        repair = Repair(world, kept, self.seed) if self.repairs else None
        moves = Moves(world, kept, self.seed) if self.moves else None
        if self.rebalancing is not None:
            self.rebalancing.start()
        working = asyncio.create_task(self.workload.run())
        await asyncio.wait({working}, timeout=FAULTS_S)
        await self.faults.stop()
        self.workload.stop()
        done, _ = await asyncio.wait({working}, timeout=HEALED_S)
        if not done:
            self._fail(f"delivery: calls of clients do not return within {HEALED_S} s after all faults ended")
        working.result()
        if moves is not None:
            await asyncio.wait({asyncio.create_task(moves.stop())}, timeout=HEALED_S)
            world.transcript.note("operator moved", moves.moved)
        if repair is not None:
            await asyncio.wait({asyncio.create_task(repair.stop())}, timeout=HEALED_S)
            world.transcript.note("repair moved", repair.moved)
        if self.rebalancing is not None:
            await self.rebalancing.stop()
        await verify(world, self.workload)

    def _fail(self, words: str) -> NoReturn:
        violation = Violation(words)
        self.world.transcript.note("VIOLATION", words)
        self.world.loop.fail(violation)
        raise violation

    def _unexpected(self, words: str) -> None:
        self.world.transcript.note("ERROR", words)
        self.world.loop.fail(Violation(f"internal error: {words}"))

    def log(self, _logger: Any, level: str, event: dict[str, Any]) -> NoReturn:
        """What the code under test logs; an error is one of its own making."""
        words = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("event", "exc_info"))
        self.world.transcript.note("LOG", level, event.get("event"), words)
        if level in ("error", "critical", "exception"):
            error = event.get("exc_info")
            if error is True:
                error = sys.exc_info()[1]
            trace = "".join(traceback.format_exception(error)) if isinstance(error, BaseException) else ""
            self._unexpected(f"{event.get('event')} {words} {trace}")
        raise structlog.DropEvent


def run_seed(seed: int, calls: int, plant: str, verbose: bool, digest: bool) -> Outcome:
    """In this process, which is used up by it. The `digest` of a run without a violation costs time."""
    processor_time = time.process_time
    simulation = Simulation(seed, calls)
    structlog.configure(
        processors=[simulation.log],
        wrapper_class=structlog.make_filtering_bound_logger(20 if verbose else 40),
        cache_logger_on_first_use=False,
    )
    if plant:
        planted.PLANTS[plant]()
    violation = simulation.run()
    world = simulation.world
    return Outcome(
        seed,
        violation,
        world.transcript.digest() if digest or violation else "",
        world.loop.time(),
        processor_time(),
        world.loop.turns,
        f"messages={len(simulation.oracle.sent)} failed_calls={simulation.oracle.failed_calls} "
        f"rested={world.counted('magnetar_broker_rested_shards_total')} "
        f"claimed_together={world.counted('magnetar_broker_claimed_together_total')}",
        world.transcript.tail(10**9 if verbose else 120) if violation or verbose else "",
    )


class Child:
    """One seed in a process of its own, forked so that each begins in the same state."""

    def __init__(self, seed: int, arguments: argparse.Namespace) -> None:
        self.seed = seed
        self._data = bytearray()
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            self._run(arguments, writer)
        os.close(writer)
        self.reader = reader

    def _run(self, arguments: argparse.Namespace, writer: int) -> NoReturn:
        gc.disable()
        signal.setitimer(signal.ITIMER_PROF, SEED_CPU_S_MAX)
        try:
            digest = bool(arguments.seed) or arguments.twice
            outcome = run_seed(self.seed, arguments.calls, arguments.plant, arguments.verbose, digest)
        except BaseException:
            outcome = Outcome(self.seed, f"crash: {traceback.format_exc()}")
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(json.dumps(outcome.__dict__).encode())
        os._exit(0)

    def read(self) -> Outcome | None:
        """What there is to read; the outcome when that is all."""
        data = os.read(self.reader, 1 << 20)
        self._data += data
        if data:
            return None
        os.close(self.reader)
        _, status = os.waitpid(self.pid, 0)
        if not self._data:
            ended = "spin: a callback does not end" if status == signal.SIGPROF else f"crash: status {status}"
            return Outcome(self.seed, ended)
        return Outcome(**json.loads(self._data))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def outcomes(seeds: Iterable[int], arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Of the seeds, in the order in which they end; as many at a time as there are jobs."""
    waiting = iter(seeds)
    children: dict[int, Child] = {}
    try:
        while True:
            while len(children) < arguments.jobs and (seed := next(waiting, None)) is not None:
                child = Child(seed, arguments)
                children[child.reader] = child
            if not children:
                return
            for reader in select.select(list(children), [], [])[0]:
                outcome = children[reader].read()
                if outcome is not None:
                    del children[reader]
                    yield outcome
    finally:
        for child in children.values():
            child.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description="runs seeds of the simulator")
    parser.add_argument("--seeds", type=int, default=int(os.environ.get("SEEDS") or 20))
    parser.add_argument("--first", type=int, default=int(os.environ.get("FIRST") or 0))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SEED") or 0))
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--plant", default=os.environ.get("PLANT") or "")
    parser.add_argument("--verbose", action="store_true", help="the whole transcript, with what is logged")
    parser.add_argument("--brief", action="store_true", help="no transcript")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="with --plant all: those whose name has this in it")
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--twice", action="store_true", help="run each seed twice, and compare the transcripts")
    arguments = parser.parse_args()
    gc.freeze()
    if arguments.seed:
        outcome = next(outcomes([arguments.seed], arguments))
        report(outcome, arguments)
        return 1 if outcome.violation else 0
    first = arguments.first or random.SystemRandom().getrandbits(SEED_BITS)
    if arguments.plant == ALL_PLANTS:
        return find_all(first, arguments)
    print(f"seeds {first} to {first + arguments.seeds - 1}", flush=True)
    return run_many(first, arguments)


def run_many(first: int, arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    failed: list[Outcome] = []
    done = 0
    cpu_s = virtual_s = 0.0
    transcripts: dict[int, str] = {}
    times = 2 if arguments.twice else 1
    for outcome in outcomes((seed for seed in range(first, first + arguments.seeds) for _ in range(times)), arguments):
        done += 1
        if transcripts.setdefault(outcome.seed, outcome.digest) != outcome.digest:
            outcome = replace(outcome, violation="determinism: one seed has two transcripts")
        if done % TOLD_EVERY == 0:
            print(f"{done} seeds, {len(failed)} failed", flush=True)
        cpu_s += outcome.cpu_s
        virtual_s += outcome.virtual_s
        if outcome.violation:
            failed.append(outcome)
            if not arguments.keep_going:
                report(outcome, arguments)
                break
            print(f"{outcome.seed}: {outcome.violation.strip().splitlines()[0][:300]}", flush=True)
    elapsed_s = time.monotonic() - started
    print(
        f"{done} seeds, {len(failed)} failed, {elapsed_s:.1f} s: {done / elapsed_s:.2f} seeds/s, "
        f"{done / cpu_s:.2f} a second of processor time; {virtual_s / done:.0f} virtual s a seed"
    )
    return 1 if failed else 0


def find_all(first: int, arguments: argparse.Namespace) -> int:
    """Plants one bug after the other, and says how many seeds it took to find each. A crash finds nothing."""
    missed = 0
    for number, plant in enumerate(name for name in planted.PLANTS if arguments.only in name):
        arguments.plant = plant
        # Seeds that no other bug has seen.
        seeds = range(first + number * arguments.seeds, first + (number + 1) * arguments.seeds)
        tried = 0
        for tried, outcome in enumerate(outcomes(seeds, arguments), start=1):
            if outcome.violation.startswith("crash:"):
                report(outcome, arguments)
                return 1
            if outcome.violation:
                print(f"{plant}: {tried} seeds, {outcome.seed}: {outcome.violation.splitlines()[0][:160]}", flush=True)
                break
        else:
            missed += 1
            print(f"{plant}: not found in {tried} seeds", flush=True)
    return 1 if missed else 0


def report(outcome: Outcome, arguments: argparse.Namespace) -> None:
    if outcome.tail and not arguments.brief:
        print(outcome.tail)
    print(
        f"seed {outcome.seed}: {outcome.violation or 'no violation'}\ntranscript {outcome.digest}, "
        f"{outcome.virtual_s:.1f} virtual s, {outcome.cpu_s:.2f} s of processor time, {outcome.turns} callbacks, "
        f"{outcome.facts}"
    )
    if outcome.violation:
        plant = f" PLANT={arguments.plant!r}" if arguments.plant else ""
        print(f"again: make sim SEED={outcome.seed}{plant}")


if __name__ == "__main__":
    sys.exit(main())
