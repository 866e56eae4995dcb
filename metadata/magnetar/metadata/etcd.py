"""The metadata store in etcd v3, or in a server that speaks its API.

Reads are linearizable, and are asked again, of the next endpoint if need be, until their time is over. A transaction is
sent once: if its answer is lost, nobody but the store knows whether it was applied.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.etcd_channel import (
    LEASE_GRANT,
    RANGE,
    TXN,
    Compacted,
    EtcdChannel,
    Exhausted,
    NoMetadataStore,
    Times,
)
from magnetar.metadata.etcd_codec import (
    PAGE_KEYS_FIRST,
    BadAnswer,
    get_request,
    get_result,
    next_page_keys,
    range_request,
    range_result,
    txn_request,
    txn_result,
)
from magnetar.metadata.etcd_endpoints import parse_endpoints
from magnetar.metadata.etcd_lease import EtcdLease
from magnetar.metadata.etcd_watch import EtcdWatch
from magnetar.metadata.leases import check_ttl
from magnetar.metadata.store import (
    Compare,
    KeyValue,
    MetadataUnavailable,
    Operation,
    RangeResult,
    TxnResult,
    check_txn,
)

OPEN_S = 10.0
OPEN_POLL_S = 0.05
RANGE_RESTARTS_MAX = 5


class EtcdMetadata:
    """See `store.MetadataStore`. Made by `open`."""

    def __init__(self, channel: EtcdChannel) -> None:
        self._channel = channel
        self._watches: set[EtcdWatch] = set()
        self._leases: set[EtcdLease] = set()

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        open_s: float = OPEN_S,
        times: Times | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Connects to the first of the endpoints in `etcd://host:port[,host:port]` that serves.

        Raises MetadataUnavailable when none does within `open_s`, NoMetadataStore as soon as it is sure that none will,
        MetadataError for what else an operator has to change.
        """
        channel = EtcdChannel(parse_endpoints(url), times or Times(), rng=rng or random.Random(), clock=clock)
        store = cls(channel)
        try:
            await store._await_endpoint(open_s)
            await store.get("/magnetar")  # an etcd that wants credentials says so now
        except BaseException:
            await store.close()
            raise
        return store

    async def get(self, key: str) -> KeyValue | None:
        self._channel.check_open()
        if not key:
            return None
        answer = await self._channel.ask(RANGE, get_request(key), repeatable=True)
        with _believing():
            return get_result(answer, key)

    async def range(self, prefix: str, *, after: str = "", limit: int = 0) -> RangeResult:
        for _ in range(RANGE_RESTARTS_MAX):
            try:
                return await self._range(prefix, after, limit)
            except Compacted:
                continue
        raise MetadataUnavailable(f"a range is compacted faster than it can be read: prefix=`{prefix}`")

    async def _range(self, prefix: str, after: str, limit: int) -> RangeResult:
        """All pages are read as of the revision of the first."""
        items: list[KeyValue] = []
        page_keys, revision = PAGE_KEYS_FIRST, 0
        while True:
            asked = min(page_keys, limit - len(items)) if limit else page_keys
            try:
                answer = await self._channel.ask(RANGE, range_request(prefix, after, asked, revision), repeatable=True)
            except Exhausted:
                if asked == 1:
                    raise
                page_keys = asked // 2
                continue
            with _believing():
                page = range_result(answer, prefix, after, asked)
            revision = revision or page.revision
            items += page.items
            if not page.more or len(items) == limit:
                return RangeResult(tuple(items), revision, page.more)
            after = items[-1].key
            page_keys = next_page_keys(asked, page.items)

    async def txn(self, compares: Sequence[Compare], operations: Sequence[Operation]) -> TxnResult:
        check_txn(compares, operations)
        self._channel.check_open()
        request = txn_request(compares, operations)
        answer = await self._channel.ask(TXN, request, repeatable=not operations)
        with _believing():
            return txn_result(answer, request)

    def watch(self, prefix: str, *, from_revision: int) -> EtcdWatch:
        watch = EtcdWatch(self._channel, prefix, from_revision, self._watches.discard)
        self._watches.add(watch)
        return watch

    async def grant_lease(self, ttl_s: float) -> EtcdLease:
        """The time to live is in whole seconds, and may be longer than asked for: etcd has a minimum."""
        check_ttl(ttl_s)
        self._channel.check_open()
        # A lease whose grant was not answered holds no keys and expires by itself: asking again does no harm.
        answer, sent_at = await self._channel.ask_timed(
            LEASE_GRANT, pb.LeaseGrantRequest(ttl=math.ceil(ttl_s)), repeatable=True
        )
        if answer.error or not answer.id or answer.ttl < 1:
            raise MetadataUnavailable(f"the metadata store grants no lease: reason=`{answer.error}` ttl=`{answer.ttl}`")
        lease = EtcdLease(self._channel, answer.id, answer.ttl, sent_at)
        self._leases = {held for held in self._leases if not held.lost} | {lease}
        return lease

    async def close(self) -> None:
        """Ends watches, and leases as far as this process is concerned: the server lets them expire."""
        for lease in self._leases:
            await lease.end()
        await self._channel.close()
        for watch in list(self._watches):
            await watch.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _await_endpoint(self, open_s: float) -> None:
        """Gives up early when every endpoint has said what will not change."""
        waiting = asyncio.ensure_future(self._channel.connected(open_s))
        try:
            while not (await asyncio.wait({waiting}, timeout=OPEN_POLL_S))[0]:
                if self._channel.hopeless():
                    raise NoMetadataStore(self._channel.explain())
            await waiting
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


@contextmanager
def _believing() -> Iterator[None]:
    try:
        yield
    except BadAnswer as error:
        raise MetadataUnavailable(f"the metadata store gave an answer that cannot be: reason=`{error}`") from error
