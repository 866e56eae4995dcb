"""A process with one bookie that adds entries to it and tells each answer on stdout, until it is killed or done.

Arguments: directory, ledgers (each a chain of adds one after the other), adds a ledger. Run by tests.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from magnetar.bookie.bookie import Bookie
from magnetar.bookie.local import LocalBookie
from magnetar.ledger.bookie_rpc import AddGroup, AddResult, AddStatus, LacQuery
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.sqlite import SqliteStore
from magnetar.node.settings import BookieSettings
from magnetar.node.telemetry import configure_logging
from magnetar.wire.envelope import encode


def tell(line: str) -> None:
    os.write(1, line.encode() + b"\n")


async def add_to_ledger(bookie: LocalBookie, ledger_id: int, count: int) -> None:
    token = b"token-%010d" % ledger_id
    size_bytes = (100, 300, 3000)[ledger_id % 3]
    for number in range(count):
        # Twice, since the log cuts its records into blocks, and one of the two may be cut in half.
        marker = b"marker-%d-%d-" % (ledger_id, number)
        payload = marker + b"x" * (size_bytes - 2 * len(marker)) + marker
        entry = encode(ledger_id, number, number - 1, (number + 1) * size_bytes, payload)
        future = bookie.add(AddGroup(ledger_id, 1, token, (entry,)))
        future.add_done_callback(lambda done, number=number: told(done.result(), ledger_id, number))  # type: ignore[misc]
        await future
    fenced = await bookie.read_lac(LacQuery(ledger_id, 2, token, fence=True))
    assert fenced.last_entry == count - 1
    tell(f"fenced {ledger_id}")


def told(result: AddResult, ledger_id: int, number: int) -> None:
    assert result.status is AddStatus.OK, result
    tell(f"acked {ledger_id} {number}")


async def main(directory: Path, ledgers: int, adds: int) -> None:
    settings = BookieSettings(id="bookie0", data_dir=directory / "bookie", memory_bytes=16 << 20)
    async with await SqliteStore.open(directory / "metadata.sqlite", drop_leases=True) as metadata:
        bookie = await Bookie.start(settings, metadata, Keyspace("test"), serve=False)
        local = bookie.local()
        # Chains of different lengths: some ledgers are fenced long before the others end.
        await asyncio.gather(*(add_to_ledger(local, i, adds * i // ledgers) for i in range(1, ledgers + 1)))
        await bookie.stop()
    tell("done")


if __name__ == "__main__":
    configure_logging("warning")
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
