"""The tables of the SQLite engine, and what a request does to them. Synchronous; used by one thread.

versions  every version of every key since the last compaction. `place` orders them as they were made. A version ends,
          at revision `until`, when its key is changed or deleted; the current one has no end. A deletion is a version
          without a value that ends where it begins, so that no read finds it and every watch does
leases    leases that are alive; their deadlines are in memory only
facts     format, revision, compacted revision, ids, how often a server has served this database

A key is at revision R what the version with `revision <= R < until` says. To compact at C is to forget what ended at or
before C: reads and watches from C on lose nothing. It is done in small parts, beside other work.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from magnetar.metadata.store import LeaseExpired, MetadataError

FORMAT = 2
FIRST_REVISION = 1
WAL_BYTES_MAX = 16 << 20
SWEEP_VERSIONS_MAX = 1024
"""Compacted versions that are deleted at a time."""

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE versions (
    place INTEGER PRIMARY KEY,
    key BLOB NOT NULL,
    revision INTEGER NOT NULL,
    until INTEGER,
    create_revision INTEGER NOT NULL,
    version INTEGER NOT NULL,
    lease_id INTEGER NOT NULL,
    value BLOB
);
CREATE UNIQUE INDEX current_versions ON versions (key) WHERE until IS NULL;
CREATE INDEX versions_of_key ON versions (key, revision);
CREATE INDEX versions_in_order ON versions (revision, place);
CREATE INDEX ended_versions ON versions (until, key) WHERE until IS NOT NULL;
CREATE INDEX leased_versions ON versions (lease_id, key) WHERE until IS NULL AND lease_id != 0;
CREATE TABLE leases (lease_id INTEGER PRIMARY KEY, ttl_s REAL NOT NULL);
"""

_FROM_FORMAT_1 = """
ALTER TABLE facts RENAME TO old_facts;
ALTER TABLE leases RENAME TO old_leases;
{schema}
INSERT INTO versions (key, revision, create_revision, version, lease_id, value)
    SELECT CAST(key AS BLOB), mod_revision, create_revision, 1, lease_id, value FROM entries ORDER BY mod_revision;
INSERT INTO leases SELECT * FROM old_leases;
INSERT INTO facts SELECT name, value FROM old_facts WHERE name = 'next_lease';
INSERT INTO facts SELECT name, value + 1 FROM old_facts WHERE name = 'revision';
INSERT INTO facts SELECT 'compacted', value + 1 FROM old_facts WHERE name = 'revision';
DROP TABLE entries;
DROP TABLE changes;
DROP TABLE old_leases;
DROP TABLE old_facts
"""

_COLUMNS = "key, value, create_revision, revision, version, lease_id"


