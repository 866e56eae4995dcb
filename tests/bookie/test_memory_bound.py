"""A bookie holds no more memory than it was given, however fast it is fed."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

MIB = 1 << 20

PROGRAM = """
import asyncio, os, resource, sys
from pathlib import Path
from prometheus_client import CollectorRegistry
from magnetar.bookie.group_commit import GroupCommit
from magnetar.bookie.handlers import BookieHandlers
from magnetar.bookie.judge import Conditions, ReadConditions
from magnetar.bookie.metrics import BookieMetrics
from magnetar.bookie.reads import Reads
from magnetar.bookie.rocksdb import RocksEntryStore
from magnetar.ledger.bookie_rpc import AddGroup, AddStatus
from magnetar.wire.envelope import encode

MEMORY = int(sys.argv[2])
PAYLOAD = os.urandom(65536)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

async def feed(handlers, ledger_id, count):
    for entry_id in range(count):
        entry = encode(ledger_id, entry_id, entry_id - 1, 65536 * (entry_id + 1), PAYLOAD)
        group = AddGroup(ledger_id, 1, b"token", (entry,))
        while (result := await handlers.add(group)).status is AddStatus.BUSY:
            await asyncio.sleep(0.001)
        assert result.status is AddStatus.OK, result

async def main():
    store = await RocksEntryStore.open(Path(sys.argv[1]), MEMORY)
    metrics = BookieMetrics(CollectorRegistry(), "b")
    commits = GroupCommit(store, Conditions, metrics, queue_bytes=MEMORY // 4)
    reads = Reads(store, commits, lambda ledger_id: ReadConditions(), metrics)
    handlers = BookieHandlers(store, commits, reads, lambda ledger_id: False)
    commits.start()
    await feed(handlers, 1000, 1)
    before = peak()
    await asyncio.gather(*(feed(handlers, i, 20) for i in range(1, 101)))
    print(peak() - before)
    await commits.close()
    await store.close()

asyncio.run(main())
"""


async def test_memory_stays_near_what_was_given_while_eight_times_as_much_is_added(tmp_path: Path) -> None:
    memory_bytes = 16 * MIB
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        str(tmp_path / "store"),
        str(memory_bytes),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    # The entries that wait with their callers, a hundred of 64 KiB, are not the bookie's.
    assert int(output) < memory_bytes * 2 + 100 * 65536, output
