"""The loop that everything else in the simulator stands on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from simulation.loop import Process, SimulatedLoop, Stuck

HOUR_S = 3600.0


def new_loop(seed: int = 1) -> SimulatedLoop:
    return SimulatedLoop(str(seed), on_error=lambda context: None)


def spawn(loop: SimulatedLoop, process: Process, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return loop.create_task(work, context=process.context.copy())


def interleaving(seed: int) -> list[str]:
    """The order in which three processes with two tasks each get to run."""
    loop = new_loop(seed)
    seen: list[str] = []

    async def count(name: str) -> None:
        for number in range(20):
            seen.append(f"{name}{number}")
            await asyncio.sleep(0)

    async def main() -> None:
        processes = [Process(name) for name in "abc"]
        await asyncio.gather(*(spawn(loop, p, count(f"{p.name}{task}")) for p in processes for task in "xy"))

    loop.run(main())
    return seen


def test_an_hour_passes_at_once() -> None:
    loop = new_loop()

    async def main() -> float:
        await asyncio.sleep(HOUR_S)
        return asyncio.get_running_loop().time()

    assert HOUR_S <= loop.run(main()) < HOUR_S + 1


def test_the_seed_decides_the_order_of_processes_and_nothing_else_does() -> None:
    assert interleaving(1) == interleaving(1)
    assert interleaving(1) != interleaving(2)


def test_within_a_process_callbacks_keep_their_order() -> None:
    for seed in range(5):
        seen = interleaving(seed)
        for process in "abc":
            mine = [name[1:] for name in seen if name[0] == process]
            assert mine == [f"{task}{number}" for number in range(20) for task in "xy"]


def test_a_killed_process_does_nothing_more_not_even_clean_up() -> None:
    loop = new_loop()
    seen: list[str] = []

    async def work() -> None:
        try:
            seen.append("began")
            await asyncio.sleep(1)
        finally:
            seen.append("cleaned up")

    async def main() -> list[asyncio.Task[Any]]:
        process = Process("victim")
        spawn(loop, process, work())
        await asyncio.sleep(0.5)
        killed = loop.kill(process)
        await asyncio.sleep(10)
        return killed

    killed = loop.run(main())
    assert seen == ["began"]
    assert len(killed) == 1


def test_a_task_that_had_not_begun_when_its_process_was_killed_is_among_what_is_left() -> None:
    loop = new_loop()

    async def main() -> list[asyncio.Task[Any]]:
        process = Process("victim")
        spawn(loop, process, work)
        return loop.kill(process)

    work = asyncio.sleep(1)
    (left,) = loop.run(main())
    assert left.get_coro() is work
    work.close()


def test_a_killed_process_hears_of_no_future() -> None:
    loop = new_loop()
    heard: list[object] = []

    async def main() -> None:
        process = Process("victim")
        future: asyncio.Future[int] = loop.create_future()
        process.context.run(lambda: future.add_done_callback(heard.append))
        loop.kill(process)
        future.set_result(1)
        await asyncio.sleep(1)

    loop.run(main())
    assert heard == []


def test_a_paused_process_goes_on_later_with_what_became_due() -> None:
    loop = new_loop()
    seen: list[float] = []

    async def work() -> None:
        await asyncio.sleep(1)
        seen.append(loop.time())

    async def main() -> None:
        process = Process("sleeper")
        task = spawn(loop, process, work())
        await asyncio.sleep(0.5)
        loop.pause(process)
        await asyncio.sleep(10)
        assert seen == []
        loop.resume(process)
        await task

    loop.run(main())
    assert 10.5 <= seen[0] < 11


def test_timeouts_and_cancellation_are_those_of_asyncio() -> None:
    loop = new_loop()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await asyncio.sleep(5)
        assert 2 <= loop.time() < 3
        task = asyncio.create_task(asyncio.sleep(HOUR_S))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert loop.time() < 3

    loop.run(main())


def test_what_is_given_to_a_thread_runs_in_the_loop() -> None:
    async def main() -> int:
        return await asyncio.to_thread(lambda: 7)

    assert new_loop().run(main()) == 7


def test_waiting_for_what_can_never_happen_is_an_error() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck):
        new_loop().run(main())


def test_spinning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulation.loop.TURNS_PER_RUN_MAX", 1000)

    async def main() -> None:
        while True:  # noqa: ASYNC110  # that is what is tested
            await asyncio.sleep(0)

    with pytest.raises(Stuck):
        new_loop().run(main())


def test_sets_of_tasks_are_in_the_same_order_in_each_run() -> None:
    def order() -> list[str]:
        async def main() -> list[str]:
            tasks = {asyncio.create_task(asyncio.sleep(0), name=str(number)) for number in range(50)}
            done, _ = await asyncio.wait(tasks)
            return [task.get_name() for task in done]

        return new_loop().run(main())

    ballast: list[Callable[[], None]] = [lambda: None for _ in range(1000)]
    first = order()
    del ballast
    assert first == order()
