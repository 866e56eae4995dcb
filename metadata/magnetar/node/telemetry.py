"""What a server process tells about itself: structured logs on stderr, and /metrics, /livez, /readyz over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog
import structlog.tracebacks
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from magnetar.node.rpc import ListenError, frames

# A time of creation beside each counter doubles what is scraped and tells nothing that the process's start does not.
disable_created_metrics()  # type: ignore[no-untyped-call]

HEARTBEAT_S = 1.0
STUCK_AFTER_S = 15.0
"""A process whose event loop did not run for so long says that it does not live."""
REQUEST_TIMEOUT_S = 10.0
"""From the connection to the end of the answer."""
CONNECTIONS_MAX = 32
"""At a time, each with a thread; one more is closed at once."""

log = structlog.get_logger("magnetar.http")

_TRACEBACKS = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)  # They hold the users' data.
)


def configure_logging(level: str = "info") -> None:
    """Logs go to stderr: readable on a terminal, one JSON object a line otherwise."""
    on_terminal = sys.stderr.isatty()
    renderer = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if on_terminal
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if on_terminal else [_TRACEBACKS]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def new_registry() -> CollectorRegistry:
    """The metrics of one process, those of the process itself among them."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    registry.register(_FrameCollector())
    return registry


class _FrameCollector(Collector):
    """Frames are counted in two numbers, and made a metric when it is asked for: each is on a hot path."""

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily("magnetar_rpc_frames", "Frames of the streams served here", labels=["direction"])
        family.add_metric(["received"], frames.received)
        family.add_metric(["sent"], frames.sent)
        yield family


class HttpServer:
    """Serves /metrics, /livez and /readyz from a thread of its own, so that a busy event loop still answers.

    `problems` names what keeps the process from being ready; an empty list is ready.
    """

    def __init__(self, registry: CollectorRegistry, problems: Callable[[], list[str]]) -> None:
        self._registry = registry
        self._problems = problems
        self._beat = time.monotonic()
        self._server: ThreadingHTTPServer | None = None
        self._heart: asyncio.Task[None] | None = None

    def start(self, listen: str) -> int:
        """Listens on `host:port` and returns the port it got. Raises ListenError. Call on the event loop."""
        host, _, port = listen.rpartition(":")
        try:
            self._server = _Server((host.strip("[]"), int(port)), self)
        except OSError as error:
            raise ListenError(f"cannot listen on {listen} for HTTP: {error.strerror}; choose another address") from None
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()
        self._heart = asyncio.create_task(self._keep_beating(), name="heartbeat")
        return int(self._server.server_address[1])

    async def stop(self) -> None:
        if self._heart is not None:
            self._heart.cancel()
        if self._server is not None:
            await asyncio.to_thread(self._server.shutdown)
            self._server.server_close()

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        if path == "/livez":
            silent_s = time.monotonic() - self._beat
            return _verdict([f"event loop stuck for {silent_s:.0f} s"] if silent_s > STUCK_AFTER_S else [])
        if path == "/readyz":
            return _verdict(self._problems())
        return 404, "text/plain", b"only /metrics, /livez and /readyz are here\n"

    async def _keep_beating(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(HEARTBEAT_S)


def _verdict(problems: list[str]) -> tuple[int, str, bytes]:
    body = json.dumps({"ok": not problems, "problems": problems}).encode() + b"\n"
    return (503 if problems else 200), "application/json", body


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 2 * CONNECTIONS_MAX

    def __init__(self, address: tuple[str, int], owner: HttpServer) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)
        self.owner = owner
        self._free = threading.Semaphore(CONNECTIONS_MAX)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # A timeout of the socket counts from each byte: one that drips would hold its thread for days.
        deadline = threading.Timer(REQUEST_TIMEOUT_S, _cut_off, [request])
        deadline.daemon = True
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            log.error("http request failed", peer=str(client_address), exc_info=error)


def _cut_off(request: socket.socket) -> None:
    with suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_TIMEOUT_S
    server: _Server

    def do_GET(self) -> None:
        status, content_type, body = self.server.owner.answer(self.path.partition("?")[0])
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "magnetar"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: scrapes are not news."""
