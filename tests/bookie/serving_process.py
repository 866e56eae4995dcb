"""A process with one bookie that serves gRPC until it is killed. Arguments: directory, port. Run by tests."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from magnetar.bookie.bookie import Bookie
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.sqlite import SqliteStore
from magnetar.node.settings import BookieSettings
from magnetar.node.telemetry import configure_logging


async def main(directory: Path, port: int) -> None:
    settings = BookieSettings(
        id="bookie0", data_dir=directory / "bookie", memory_bytes=16 << 20, listen=f"127.0.0.1:{port}"
    )
    async with await SqliteStore.open(directory / "metadata.sqlite", drop_leases=True) as metadata:
        bookie = await Bookie.start(settings, metadata, Keyspace("test"))
        os.write(1, bookie.address.encode() + b"\n")
        await asyncio.Event().wait()


if __name__ == "__main__":
    configure_logging("warning")
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
