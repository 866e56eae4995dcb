"""The tables of the SQLite engine, and what a transaction does to them. Synchronous; used by one thread.

entries   the current keys
changes   the newest changes, one row a key and revision: what a watch needs after a restart
leases    leases that are alive; their deadlines are in memory only
facts     format, revision, oldest revision in `changes`, next lease id
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from magnetar.metadata.store import (
    Change,
    Changes,
    Compare,
    CompareTarget,
    Delete,
    DeletePrefix,
    KeyValue,
    LeaseExpired,
    MetadataError,
    Operation,
    Put,
    RangeResult,
    TxnResult,
)

FORMAT = 1
FIRST_REVISION = 1
WAL_BYTES_MAX = 16 << 20
TRIM_REVISIONS = 256
"""Old rows of `changes` are deleted this many revisions at a time."""

_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE entries (
    key TEXT PRIMARY KEY,
    value BLOB NOT NULL,
    create_revision INTEGER NOT NULL,
    mod_revision INTEGER NOT NULL,
    lease_id INTEGER NOT NULL
);
CREATE INDEX entries_of_lease ON entries (lease_id) WHERE lease_id != 0;
CREATE TABLE changes (
    revision INTEGER NOT NULL,
    place INTEGER NOT NULL,
    key TEXT NOT NULL,
    value BLOB,
    create_revision INTEGER NOT NULL,
    lease_id INTEGER NOT NULL,
    PRIMARY KEY (revision, place)
);
CREATE TABLE leases (lease_id INTEGER PRIMARY KEY, ttl_s REAL NOT NULL);
"""

_COLUMNS = "key, value, create_revision, mod_revision, lease_id"


