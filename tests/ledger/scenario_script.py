"""Runs scenarios written as text: commands after `> `, and under each what was heard while it ran.

bookies NAME...                  the bookies there are, all registered
ledger E/QW/QA MEMBER...         the ledger's record; `-` is a vacant place
writer W [fragments N]           opens the ledger for writing
add W PAYLOAD...
handle|deliver|lose ACTOR BOOKIE...  calls are handled; handled and answered; broken off, handled or not
run ACTOR [without BOOKIE...]    delivers until nothing more happens
apply|tell|commit W              the store decides an ensemble change; W hears of it; both
claim [same epoch]               the record becomes IN_RECOVERY
recover R                        begins to recover the ledger as the record is now
close ACTOR                      compare-and-sets the closing record
read C FIRST LAST
register BOOKIE [STATE] | unregister BOOKIE
bookie BOOKIE limbo|whole|read-only|wiped|deleted|collecting|collected|unfenced | floor N | damage ENTRY
time SECONDS
show ACTOR|ledger|bookies|lacs
check                            asserts what must hold for a closed ledger
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ledger_world import LEDGER, RecovererActor, World, WriterActor, ledger_record

from magnetar.bookie.entry_store import Damaged
from magnetar.ledger.writer import WriterLimits
from magnetar.metadata.records import VACANT, BookieState
from magnetar.wire.envelope import peek


class Script:
    def __init__(self) -> None:
        self._names: list[str] = []
        self._world: World | None = None

    @property
    def world(self) -> World:
        assert self._world is not None, "no ledger yet"
        return self._world

    def run(self, text: str) -> str:
        """The text with what was really heard under each command."""
        out: list[str] = []
        for line in text.splitlines():
            if line.startswith(">"):
                out.append(line)
                out += self._execute(line[1:].split())
            elif not line or line.startswith("#"):
                out.append(line)
        return "\n".join(out) + "\n"

    def _execute(self, words: list[str]) -> list[str]:
        command: Callable[..., None] = getattr(self, f"_{words[0]}")
        if self._world is not None:
            self.world.heard.clear()
        command(*words[1:])
        return list(self.world.heard) if self._world is not None else []

    def _writer_named(self, name: str) -> WriterActor:
        actor = self.world.actors[name]
        assert isinstance(actor, WriterActor)
        return actor

    # Commands.

    def _bookies(self, *names: str) -> None:
        self._names = list(names)

    def _ledger(self, quorums: str, *members: str) -> None:
        record = ledger_record([VACANT if name == "-" else name for name in members], quorums)
        self._world = World(record, self._names)

    def _writer(self, name: str, *options: str) -> None:
        limits = replace(WriterLimits(), fragments_max=int(options[1])) if options else None
        self.world.writer(name, limits)

    def _add(self, name: str, *payloads: str) -> None:
        self._writer_named(name).add(*(payload.encode() for payload in payloads))

    def _handle(self, actor: str, *names: str) -> None:
        for name in names:
            for call in self.world.waiting(actor, name, handled=False):
                self.world.handle(call)

    def _deliver(self, actor: str, *names: str) -> None:
        for name in names:
            self.world.deliver(actor, name)

    def _lose(self, actor: str, *names: str) -> None:
        for name in names:
            for call in self.world.waiting(actor, name):
                if call in self.world.calls:
                    self.world.lose(call)

    def _run(self, actor: str, *without: str) -> None:
        self.world.run(actor, without[1:])

    def _apply(self, name: str) -> None:
        self._writer_named(name).apply_commit()

    def _tell(self, name: str) -> None:
        self._writer_named(name).answer_commit()

    def _commit(self, name: str) -> None:
        self._apply(name)
        self._tell(name)

    def _claim(self, *same: str) -> None:
        self.world.claim(raise_epoch=not same)
        self.world.say(f"record: {self.world.record.state.name} epoch {self.world.record.epoch}")

    def _recover(self, name: str) -> None:
        self.world.recoverer(name)

    def _close(self, name: str) -> None:
        actor = self.world.actors[name]
        if isinstance(actor, RecovererActor):
            actor.close()
        else:
            core = self._writer_named(name).core
            self.world.close(name, core.record, core.closed_record())
            for gap in core.unreplicated():
                self.world.say(f"{name} lacks {gap.first_entry}-{gap.last_entry} on {gap.bookie or '-'}")

    def _read(self, name: str, first: str, last: str) -> None:
        self.world.reader(name, int(first), int(last))

    def _register(self, name: str, state: str = "WRITABLE") -> None:
        self.world.register(name, BookieState[state])

    def _unregister(self, name: str) -> None:
        self.world.unregister(name)

    def _bookie(self, name: str, what: str, *number: str) -> None:
        bookie = self.world.bookies[name]
        match what:
            case "limbo" | "whole":
                bookie.limbo = what == "limbo"
            case "read-only":
                bookie.read_only = True
            case "wiped":
                bookie.wipe()
                self.world.disks_are_whole = False
            case "deleted":
                bookie.delete(LEDGER)
            case "collecting":
                bookie.collecting = {LEDGER}
            case "collected":
                bookie.collecting = set()
            case "unfenced":
                bookie.marks[LEDGER] = replace(bookie.marks[LEDGER], fenced=False, epoch=1)
            case "floor":
                bookie.floor = int(number[0])
            case "damage":
                bookie.damage(int(number[0]))
                self.world.disks_are_whole = False
            case _:
                raise AssertionError(f"nothing is known about {what}")

    def _time(self, seconds: str) -> None:
        self.world.pass_time(float(seconds))

    def _show(self, what: str) -> None:
        if what == "ledger":
            self._show_ledger()
        elif what == "bookies":
            self._show_bookies()
        elif what == "lacs":
            self._show_lacs()
        else:
            for line in self.world.actors[what].describe().splitlines():
                self.world.say(f"  {line}")

    def _show_ledger(self) -> None:
        record = self.world.record
        self.world.say(f"  {record.state.name} epoch {record.epoch} last entry {record.last_entry}")
        for fragment in record.fragments:
            self.world.say(f"  from {fragment.first_entry}: {' '.join(name or '-' for name in fragment.bookies)}")

    def _show_bookies(self) -> None:
        for name, bookie in self.world.bookies.items():
            entries = (
                f"{entry_id}{'!' if isinstance(data, Damaged) else ''}"
                for (_, entry_id), data in bookie.entries.items()
            )
            mark = bookie.marks.get(LEDGER)
            facts = ("fenced " if mark.fenced else "") + f"epoch {mark.epoch}" if mark is not None else "knows nothing"
            self.world.say(f"  {name}: {','.join(sorted(entries)) or 'nothing'} ({facts})")

    def _show_lacs(self) -> None:
        for name, bookie in self.world.bookies.items():
            lacs = [f"{key[1]}:{peek(data).lac}" for key, data in bookie.entries.items() if isinstance(data, bytes)]
            self.world.say(f"  {name}: {' '.join(sorted(lacs))}")

    def _check(self) -> None:
        self.world.check()
        closed = self.world.closed
        if closed is not None:
            self.world.say(f"  {len(self.world.confirmed)} confirmed, {closed.last_entry + 1} in the closed ledger")
