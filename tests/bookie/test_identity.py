"""Who may start as which bookie, and what a bookie that may have lost something still says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from magnetar.bookie.cookies import BookieRefusal, Identity, establish_identity, repair_identity
from magnetar.bookie.directory import DirectoryInUse, DirectoryLock
from magnetar.bookie.entry_store import GroupWrites, StoreFailed
from magnetar.bookie.memory import MemoryEntryStore
from magnetar.ledger.bookie_rpc import AddStatus, EntryOutcome
from magnetar.metadata.codec import decode_bookie, decode_cookie, encode_cookie, encode_counter
from magnetar.metadata.keyspace import COUNTER_LEDGER, Keyspace
from magnetar.metadata.memory import MemoryStore
from magnetar.metadata.store import Delete, MetadataStore, MetadataUnavailable, Put


async def establish(store: MemoryEntryStore, metadata: MetadataStore, bookie_id: str = "b0") -> Identity:
    return await establish_identity(store, metadata, Keyspace("test"), bookie_id)


async def set_ledger_counter(metadata: MetadataStore, keyspace: Keyspace, value: int) -> None:
    await metadata.txn([], [Put(keyspace.counter(COUNTER_LEDGER), encode_counter(value))])


async def test_a_new_bookie_stamps_both_places_and_starts_again(metadata: MetadataStore, keyspace: Keyspace) -> None:
    store = MemoryEntryStore()
    identity = await establish(store, metadata)
    known = await metadata.get(keyspace.cookie("b0"))
    assert known is not None
    assert decode_cookie(known.value) == identity.cookie
    assert identity.limbo_floor == 0
    assert await establish(store.crash(), metadata) == identity


async def test_a_stamp_that_cannot_be_synced_ends_the_process_as_any_failed_fsync_does(bookies: Any) -> None:
    async def sync() -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(StoreFailed):
        await bookies.start(store=MemoryEntryStore(sync))
    assert bookies.deaths.messages.pop() == "fsync failed error=`[Errno 5] Input/output error`"


async def test_bookies_of_a_cluster_share_its_instance_id_and_not_their_directories(metadata: MetadataStore) -> None:
    first = (await establish(MemoryEntryStore(), metadata, "b0")).cookie
    second = (await establish(MemoryEntryStore(), metadata, "b1")).cookie
    assert first.instance_id == second.instance_id
    assert first.directory_id != second.directory_id


async def test_an_empty_directory_under_a_known_name_is_refused_with_the_remedy(metadata: MetadataStore) -> None:
    await establish(MemoryEntryStore(), metadata)
    with pytest.raises(BookieRefusal, match=r"disk was lost or swapped.*--repair-bookie b0") as refusal:
        await establish(MemoryEntryStore(), metadata)
    assert "\n" not in str(refusal.value)


async def test_a_stamped_directory_that_the_metadata_store_does_not_know_is_refused(
    metadata: MetadataStore, keyspace: Keyspace
) -> None:
    store = MemoryEntryStore()
    await establish(store, metadata)
    await metadata.txn([], [Delete(keyspace.cookie("b0"))])
    with pytest.raises(BookieRefusal, match="knows no bookie"):
        await establish(store.crash(), metadata)


async def test_anothers_directory_is_refused(metadata: MetadataStore) -> None:
    store = MemoryEntryStore()
    await establish(store, metadata, "b0")
    await establish(MemoryEntryStore(), metadata, "b1")
    with pytest.raises(BookieRefusal, match="belongs to bookie `b0`"):
        await establish(store.crash(), metadata, "b1")


async def test_swapped_directories_are_refused(metadata: MetadataStore, keyspace: Keyspace) -> None:
    store = MemoryEntryStore()
    identity = await establish(store, metadata)
    other = replace(identity.cookie, directory_id="elsewhere")
    await metadata.txn([], [Put(keyspace.cookie("b0"), encode_cookie(other))])
    with pytest.raises(BookieRefusal, match="another data directory"):
        await establish(store.crash(), metadata)


async def test_a_directory_of_another_cluster_is_refused(metadata: MetadataStore) -> None:
    store = MemoryEntryStore()
    await establish(store, metadata)
    async with MemoryStore() as elsewhere:
        with pytest.raises(BookieRefusal, match="another cluster"):
            await establish(store.crash(), elsewhere)


async def test_a_store_without_a_cookie_is_refused(metadata: MetadataStore) -> None:
    store = MemoryEntryStore()
    await store.commit(GroupWrites())
    with pytest.raises(BookieRefusal, match="without a cookie"):
        await establish(store, metadata)


class SilentAt:
    """The metadata store, silent at the n-th transaction: before it is applied, or after."""

    def __init__(self, store: MetadataStore, n: int, applied: bool) -> None:
        self._store = store
        self._left = n
        self._applied = applied

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def txn(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left == 0 and not self._applied:
            raise MetadataUnavailable("silent")
        result = await self._store.txn(*arguments)
        if self._left == 0:
            raise MetadataUnavailable("silent")
        return result


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_process_that_dies_while_it_stamps_goes_on_at_the_next_start(
    metadata: MetadataStore, n: int, applied: bool
) -> None:
    store = MemoryEntryStore()
    with pytest.raises(MetadataUnavailable):
        await establish(store, SilentAt(metadata, n, applied))  # type: ignore[arg-type]
    store = store.crash()
    identity = await establish(store, metadata)
    assert identity.limbo_floor == 0
    assert await establish(store.crash(), metadata) == identity


@pytest.mark.parametrize("dies", [False, True])
async def test_a_repaired_identity_takes_an_empty_directory_and_is_in_limbo(
    metadata: MetadataStore, keyspace: Keyspace, dies: bool
) -> None:
    old = await establish(MemoryEntryStore(), metadata)
    await set_ledger_counter(metadata, keyspace, 301)
    assert await repair_identity(metadata, keyspace, "b0")
    store = MemoryEntryStore()
    if dies:
        with pytest.raises(MetadataUnavailable):
            await establish(store, SilentAt(metadata, 1, False))  # type: ignore[arg-type]
        await set_ledger_counter(metadata, keyspace, 501)
        store = store.crash()
    reborn = await establish(store, metadata)
    assert reborn.limbo_floor == 301
    assert reborn.cookie.directory_id != old.cookie.directory_id
    assert await establish(store.crash(), metadata) == reborn


async def test_the_directory_that_a_repair_gave_up_is_refused(metadata: MetadataStore, keyspace: Keyspace) -> None:
    store = MemoryEntryStore()
    await establish(store, metadata)
    await repair_identity(metadata, keyspace, "b0")
    with pytest.raises(BookieRefusal, match="start it with an empty one"):
        await establish(store.crash(), metadata)


async def test_an_unknown_identity_cannot_be_repaired(metadata: MetadataStore, keyspace: Keyspace) -> None:
    assert not await repair_identity(metadata, keyspace, "b0")


async def test_a_store_in_doubt_is_in_limbo_up_to_the_ledger_counter_and_stays_so(
    metadata: MetadataStore, keyspace: Keyspace
) -> None:
    store = MemoryEntryStore()
    await establish(store, metadata)
    await set_ledger_counter(metadata, keyspace, 101)
    store = store.crash(lose_groups=True)
    assert (await establish(store, metadata)).limbo_floor == 101
    await set_ledger_counter(metadata, keyspace, 201)
    store = store.crash()
    assert (await establish(store, metadata)).limbo_floor == 101
    store = store.crash(lose_groups=True)
    assert (await establish(store, metadata)).limbo_floor == 201


async def test_in_limbo_positives_are_served_and_negatives_and_lacs_are_unknown(
    bookies: Any, metadata: MetadataStore, keyspace: Keyspace, writer: Any
) -> None:
    bookie = await bookies.start()
    local = bookie.local()
    await local.add(writer(7).add(0, 1))
    await set_ledger_counter(metadata, keyspace, 101)
    await bookie.stop()
    lost = bookies.store.crash(lose_groups=True)
    await lost.commit(GroupWrites(entries=[(7, 0, writer(7).entry(0))], marks=bookies.store._durable.marks))
    lost.doubt = "groups are missing"
    bookie = await bookies.start(store=lost)
    local = bookie.local()
    read = await local.read(writer(7).read(0, 1, fence=True))
    assert [answer.outcome.name for answer in read.answers] == ["HAVE", "UNKNOWN"]
    lac = await local.read_lac(writer(7).lac())
    assert (lac.outcome, lac.fenced) == (EntryOutcome.UNKNOWN, True)
    assert (await local.read(writer(8).read(0, 0))).answers[0].outcome is EntryOutcome.UNKNOWN
    assert (await local.read_lac(writer(9).lac(fence=True))).outcome is EntryOutcome.UNKNOWN
    assert (await local.add(writer(10).add(0))).status is AddStatus.REFUSED
    assert (await local.add(writer(10).add(0, recovery=True))).status is AddStatus.OK
    # Ledgers created since then are whole here.
    assert (await local.read(writer(101).read(0, 0))).answers[0].outcome is EntryOutcome.PROVABLY_NOT
    assert (await local.add(writer(101).add(0))).status is AddStatus.OK
    registered = await metadata.get(keyspace.bookie("bookie0"))
    assert registered is not None
    assert decode_bookie(registered.value).ledger_floor == 101


async def test_a_second_bookie_of_the_same_id_is_refused(bookies: Any, tmp_path: Path) -> None:
    await bookies.start()
    with pytest.raises(BookieRefusal, match="in use"):
        await bookies.start(store=bookies.store.crash(), data_dir=tmp_path / "elsewhere")


async def test_a_directory_in_use_is_refused_and_free_again_after_the_holder(bookies: Any, tmp_path: Path) -> None:
    first = await bookies.start(rocksdb=True)
    with pytest.raises(BookieRefusal, match=r"another process uses the data directory: .*pid=`\d+`"):
        await bookies.start("bookie1", rocksdb=True, data_dir=first.settings.data_dir)
    await first.stop()
    again = await bookies.start(rocksdb=True)
    assert again.identity == first.identity


def test_a_lock_is_held_against_other_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from magnetar.bookie.directory import DirectoryLock; "
        "lock = DirectoryLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DirectoryInUse, match=f"pid=`{holder.pid}`"):
            DirectoryLock(tmp_path)
        holder.kill()
    DirectoryLock(tmp_path).close()


async def test_a_damaged_store_is_refused_with_cause_and_remedy(bookies: Any, writer: Any, tmp_path: Path) -> None:
    bookie = await bookies.start(rocksdb=True)
    await bookie.stop()
    manifest = next((tmp_path / "bookie0" / "store" / "rocksdb").glob("MANIFEST-*"))
    manifest.write_bytes(manifest.read_bytes()[:40])
    with pytest.raises(BookieRefusal, match=r"store is damaged: .*away and start with --repair-bookie bookie0") as seen:
        await bookies.start(rocksdb=True)
    assert "\n" not in str(seen.value)


async def test_a_lost_store_under_its_side_file_is_refused(bookies: Any, tmp_path: Path) -> None:
    bookie = await bookies.start(rocksdb=True)
    await bookie.stop()
    shutil.rmtree(tmp_path / "bookie0" / "store" / "rocksdb")
    with pytest.raises(BookieRefusal, match="without a cookie"):
        await bookies.start(rocksdb=True)
