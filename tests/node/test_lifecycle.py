"""Parts are stopped in the reverse order, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from magnetar.node.lifecycle import Stack


def noting(stopped: list[str], name: str) -> Callable[[], Awaitable[None]]:
    async def stop() -> None:
        stopped.append(name)

    return stop


async def test_parts_stop_in_the_reverse_order_whatever_one_of_them_raises() -> None:
    async def fail() -> None:
        raise OSError("no")

    stack, stopped = Stack(), list[str]()
    stack.push("first", noting(stopped, "first"))
    stack.push("failing", fail)
    stack.push("last", noting(stopped, "last"))
    assert await stack.close_in_time()
    assert stopped == ["last", "first"]


async def test_a_part_that_does_not_stop_is_given_up_also_if_it_minds_no_cancellation() -> None:
    going_on = asyncio.Event()

    async def stubborn() -> None:
        while not going_on.is_set():
            try:
                await going_on.wait()
            except asyncio.CancelledError:
                continue

    stack, stopped = Stack(), list[str]()
    stack.push("never reached", noting(stopped, "never reached"))
    stack.push("stubborn", stubborn)
    assert not await stack.close_in_time(limit_s=0.05)
    assert stopped == []
    going_on.set()