class Tables:
    """One database. Every method may raise sqlite3.Error; after `roll_back` nothing of the open transaction remains."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=0)
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
        if self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0:
            self.begin()
            for statement in _SCHEMA.split(";"):
                self._connection.execute(statement)
            facts = {"format": FORMAT, "revision": FIRST_REVISION, "oldest": 0, "next_lease": 1}
            self._connection.executemany("INSERT INTO facts VALUES (?, ?)", facts.items())
            self.commit()

    def _load_facts(self) -> None:
        facts: dict[str, int] = dict(self._connection.execute("SELECT name, value FROM facts"))
        if facts["format"] != FORMAT:
            raise MetadataError(f"written by another version: format=`{facts['format']}` supported=`{FORMAT}`")
        self.revision = facts["revision"]
        self.oldest = facts["oldest"]
        self._next_lease_id = facts["next_lease"]
        self.leases: dict[int, float] = dict(self._connection.execute("SELECT lease_id, ttl_s FROM leases"))

    # One SQLite transaction around any number of ours.

    def begin(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._connection.execute("COMMIT")

    def roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self._load_facts()

    # Reading.

    def get(self, key: str) -> KeyValue | None:
        row = self._connection.execute(f"SELECT {_COLUMNS} FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else KeyValue(*row)

    def range(self, prefix: str, after: str, limit: int) -> RangeResult:
        items: list[KeyValue] = []
        for item in self._scan(prefix, after):
            if len(items) == limit > 0:
                return RangeResult(tuple(items), self.revision, more=True)
            items.append(item)
        return RangeResult(tuple(items), self.revision)

    def _scan(self, prefix: str, after: str = "") -> Iterator[KeyValue]:
        where, start = ("key > ?", after) if after >= prefix else ("key >= ?", prefix)
        query = f"SELECT {_COLUMNS} FROM entries WHERE {where} ORDER BY key"
        with closing(self._connection.execute(query, (start,))) as rows:
            for row in rows:
                if not row[0].startswith(prefix):
                    return
                yield KeyValue(*row)

    def history(self) -> Iterator[Changes]:
        """The stored changes, one item a revision, oldest first."""
        query = "SELECT revision, key, value, create_revision, lease_id FROM changes ORDER BY revision, place"
        revision, changes = 0, list[Change]()
        for row_revision, key, value, create_revision, lease_id in self._connection.execute(query):
            if row_revision != revision and changes:
                yield Changes(tuple(changes), revision)
                changes = []
            revision = row_revision
            current = None if value is None else KeyValue(key, value, create_revision, revision, lease_id)
            changes.append(Change(key, current, revision))
        if changes:
            yield Changes(tuple(changes), revision)

    # Changing. Each of these runs between `begin` and `commit`, and either changes everything it should or nothing.

    def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> tuple[TxnResult, Changes | None]:
        if not all(self._holds(compare) for compare in compares):
            return TxnResult(False, self.revision), None
        for operation in operations:
            if isinstance(operation, Put) and operation.lease_id and operation.lease_id not in self.leases:
                raise LeaseExpired(f"no such lease: lease=`{operation.lease_id:x}` key=`{operation.key}`")
        changes: list[Change] = []
        for operation in operations:
            changes += self._apply(operation)
        changed = self._record(changes)
        return TxnResult(True, self.revision), changed

    def grant_lease(self, ttl_s: float) -> int:
        lease_id = self._next_lease_id
        self._next_lease_id += 1
        self.leases[lease_id] = ttl_s
        self._connection.execute("INSERT INTO leases VALUES (?, ?)", (lease_id, ttl_s))
        self._set_fact("next_lease", self._next_lease_id)
        return lease_id

    def revoke_lease(self, lease_id: int) -> Changes | None:
        if self.leases.pop(lease_id, None) is None:
            return None
        self._connection.execute("DELETE FROM leases WHERE lease_id = ?", (lease_id,))
        return self._delete_leased("lease_id = ?", lease_id)

    def drop_leases(self) -> Changes | None:
        """Ends all leases, as one change."""
        self.leases.clear()
        self._connection.execute("DELETE FROM leases")
        return self._delete_leased("lease_id != ?", 0)

    def trim_history(self, oldest: int) -> None:
        """Deletes changes before `oldest`, if there are enough of them to be worth it."""
        if oldest - self.oldest >= TRIM_REVISIONS:
            self._connection.execute("DELETE FROM changes WHERE revision < ?", (oldest,))
            self._set_fact("oldest", oldest)
            self.oldest = oldest

    def _holds(self, compare: Compare) -> bool:
        column = "mod_revision" if compare.target is CompareTarget.MOD else "create_revision"
        row = self._connection.execute(f"SELECT {column} FROM entries WHERE key = ?", (compare.key,)).fetchone()
        return ((0 if row is None else row[0]) == compare.revision) == compare.equal

    def _apply(self, operation: Operation) -> list[Change]:
        if isinstance(operation, Put):
            return [self._put(operation)]
        if isinstance(operation, Delete):
            return self._delete([operation.key] if self.get(operation.key) is not None else [])
        assert isinstance(operation, DeletePrefix)
        return self._delete([item.key for item in self._scan(operation.prefix)])

    def _put(self, put: Put) -> Change:
        revision = self.revision + 1
        query = (
            f"INSERT INTO entries ({_COLUMNS}) VALUES (?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
            "value = excluded.value, mod_revision = excluded.mod_revision, lease_id = excluded.lease_id "
            "RETURNING create_revision"
        )
        values = (put.key, put.value, revision, revision, put.lease_id)
        create_revision = self._connection.execute(query, values).fetchall()[0][0]
        return Change(put.key, KeyValue(put.key, put.value, create_revision, revision, put.lease_id), revision)

    def _delete(self, keys: list[str]) -> list[Change]:
        self._connection.executemany("DELETE FROM entries WHERE key = ?", ((key,) for key in keys))
        return [Change(key, None, self.revision + 1) for key in keys]

    def _delete_leased(self, where: str, value: int) -> Changes | None:
        query = f"SELECT key FROM entries WHERE lease_id != 0 AND {where} ORDER BY key"
        keys = [row[0] for row in self._connection.execute(query, (value,)).fetchall()]
        return self._record(self._delete(keys))

    def _record(self, changes: list[Change]) -> Changes | None:
        """Makes the changes a revision; None when there are none."""
        if not changes:
            return None
        self.revision += 1
        rows = (
            (
                c.revision,
                place,
                c.key,
                *(
                    (c.current.value, c.current.create_revision, c.current.lease_id)
                    if c.current is not None
                    else (None, 0, 0)
                ),
            )
            for place, c in enumerate(changes)
        )
        self._connection.executemany("INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?)", rows)
        self._set_fact("revision", self.revision)
        return Changes(tuple(changes), self.revision)

    def _set_fact(self, name: str, value: int) -> None:
        self._connection.execute("UPDATE facts SET value = ? WHERE name = ?", (value, name))
