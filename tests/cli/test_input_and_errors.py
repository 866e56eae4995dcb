"""What a command does with its input, and with a server that is not there; nothing here needs one."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer

from magnetar.cli import command
from magnetar.cli.command import CommandFailed, fail_for, find_server, parse_address
from magnetar.cli.output import Size, emit_facts, emit_table, human_bytes, human_seconds

DRY = ("produce", "t", "--dry-run", "--output", "json")


def counted(text: str) -> int:
    described = json.loads(text)
    assert described == {"topic": "t", "messages": described["messages"], "dry_run": True}
    return int(described["messages"])


def test_produce_reads_standard_input_of_every_kind(magnetar: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_bytes(b"a\nb\nc")
    assert counted(magnetar.run(*DRY, input=b"a\nb\n").out) == 2
    assert counted(magnetar.call(*DRY, file).out) == 3
    assert counted(magnetar.call(*DRY, input=b"a\nb\n").out) == 2
    with file.open("rb") as opened:
        assert counted(magnetar.run(*DRY, stdin=opened).out) == 3
    assert counted(magnetar.run(*DRY, stdin=subprocess.DEVNULL).out) == 0
    assert counted(magnetar.call(*DRY, "--count", "2", input=b"a\nb\nc\n").out) == 2


def test_produce_ends_at_its_count_while_the_pipe_stays_open(magnetar: Any) -> None:
    started = magnetar.start(*DRY, "--count", "2")
    started.process.stdin.write(b"a\nb\n")
    started.process.stdin.flush()
    assert counted(started.process.stdout.readline()) == 2
    assert started.end(None).code == 0


def test_ctrl_c_ends_produce_while_it_waits_for_input(magnetar: Any) -> None:
    read, write = os.pipe()
    screen, terminal = pty.openpty()
    waiting = magnetar.start("produce", "t", "-", "--dry-run", "--progress", stdin=read, stderr=terminal)
    os.close(read)
    os.close(terminal)
    # The bar shows that it reads; nothing more comes.
    os.write(write, b"a\n" * 10)
    shown = b""
    while b"10 messages" not in shown:
        shown += os.read(screen, 1 << 16)
    assert waiting.end().code == 130
    with suppress(OSError):  # the terminal's other end is closed
        while more := os.read(screen, 1 << 16):
            shown += more
    assert b"Traceback" not in shown
    os.close(write)
    os.close(screen)


@pytest.mark.parametrize(
    ("arguments", "input", "code", "words"),
    [
        (("/does/not/exist",), b"", 1, "cannot read /does/not/exist: no such file or directory"),
        (("/",), b"", 1, "is a directory"),
        (("--format", "csv", "--key-column", "c"), b"a,b\n", 2, "there is no column 'c'; the header has a, b"),
        (("--format", "csv", "--key-column", "b"), b"a,b\n1\n", 1, "line 2: 1 columns and none for the key 'b'"),
        (("--format", "jsonl"), b"{}\nx\n", 1, "line 2 is not JSON"),
    ],
)
def test_input_that_cannot_be_read_is_one_line(
    magnetar: Any, arguments: tuple[str, ...], input: bytes, code: int, words: str
) -> None:
    assert magnetar.call("produce", "t", "--dry-run", *arguments, input=input).is_refused(code, words)


def test_nothing_listens_there(magnetar: Any, refusing_address: str) -> None:
    refused = magnetar.run("topics", "list", "--server", refusing_address)
    assert refused.is_refused(1, f"nothing listens at {refusing_address}", "magnetar standalone", "--server")


async def test_a_server_that_comes_up_while_it_is_looked_for_is_found() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        search = asyncio.create_task(find_server(f"127.0.0.1:{listener.getsockname()[1]}", 30.0))
        await asyncio.sleep(0)
        listener.listen()
        await search


async def test_one_address_of_several_is_enough(refusing_address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await find_server(f"{refusing_address}, 127.0.0.1:{listener.getsockname()[1]}", 30.0)


async def test_a_host_that_does_not_exist_is_no_reason_to_wait() -> None:
    with pytest.raises(CommandFailed, match="cannot reach no-such-host"):
        await find_server("no-such-host.invalid:1", 30.0)


async def test_a_silent_address_is_given_up_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(host: str, port: int) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(command.asyncio, "open_connection", silent)
    with pytest.raises(CommandFailed, match=r"no answer from 10.0.0.1:1 within 0.05 s") as failed:
        await find_server("10.0.0.1:1", 0.05)
    assert failed.value.exit_code == 124


@pytest.mark.parametrize(
    ("text", "address"),
    [("localhost:7650", ("localhost", 7650)), (" h:1 ", ("h", 1)), ("[::1]:65535", ("::1", 65535))],
)
def test_addresses_are_host_and_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "h", ":1", "h:", "h:0", "h:65536", "h:-1", "h:x", "h:²"])
def test_what_is_no_address_is_a_usage_error(text: str) -> None:
    with pytest.raises(CommandFailed, match="--server takes host:port") as failed:
        parse_address(text)
    assert failed.value.exit_code == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CommandFailed("no\nsuch\n thing", 7), 7, "magnetar: no such thing\n"),
        (TimeoutError(), 124, "magnetar: timed out; give it longer with --timeout\n"),
        (ExceptionGroup("several", [ExceptionGroup("", [CommandFailed("the first")])]), 1, "magnetar: the first\n"),
        (PermissionError(13, "Permission denied", "f"), 1, "magnetar: permission denied: f\n"),
        (KeyError("x"), 1, "magnetar: this is a defect of the command, please report it: KeyError: 'x'; "
         "MAGNETAR_LOG=debug shows where\n"),
    ],
)  # fmt: skip
def test_every_error_is_one_line(
    error: Exception, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAGNETAR_LOG", raising=False)
    with pytest.raises(typer.Exit) as end:
        fail_for(error)
    assert end.value.exit_code == code
    assert capsys.readouterr().err == line


def test_tables_align_numbers_and_spell_out_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    emit_table(["name", "count", "size"], [("[red]a", 1200, Size(1536)), (None, 7, Size(0))])
    assert capsys.readouterr().out == "name    count     size\n[red]a  1,200  1.5 KiB\n-           7      0 B\n"
    emit_facts([("a", None), ("longer", True)])
    assert capsys.readouterr().out == "a       -\nlonger  yes\n"


def test_sizes_and_times_have_units() -> None:
    assert [human_bytes(size) for size in (0, 1023, 1024, 1 << 20, (1 << 20) - 1, 5 << 50)] == [
        "0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.0 MiB", "5.0 PiB",
    ]  # fmt: skip
    assert [human_seconds(s) for s in (0.04, 59.9, 61, 7265, 90000)] == [
        "0.0 s", "59.9 s", "1 min 1 s", "2 h 1 min", "1 d 1 h",
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [("topics", "list"), ("--version",), ("produce", "t", "--dry-run")])
def test_a_closed_standard_output_is_named(magnetar: Any, arguments: tuple[str, ...]) -> None:
    ran = magnetar.run(*arguments, closed=1)
    assert ran.is_refused(1, "standard output is closed", "/dev/null")


def test_a_closed_standard_input_is_an_empty_one_and_a_closed_standard_error_is_silence(magnetar: Any) -> None:
    ran = magnetar.run(*DRY, stdin=None, closed=0)
    assert (ran.code, counted(ran.out)) == (0, 0)
    ran = magnetar.run("topics", "list", "--frobnicate", closed=2)
    assert (ran.code, ran.out, ran.err) == (2, "", "")
