"""Futures that complete late rather than never, and are not kept longer than somebody wants them."""

from __future__ import annotations

import asyncio
import gc
import weakref

from magnetar.ledger.deadlines import Deadlines


async def test_a_future_without_an_answer_gets_its_late_one_and_others_keep_theirs() -> None:
    deadlines = Deadlines(0.02)
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[str] = deadlines.watch(loop.create_future(), lambda: "late")
    silent: asyncio.Future[str] = deadlines.watch(loop.create_future(), lambda: "late")
    answered.set_result("in time")
    assert await silent == "late"
    assert answered.result() == "in time"
    again: asyncio.Future[str] = deadlines.watch(loop.create_future(), lambda: "late again")
    assert await again == "late again"


async def test_closing_completes_everything_at_once() -> None:
    deadlines = Deadlines(3600)
    futures = [deadlines.watch(asyncio.get_running_loop().create_future(), lambda: "late") for _ in range(3)]
    deadlines.close()
    assert all(future.done() for future in futures)


async def test_a_completed_result_is_not_kept_until_its_deadline() -> None:
    class Large:
        pass

    deadlines = Deadlines(3600)
    loop = asyncio.get_running_loop()
    stuck: asyncio.Future[Large] = deadlines.watch(loop.create_future(), Large)
    future: asyncio.Future[Large] = deadlines.watch(loop.create_future(), Large)
    result = Large()
    seen = weakref.ref(result)
    future.set_result(result)
    del future, result
    gc.collect()
    assert seen() is None
    assert not stuck.done()
    deadlines.close()
