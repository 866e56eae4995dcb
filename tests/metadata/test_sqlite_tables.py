"""The versions in SQLite behave like a list of snapshots, whatever is compacted, and migrate from format 1."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magnetar.metadata import sqlite_tables
from magnetar.metadata.sqlite import SqliteStore
from magnetar.metadata.sqlite_tables import Revision, Span, Tables, Version, span_of_key, span_of_prefix
from magnetar.metadata.store import MetadataError

KEYS = [b"a", b"a\0", b"ab", b"b", b"\xff", b"\xff\xff"]
EVERYTHING = Span(b"", None)

spans = st.builds(Span, st.sampled_from(KEYS), st.sampled_from([*KEYS, None])) | st.sampled_from(KEYS).map(span_of_key)
steps = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(KEYS), st.binary(max_size=2)),
    st.tuples(st.just("put"), st.sampled_from(KEYS), st.binary(max_size=2)),
    st.tuples(st.just("delete"), spans),
    st.tuples(st.just("both"), st.sampled_from(KEYS), spans),
    st.tuples(st.just("compact"), st.integers(0, 5)),
)


class Model:
    """A snapshot of all keys for each revision."""

    def __init__(self) -> None:
        self.snapshots: dict[int, dict[bytes, Version]] = {0: {}, 1: {}}
        self.revisions: list[Revision] = []
        self.now: dict[bytes, Version] = {}

    def put(self, key: bytes, value: bytes, revision: int) -> None:
        before = self.now.get(key)
        created, number = (before.create_revision, before.version + 1) if before else (revision, 1)
        self.now[key] = Version(key, value, created, revision, number, 0)

    def delete(self, span: Span) -> None:
        self.now = {key: version for key, version in self.now.items() if key not in span}

    def end(self, revision: Revision | None) -> None:
        if revision is not None:
            self.revisions.append(revision)
            self.snapshots[revision.number] = dict(sorted(self.now.items()))


def check(tables: Tables, model: Model, span: Span) -> None:
    assert list(tables.scan(EVERYTHING)) == list(model.snapshots[tables.revision].values())
    for at in range(max(1, tables.compacted), tables.revision + 1):
        expected = [version for key, version in model.snapshots[at].items() if key in span]
        assert list(tables.scan(span, at=at)) == expected
        assert list(tables.scan(span, at=at, limit=2)) == expected[:2]
        assert tables.count(span, at=at) == len(expected)
    first = max(0, tables.compacted)
    told = [revision for revision in model.revisions if revision.number >= first]
    found = list(tables.revisions(first))
    assert [(r.number, [c[:2] for c in r.changes]) for r in found] == [
        (r.number, [c[:2] for c in r.changes]) for r in told
    ]
    # What was there before a change is known as long as a read could find it.
    later = [r for r in found if r.number > first]
    assert later == [r for r in told if r.number > first]


@settings(max_examples=60)
@given(actions=st.lists(steps, max_size=25), span=spans, sweep=st.integers(1, 3))
def test_every_revision_that_is_not_compacted_reads_as_it_was(
    actions: list[tuple[object, ...]], span: Span, sweep: int
) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_tables, "SWEEP_VERSIONS_MAX", sweep)
        tables, model = Tables(Path(directory) / "db"), Model()
        tables._connection.execute("PRAGMA synchronous = OFF")
        tables.begin()
        for action in actions:
            apply(tables, model, action)
        check(tables, model, span)
        while tables.sweep():
            pass
        check(tables, model, span)
        tables.commit()
        tables.close()


def apply(tables: Tables, model: Model, action: tuple[object, ...]) -> None:
    match action:
        case ("put", bytes(key), bytes(value)):
            tables.put(key, value)
            model.put(key, value, tables.revision + 1)
        case ("delete", Span() as span):
            tables.delete(span)
            model.delete(span)
        case ("both", bytes(key), Span() as span):
            tables.delete(span)
            model.delete(span)
            if key not in span:
                tables.put(key, b"both")
                model.put(key, b"both", tables.revision + 1)
        case ("compact", int(back)):
            tables.compact(max(tables.compacted, tables.revision - back))
            tables.sweep()
    model.end(tables.end_request())


@given(prefix=st.binary(max_size=3), key=st.binary(max_size=4))
def test_a_prefix_spans_its_keys(prefix: bytes, key: bytes) -> None:
    assert (key in span_of_prefix(prefix)) == key.startswith(prefix)


def test_what_is_undone_leaves_nothing(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "db")
    tables.begin()
    tables.put(b"a", b"1")
    with suppress(ZeroDivisionError), tables.all_or_nothing():
        tables.delete(EVERYTHING)
        tables.put(b"b", b"2")
        raise ZeroDivisionError
    revision = tables.end_request()
    tables.commit()
    assert revision is not None
    assert [change.key for change in revision.changes] == [b"a"]
    assert [version.key for version in tables.scan(EVERYTHING)] == [b"a"]
    tables.close()


FORMAT_1 = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE entries (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, create_revision INTEGER NOT NULL, mod_revision INTEGER NOT NULL,
    lease_id INTEGER NOT NULL
);
CREATE INDEX entries_of_lease ON entries (lease_id) WHERE lease_id != 0;
CREATE TABLE changes (
    revision INTEGER NOT NULL, place INTEGER NOT NULL, key TEXT NOT NULL, value BLOB,
    create_revision INTEGER NOT NULL, lease_id INTEGER NOT NULL, PRIMARY KEY (revision, place)
);
CREATE TABLE leases (lease_id INTEGER PRIMARY KEY, ttl_s REAL NOT NULL);
INSERT INTO facts VALUES ('format', 1), ('revision', 9), ('oldest', 0), ('next_lease', 5);
INSERT INTO entries VALUES ('/ä', x'31', 3, 8, 0), ('b', x'', 9, 9, 4);
INSERT INTO changes VALUES (9, 0, 'b', x'', 9, 4);
INSERT INTO leases VALUES (4, 7.5);
"""


async def test_a_database_of_format_1_is_taken_over_with_keys_and_leases(tmp_path: Path) -> None:
    path = tmp_path / "metadata.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(FORMAT_1)
    connection.close()
    for _ in range(2):
        async with await SqliteStore.open(path) as store:
            found = await store.get("/ä")
            assert found is not None
            assert (found.value, found.create_revision, found.mod_revision) == (b"1", 3, 8)
            assert await store.keep_alive(4) == 7.5
            items = await store.range("")
            assert [item.key for item in items.items] == ["/ä", "b"]
            assert items.revision == 10
    async with await SqliteStore.open(path) as store:
        assert await store.grant_remote_lease(5) == 5
        await store.revoke_lease(4)
        assert await store.get("b") is None


def test_a_migration_that_is_cut_off_has_changed_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metadata.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(FORMAT_1)
    connection.close()

    def fail(tables: Tables) -> None:
        raise MetadataError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Tables, "commit", fail)
        with pytest.raises(MetadataError, match="cut off"):
            Tables(path)
    tables = Tables(path)
    assert tables.get("/ä".encode()) is not None
    tables.close()