class Version(NamedTuple):
    """A key's value and all that is told about it. `version` counts its changes since it was created, from 1."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease_id: int


class Span(NamedTuple):
    """The keys from `low` up to and without `high`; None = to the end. One key k is Span(k, k + zero byte)."""

    low: bytes
    high: bytes | None

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self.low <= key and (self.high is None or key < self.high)


def span_of_key(key: bytes) -> Span:
    return Span(key, key + b"\0")


def span_of_prefix(prefix: bytes) -> Span:
    stem = prefix.rstrip(b"\xff")
    return Span(prefix, stem[:-1] + bytes([stem[-1] + 1]) if stem else None)


class KeyChange(NamedTuple):
    """`current` is None when the key was deleted, `previous` when it was not there before."""

    key: bytes
    current: Version | None
    previous: Version | None


@dataclass(frozen=True, slots=True)
class Revision:
    """What one request changed, in its order; all of it or nothing is there."""

    number: int
    changes: tuple[KeyChange, ...]
    size_bytes: int
    """Of keys and values, the previous ones too."""


def _to_revision(number: int, changes: Sequence[KeyChange]) -> Revision:
    size_bytes = 0
    for key, current, previous in changes:
        size_bytes += len(key) + (len(current.value) if current else 0) + (len(previous.value) if previous else 0)
    return Revision(number, tuple(changes), size_bytes)


class Tables:
    """One database. Every method may raise sqlite3.Error; after `roll_back` nothing of the open transaction remains."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=0)
        self._changes: list[KeyChange] = []
        try:
            self._configure()
            self._create()
            self._load_facts()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def _configure(self) -> None:
        execute = self._connection.execute
        execute("PRAGMA locking_mode = EXCLUSIVE")
        mode = execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise MetadataError(f"the file system does not support SQLite's write-ahead log: journal_mode=`{mode}`")
        # An answered transaction survives power loss only with FULL: NORMAL does not sync the log at commit.
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA fullfsync = ON")
        execute("PRAGMA checkpoint_fullfsync = ON")
        execute(f"PRAGMA journal_size_limit = {WAL_BYTES_MAX}")
        damage = execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise MetadataError(f"the database is damaged: restore a copy of it: check=`{damage}`")

    def _create(self) -> None:
        tables = {row[0] for row in self._connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        facts = {"format": FORMAT, "cluster_id": secrets.randbits(63), "member_id": secrets.randbits(63), "term": 0}
        if not tables:
            self._run_script(_SCHEMA, facts | {"revision": FIRST_REVISION, "compacted": -1, "next_lease": 1})
        elif tables == {"facts", "entries", "changes", "leases"}:
            self._run_script(_FROM_FORMAT_1.format(schema=_SCHEMA), facts)
        elif not {"facts", "versions", "leases"} <= tables:
            raise MetadataError(f"the file is a database of something else: tables=`{','.join(sorted(tables))}`")

    def _run_script(self, script: str, facts: dict[str, int]) -> None:
        self.begin()
        for statement in script.split(";"):
            self._connection.execute(statement)
        self._connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
        self.commit()

    def _load_facts(self) -> None:
        facts: dict[str, int] = dict(self._connection.execute("SELECT name, value FROM facts"))
        if facts.get("format") != FORMAT:
            raise MetadataError(f"written by another version: format=`{facts.get('format')}` supported=`{FORMAT}`")
        self.revision = facts["revision"]
        self.compacted = facts["compacted"]
        self.cluster_id = facts["cluster_id"]
        self.member_id = facts["member_id"]
        self.term = facts["term"]
        self._next_lease_id = facts["next_lease"]
        self.leases: dict[int, float] = dict(self._connection.execute("SELECT lease_id, ttl_s FROM leases"))

    # One SQLite transaction around any number of requests, each of which becomes one revision or none.

    def begin(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._connection.execute("COMMIT")

    def roll_back(self) -> None:
        self._changes = []
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self._load_facts()

    @property
    def changed(self) -> bool:
        """The request that runs has changed a key; it sees its own changes."""
        return bool(self._changes)

    def end_request(self) -> Revision | None:
        """Makes the changes since the last call a revision; None when there are none."""
        if not self._changes:
            return None
        self.revision += 1
        self._set_fact("revision", self.revision)
        changes, self._changes = self._changes, []
        return _to_revision(self.revision, changes)

    # Reading.

    def get(self, key: bytes) -> Version | None:
        query = f"SELECT {_COLUMNS} FROM versions INDEXED BY current_versions WHERE until IS NULL AND key = ?"
        row = self._connection.execute(query, (key,)).fetchone()
        return None if row is None else Version(*row)

    def scan(self, span: Span, *, at: int = 0, limit: int = 0, keys_only: bool = False) -> Iterator[Version]:
        """The keys of `span` in order, as of revision `at` (0 = now), `limit` of them (0 = all).

        Nothing may be changed before it is exhausted or closed.
        """
        columns = _COLUMNS.replace("value", "x''") if keys_only else _COLUMNS
        where, values = _visible(span, at)
        query = f"SELECT {columns} FROM versions {where} ORDER BY key LIMIT ?"
        return map(Version._make, self._connection.execute(query, (*values, limit or -1)))

    def count(self, span: Span, *, at: int = 0) -> int:
        where, values = _visible(span, at)
        count: int = self._connection.execute(f"SELECT count(*) FROM versions {where}", values).fetchone()[0]
        return count

    def revisions(self, first: int) -> Generator[Revision, None, None]:
        """What was changed from revision `first` on, oldest first.

        Nothing may be changed before it is exhausted or closed.
        """
        query = (
            f"SELECT {', '.join(f'c.{column}' for column in _COLUMNS.split(', '))}, "
            "p.key, p.value, p.create_revision, p.revision, p.version, p.lease_id "
            "FROM versions AS c INDEXED BY versions_in_order LEFT JOIN versions AS p INDEXED BY ended_versions "
            "ON p.until IS NOT NULL AND p.until = c.revision AND p.key = c.key AND p.revision < c.revision "
            "AND p.value IS NOT NULL WHERE c.revision >= ? ORDER BY c.revision, c.place"
        )
        number, changes = first, list[KeyChange]()
        for row in self._connection.execute(query, (first,)):
            if row[3] != number and changes:
                yield _to_revision(number, changes)
                changes = []
            number = row[3]
            current = None if row[1] is None else Version(*row[:6])
            previous = None if row[6] is None else Version(*row[6:])
            changes.append(KeyChange(row[0], current, previous))
        if changes:
            yield _to_revision(number, changes)

    def first_of_newest(self, versions_max: int) -> int:
        """The first of the newest revisions that are complete and have together about so many versions."""
        query = "SELECT revision FROM versions INDEXED BY versions_in_order ORDER BY revision DESC LIMIT 1 OFFSET ?"
        row = self._connection.execute(query, (versions_max,)).fetchone()
        return max(self.compacted, 0 if row is None else row[0] + 1)

    def keys_of_lease(self, lease_id: int) -> list[bytes]:
        query = (
            "SELECT key FROM versions INDEXED BY leased_versions "
            "WHERE until IS NULL AND lease_id != 0 AND lease_id = ? ORDER BY key"
        )
        return [row[0] for row in self._connection.execute(query, (lease_id,))]

    def size_bytes(self) -> tuple[int, int]:
        """Of the file, and what of it is in use."""
        page, pages, free = (
            self._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_size", "page_count", "freelist_count")
        )
        return page * pages, page * (pages - free)

    # Changing. A request checks everything before its first change, or makes its changes in `all_or_nothing`.

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undoes the changes of keys that are made in it if it is left by an exception."""
        before = len(self._changes)
        self._connection.execute("SAVEPOINT request")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK TO request")
            del self._changes[before:]
            raise
        finally:
            self._connection.execute("RELEASE request")

    def put(self, key: bytes, value: bytes, lease_id: int = 0) -> Version | None:
        """Returns what was there. The lease must exist."""
        assert lease_id == 0 or lease_id in self.leases, "the caller looks for the lease before it changes anything"
        previous = self.get(key)
        revision = self.revision + 1
        created, version = (previous.create_revision, previous.version + 1) if previous else (revision, 1)
        if previous is not None:
            self._end([key])
        query = f"INSERT INTO versions ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
        current = Version(key, value, created, revision, version, lease_id)
        self._connection.execute(query, current)
        self._changes.append(KeyChange(key, current, previous))
        return previous

    def delete(self, span: Span) -> list[Version]:
        """Returns what was there."""
        return self._delete(list(self.scan(span)))

    def grant_lease(self, ttl_s: float, lease_id: int = 0) -> int:
        """An id of 0 is chosen here, and never used before. The caller looks whether any other is in use."""
        assert not lease_id or lease_id not in self.leases
        while not lease_id or lease_id in self.leases:
            lease_id = self._next_lease_id
            self._next_lease_id += 1
            self._set_fact("next_lease", self._next_lease_id)
        self.leases[lease_id] = ttl_s
        self._connection.execute("INSERT INTO leases VALUES (?, ?)", (lease_id, ttl_s))
        return lease_id

    def check_lease(self, lease_id: int, key: object) -> None:
        if lease_id and lease_id not in self.leases:
            raise LeaseExpired(f"no such lease: lease=`{lease_id:x}` key=`{key}`")

    def revoke_lease(self, lease_id: int) -> None:
        """Ends a lease and deletes its keys; an unknown one is no error."""
        if self.leases.pop(lease_id, None) is not None:
            self._connection.execute("DELETE FROM leases WHERE lease_id = ?", (lease_id,))
            self._delete_keys(self.keys_of_lease(lease_id))

    def drop_leases(self) -> None:
        """Ends all leases."""
        keys = sorted(key for lease_id in self.leases for key in self.keys_of_lease(lease_id))
        self.leases.clear()
        self._connection.execute("DELETE FROM leases")
        self._delete_keys(keys)

    def begin_term(self) -> None:
        """Counts that a server begins to serve this database."""
        self.term += 1
        self._set_fact("term", self.term)

    def compact(self, revision: int) -> None:
        """Forgets what nobody needs who reads at `revision` or later. `sweep` frees the space."""
        self.compacted = revision
        self._set_fact("compacted", revision)

    def sweep(self) -> bool:
        """Deletes some of what is compacted; False when nothing more is there to delete."""
        query = (
            "DELETE FROM versions WHERE place IN (SELECT place FROM versions INDEXED BY ended_versions "
            "WHERE until IS NOT NULL AND until <= ? AND revision < ? LIMIT ?)"
        )
        deleted = self._connection.execute(query, (self.compacted, self.compacted, SWEEP_VERSIONS_MAX)).rowcount
        return deleted == SWEEP_VERSIONS_MAX

    def _delete_keys(self, keys: Iterable[bytes]) -> None:
        found = (self.get(key) for key in keys)
        self._delete([version for version in found if version is not None])

    def _delete(self, versions: list[Version]) -> list[Version]:
        revision = self.revision + 1
        self._end([version.key for version in versions])
        query = (
            "INSERT INTO versions (key, revision, until, create_revision, version, lease_id) VALUES (?, ?, ?, 0, 0, 0)"
        )
        self._connection.executemany(query, ((version.key, revision, revision) for version in versions))
        self._changes += [KeyChange(version.key, None, version) for version in versions]
        return versions

    def _end(self, keys: list[bytes]) -> None:
        """The current versions of these keys end with the revision that is being made."""
        query = "UPDATE versions INDEXED BY current_versions SET until = ? WHERE until IS NULL AND key = ?"
        self._connection.executemany(query, ((self.revision + 1, key) for key in keys))

    def _set_fact(self, name: str, value: int) -> None:
        self._connection.execute("UPDATE facts SET value = ? WHERE name = ?", (value, name))


def _visible(span: Span, at: int) -> tuple[str, tuple[bytes | int, ...]]:
    """The condition, and its values, of the versions of these keys that a read at this revision finds."""
    keys: tuple[bytes, ...] = (span.low,) if span.high is None else (span.low, span.high)
    upper = "" if span.high is None else " AND key < ?"
    if not at:
        return f"INDEXED BY current_versions WHERE until IS NULL AND key >= ?{upper}", keys
    now = "revision <= ? AND (until IS NULL OR until > ?)"
    return f"INDEXED BY versions_of_key WHERE key >= ?{upper} AND {now}", (*keys, at, at)
