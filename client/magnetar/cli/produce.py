"""`magnetar produce`: lines, CSV rows or JSON objects from a file or stdin to a topic."""

from __future__ import annotations

import asyncio
import enum
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from magnetar.cli.command import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_S,
    EXIT_USAGE,
    CommandFailed,
    Output,
    OutputOption,
    ServerOption,
    TimeoutOption,
    TopicArgument,
    run,
    run_with_client,
)
from magnetar.cli.output import emit_json, note
from magnetar.cli.rows import Format, Group, MalformedInput, NoSuchColumn, Rows

if TYPE_CHECKING:
    from magnetar.client import Client, Producer

STDIN = 0
READ_BYTES = 1 << 20
GROUPS_IN_FLIGHT_MAX = 4
"""What was read goes out while the groups before it are being stored."""


class Compression(enum.StrEnum):
    none = "none"
    lz4 = "lz4"
    zstd = "zstd"


def produce(
    topic: TopicArgument,
    file: Annotated[str, typer.Argument(help="A file, or - for standard input.")] = "-",
    key_column: Annotated[str | None, typer.Option(help="Column (csv) or field (jsonl) that is the key.")] = None,
    format: Annotated[Format, typer.Option(help="csv: the row's text is sent, the header is not.")] = Format.lines,
    count: Annotated[int | None, typer.Option(min=1, help="Send so many messages and end.")] = None,
    compression: Annotated[Compression, typer.Option(help="Of what is sent and stored.")] = Compression.none,
    progress: Annotated[bool, typer.Option("--progress", help="Show a progress bar.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check the input, send nothing.")] = False,
    output: OutputOption = Output.table,
    server: ServerOption = DEFAULT_SERVER,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
) -> None:
    """Sends each line, row or object as one message; ends when all of them are stored."""
    if key_column is not None and format is Format.lines:
        raise CommandFailed("--key-column needs --format csv or jsonl", EXIT_USAGE)
    stored = 0

    def on_stored(messages: int) -> None:
        nonlocal stored
        stored += messages

    async def send(client: Client) -> None:
        producer = client.producer(topic, compression=compression.value)
        with _opened(file) as descriptor:
            groups = _groups(descriptor, format, key_column, count, progress)
            # Read before the producer is opened: input that cannot be read creates no topic.
            first = await anext(groups, None)
            if first is not None:
                async with producer:
                    await _send(producer, first, groups, on_stored)

    async def check() -> None:
        with _opened(file) as descriptor:
            async for payloads, _ in _groups(descriptor, format, key_column, count, progress):
                on_stored(len(payloads))

    try:
        if dry_run:
            run(check())
        else:
            run_with_client(server, timeout, send)
    except (typer.Exit, CommandFailed):
        if stored and not dry_run:
            known = "1 message is" if stored == 1 else f"{stored:,} messages are"
            note(f"magnetar: stopped early: {known} stored, what came after may or may not be")
        raise
    if output is Output.json:
        emit_json({"topic": topic, "messages": stored, "dry_run": dry_run})
    else:
        note(f"{stored:,} messages " + (f"would be sent to {topic}" if dry_run else f"stored in {topic}"))


async def _send(
    producer: Producer, first: Group, groups: AsyncIterator[Group], on_stored: Callable[[int], None]
) -> None:
    """Several groups at a time, in order. Raises, in an ExceptionGroup, what the first failed one raised.

    Input that cannot be read ends it with CommandFailed, after what was read before is stored.
    """
    unreadable: CommandFailed | None = None
    room = asyncio.Semaphore(GROUPS_IN_FLIGHT_MAX)

    async def send_group(payloads: list[bytes], keys: list[bytes | None] | None) -> None:
        await producer.send_many(payloads, keys=keys)
        on_stored(len(payloads))
        room.release()

    async def start(group: Group) -> None:
        await room.acquire()
        sending.create_task(send_group(*group))
        # It runs, and so takes its place, before the next one is read.
        await asyncio.sleep(0)

    async with asyncio.TaskGroup() as sending:
        await start(first)
        try:
            async for group in groups:
                await start(group)
        except CommandFailed as failure:
            unreadable = failure
    if unreadable is not None:
        raise unreadable


def _opened(file: str) -> AbstractContextManager[int]:
    """The descriptor to read from, closed afterwards unless it is stdin. Raises CommandFailed."""
    if file == "-":
        return nullcontext(STDIN)
    try:
        return _Descriptor(os.open(file, os.O_RDONLY))
    except OSError as error:
        raise CommandFailed(f"cannot read {file}: {(error.strerror or '').lower()}") from None


class _Descriptor(AbstractContextManager[int]):
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


async def _groups(
    descriptor: int, format: Format, key_column: str | None, count: int | None, progress: bool
) -> AsyncIterator[Group]:
    """What was read, as rows; at most `count` of them. Raises CommandFailed."""
    rows = Rows(format, key_column)
    left = count
    with _Bar(descriptor) if progress else nullcontext() as bar:
        while left != 0:
            data = await _read(descriptor)
            try:
                payloads, keys = rows.feed(data)
            except NoSuchColumn as error:
                raise CommandFailed(str(error), EXIT_USAGE) from None
            except MalformedInput as error:
                raise CommandFailed(str(error)) from None
            if left is not None:
                payloads, keys = payloads[:left], None if keys is None else keys[:left]
                left -= len(payloads)
            if bar is not None:
                bar.advance(len(data), len(payloads))
            if payloads:
                yield payloads, keys
            if not data:
                return


class _Bar(AbstractContextManager["_Bar"]):
    """A progress bar on stderr."""

    def __init__(self, descriptor: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )

        status = os.fstat(descriptor)
        self._messages = 0
        self._bar = Progress(
            TextColumn("{task.fields[messages]:,} messages"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeElapsedColumn(), console=Console(stderr=True),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=status.st_size if stat.S_ISREG(status.st_mode) else None, messages=0)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, size_bytes: int, messages: int) -> None:
        self._messages += messages
        self._bar.update(self._task, advance=size_bytes, messages=self._messages)


async def _read(descriptor: int) -> bytes:
    """What is there, as soon as something is there; b"" at the end. Raises CommandFailed.

    A thread that waits for a terminal or a pipe could not be interrupted, so the event loop waits for those.
    """
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    try:
        loop.add_reader(descriptor, readable.set)
    except OSError:
        # A file, which never waits for anybody, or nothing that can be read at all.
        return await asyncio.to_thread(_read_now, descriptor)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)
    return _read_now(descriptor)


def _read_now(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, READ_BYTES)
    except OSError as error:
        raise CommandFailed(f"cannot read the input: {(error.strerror or '').lower()}") from None
