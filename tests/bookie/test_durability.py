"""Answered means fsynced: shown by killing a process that adds, and by its system calls."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from magnetar.bookie.bookie import Bookie
from magnetar.ledger.bookie_rpc import AddGroup, AddStatus, EntryOutcome, LacQuery, ReadGroup
from magnetar.metadata.keyspace import Keyspace
from magnetar.metadata.sqlite import SqliteStore
from magnetar.node.settings import BookieSettings
from magnetar.wire.envelope import encode, payload

PROGRAM = str(Path(__file__).with_name("adding_process.py"))
PROCESS = (sys.executable, PROGRAM)
READ_IN_ONE = 100


async def killed_after(directory: Path, lines: int) -> list[str]:
    """Runs the adding process until it told so many lines, kills it, and returns all that it told."""
    process = await asyncio.create_subprocess_exec(
        *PROCESS, str(directory), "30", "100000", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    told: list[str] = []
    while len(told) < lines:
        line = await process.stdout.readline()
        assert line.endswith(b"\n"), "the process ended by itself"
        told.append(line.decode().strip())
    process.send_signal(signal.SIGKILL)
    rest = await process.stdout.read()
    told += [line.decode() for line in rest.split(b"\n")[:-1]]
    await process.wait()
    return told


@pytest.mark.parametrize("lines", [1, 400, 3000])
async def test_every_answered_add_is_there_after_a_kill(tmp_path: Path, lines: int) -> None:
    told = await killed_after(tmp_path, lines)
    acked: dict[int, int] = {}
    for line in told:
        word, ledger_id, *rest = line.split()
        if word == "acked":
            acked[int(ledger_id)] = int(rest[0])
    assert acked
    async with await SqliteStore.open(tmp_path / "metadata.sqlite", drop_leases=True) as metadata:
        settings = BookieSettings(id="bookie0", data_dir=tmp_path / "bookie", memory_bytes=16 << 20)
        bookie = await Bookie.start(settings, metadata, Keyspace("test"), serve=False)
        assert bookie.identity.limbo_floor == 0
        for ledger_id, last in acked.items():
            await check_ledger(bookie, ledger_id, last)
        await bookie.stop()


async def check_ledger(bookie: Bookie, ledger_id: int, last: int) -> None:
    token = b"token-%010d" % ledger_id
    for first in range(0, last + 1, READ_IN_ONE):
        end = min(last, first + READ_IN_ONE - 1)
        result = await bookie.local().read(ReadGroup(ledger_id, 1, token, first, end))
        assert len(result.answers) == end - first + 1
        for number, answer in enumerate(result.answers, first):
            assert answer.outcome is EntryOutcome.HAVE, (ledger_id, number, result.message)
            assert answer.entry is not None
            assert bytes(payload(answer.entry)).startswith(b"marker-%d-%d-" % (ledger_id, number))
    lac = await bookie.local().read_lac(LacQuery(ledger_id, 1, token))
    assert lac.last_entry >= last


async def test_every_answered_fence_is_there_after_a_kill(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(*PROCESS, str(tmp_path), "4", "400", stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    fenced: set[int] = set()
    while not fenced:
        line = (await process.stdout.readline()).decode()
        assert line, "the process ended by itself"
        if line.startswith("fenced"):
            fenced.add(int(line.split()[1]))
    process.send_signal(signal.SIGKILL)
    rest = (await process.stdout.read()).decode()
    await process.wait()
    fenced |= {int(line.split()[1]) for line in rest.split("\n")[:-1] if line.startswith("fenced")}
    async with await SqliteStore.open(tmp_path / "metadata.sqlite", drop_leases=True) as metadata:
        settings = BookieSettings(id="bookie0", data_dir=tmp_path / "bookie", memory_bytes=16 << 20)
        bookie = await Bookie.start(settings, metadata, Keyspace("test"), serve=False)
        for ledger_id in fenced:
            token = b"token-%010d" % ledger_id
            entry = encode(ledger_id, 100_000, 5, 1, b"late")
            answer = await bookie.local().add(AddGroup(ledger_id, 1, token, (entry,)))
            assert answer.status is AddStatus.FENCED
        await bookie.stop()


CALL = re.compile(r"^(\d+) +(.*)$")
MARKER = re.compile(r"marker-(\d+)-(\d+)-")
ACKED = re.compile(r'write\(1<[^>]*>, "acked (\d+) (\d+)')
LOG = re.compile(r"\d+<([^>]*\.log)>")


def answered_before_synced(trace: str) -> tuple[int, list[str]]:
    """How many answers the trace shows, and those that no sync of their log stood before.

    An entry is in a log when the write that carries it has returned, and synced when a sync of that log, begun after
    that, has returned.
    """
    unfinished: dict[str, str] = {}
    written: dict[str, set[str]] = {}
    syncing: dict[str, set[str]] = {}
    synced: set[str] = set()
    answers = 0
    early: list[str] = []
    for line in trace.splitlines():
        match = CALL.match(line)
        if match is None:
            continue
        thread, call = match.groups()
        if call.endswith("<unfinished ...>"):
            call = call.removesuffix("<unfinished ...>")
            unfinished[thread] = call
            returned = False
        else:
            resumed = call.startswith("<... ")
            call = unfinished.pop(thread) if resumed else call
            returned = True
            if resumed and call.startswith(("fdatasync", "fsync")):
                synced |= syncing.pop(thread)
                continue
        log = LOG.search(call)
        if call.startswith(("fdatasync", "fsync")) and log:
            covered = set(written.get(log[1], ()))
            if returned:
                synced |= covered
            else:
                syncing[thread] = covered
        elif call.startswith(("fdatasync", "fsync")):
            syncing[thread] = set()
        elif log and returned:
            written.setdefault(log[1], set()).update("-".join(found) for found in MARKER.findall(call))
        if (acked := ACKED.search(call)) and returned:
            answers += 1
            entry = "-".join(acked.groups())
            early += [] if entry in synced else [entry]
    return answers, early


def test_the_trace_reader_sees_an_answer_before_its_sync() -> None:
    write = '5 write(9</d/1.log>, "..marker-7-0-..", 30) = 30'
    begin, end = "5 fdatasync(9</d/1.log> <unfinished ...>", "5 <... fdatasync resumed>) = 0"
    answer = '4 write(1</out>, "acked 7 0\\n", 10) = 10'
    other = "5 fdatasync(8</d/2.log>) = 0"
    assert answered_before_synced("\n".join([write, begin, end, answer])) == (1, [])
    for wrong in ([write, answer], [write, begin, answer, end], [begin, write, end, answer], [write, other, answer]):
        assert answered_before_synced("\n".join(wrong)) == (1, ["7-0"]), wrong


def test_no_add_is_answered_before_the_log_that_holds_it_is_synced(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is needed: apt-get install strace")  # a failure in CI, see tests/conftest.py
    trace = tmp_path / "trace"
    calls = "trace=fdatasync,fsync,write,pwrite64,writev,pwritev"
    ran = subprocess.run(
        [strace, "-f", "-y", "-s1048576", "-e", calls, "-o", str(trace), *PROCESS, str(tmp_path), "6", "60"],
        stdout=subprocess.PIPE,
        timeout=50,
        check=True,
    )
    told = ran.stdout.decode().split("\n")
    answers, early = answered_before_synced(trace.read_text(errors="replace"))
    assert answers == sum(line.startswith("acked") for line in told) == 210
    assert early == []
