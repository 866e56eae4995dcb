"""Leases that a server elsewhere keeps: until when they certainly live, and the stream that keeps them alive."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog

from magnetar.etcd import etcd_pb2 as pb
from magnetar.metadata.etcd_channel import LEASE_KEEP_ALIVE, LEASE_REVOKE, EtcdChannel, Stream, Unanswered
from magnetar.metadata.etcd_codec import BadAnswer
from magnetar.metadata.store import LeaseExpired, MetadataError

MARGIN = 0.1
"""Of the time to live: so much earlier than the server a holder takes its lease for lost. Covers clocks that run at
different speeds."""
MARGIN_S_MIN = 0.2
RENEWALS = 3
"""Within one time to live."""
ANSWER_WAITS = 4
"""A keepalive that is not answered within this part of the time to live is sent again, to the next endpoint."""

log = structlog.get_logger(__name__)


class LeaseTerm:
    """Until when a lease certainly lives. Pure.

    The server counts from when it handles a request, which is after it was sent. So the time from the sending of the
    last request that was answered, less a margin, is never longer than the server's. A lease that was lost stays lost.
    """

    def __init__(self, ttl_s: float, sent_at: float) -> None:
        self.ttl_s = ttl_s
        self.sent_at = sent_at
        self._gone = False

    @property
    def ends_at(self) -> float:
        return self.sent_at + self.ttl_s - max(self.ttl_s * MARGIN, MARGIN_S_MIN)

    def lost(self, now: float) -> bool:
        self._gone = self._gone or now >= self.ends_at
        return self._gone

    def end(self) -> None:
        self._gone = True

    def renewed(self, sent_at: float, ttl_s: float, now: float) -> None:
        """The request sent at `sent_at` was answered: `ttl_s` is what remains, 0 = there is no such lease."""
        if ttl_s <= 0:
            self._gone = True
        elif not self.lost(now) and sent_at + min(ttl_s, self.ttl_s) > self.sent_at + self.ttl_s:
            self.sent_at, self.ttl_s = sent_at, min(ttl_s, self.ttl_s)

    def pause_s(self, now: float) -> float:
        """Until the next request is due."""
        return max(0.0, self.sent_at + self.ttl_s / RENEWALS - now)

    @property
    def answer_s(self) -> float:
        return self.ttl_s / ANSWER_WAITS


class EtcdLease:
    """See `store.Lease`."""

    def __init__(self, channel: EtcdChannel, lease_id: int, ttl_s: float, sent_at: float) -> None:
        self._channel = channel
        self._lease_id = lease_id
        self._ttl_s = ttl_s
        self._term = LeaseTerm(ttl_s, sent_at)
        self._lost = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._watch_clock()
        self._keeper = asyncio.create_task(self._run(), name=f"metadata-lease {lease_id:x}")

    @property
    def lease_id(self) -> int:
        return self._lease_id

    @property
    def ttl_s(self) -> float:
        return self._ttl_s

    @property
    def lost(self) -> bool:
        return self._term.lost(self._channel.clock())

    async def wait_lost(self) -> None:
        await self._lost.wait()

    async def revoke(self) -> None:
        """See `store.Lease`. Raises MetadataUnavailable when the lease may live on until it expires."""
        await self.end()
        if not self._channel.closed:
            with suppress(LeaseExpired):
                await self._channel.ask(LEASE_REVOKE, pb.LeaseRevokeRequest(id=self._lease_id), repeatable=True)

    async def end(self) -> None:
        """Lost here, and no longer kept alive."""
        self._term.end()
        self._watch_clock()
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)

    def _watch_clock(self) -> None:
        """Tells who waits when the lease is lost, now or later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._channel.clock()
        if self._term.lost(now):
            self._lost.set()
        else:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._term.ends_at - now, self._watch_clock)

    async def _run(self) -> None:
        try:
            while not self.lost:
                await self._keep_on_connection()
        except MetadataError:
            return  # the store was closed, which ends its leases
        log.warning("a lease is lost", lease=f"{self._lease_id:x}", ttl_s=self._ttl_s)

    async def _keep_on_connection(self) -> None:
        """Until the lease is lost or the connection broken."""
        connection = await self._channel.connected(None)
        reason = "a lease was not kept alive in time"
        stream: Stream[pb.LeaseKeepAliveResponse] | None = None
        try:
            stream = connection.stream(LEASE_KEEP_ALIVE)
            while not self.lost:
                await self._keep_alive(stream)
        except TimeoutError:
            self._channel.leave(connection, reason)
        except (Unanswered, BadAnswer) as error:
            self._channel.leave(connection, str(error))
        finally:
            if stream is not None:
                stream.close()

    async def _keep_alive(self, stream: Stream[pb.LeaseKeepAliveResponse]) -> None:
        await asyncio.sleep(self._term.pause_s(self._channel.clock()))
        sent_at = self._channel.clock()
        async with asyncio.timeout(min(self._term.answer_s, self._channel.times.attempt_s)):
            await stream.send(pb.LeaseKeepAliveRequest(id=self._lease_id))
            answer = await stream.receive()
        if answer.id != self._lease_id:
            raise BadAnswer(f"it answered for another lease: lease=`{answer.id:x}` expected=`{self._lease_id:x}`")
        self._term.renewed(sent_at, answer.ttl, self._channel.clock())
        self._watch_clock()
