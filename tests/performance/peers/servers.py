"""Clusters of other projects on this machine: three copies of everything, synced before the answer or as they come."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fetching

START_S = 180.0
STOP_S = 20.0
NODES = 3
HEAP = "-Xmx1g"


class NotStarted(Exception):
    """The peer did not serve in time; the message is one line."""


@contextmanager
def nats(folder: Path, *, fsync: bool) -> Iterator[str]:
    """JetStream on three servers. By default it syncs every two minutes."""
    program = fetching.nats_server()
    clients, routes = free_ports(NODES), free_ports(NODES)
    with ExitStack() as running:
        for number in range(NODES):
            home = folder / f"nats{number}"
            home.mkdir()
            (home / "nats.conf").write_text(
                f"server_name: n{number}\nlisten: 127.0.0.1:{clients[number]}\n"
                f'jetstream {{ store_dir: "{home}"{", sync_interval: always" if fsync else ""} }}\n'
                f"cluster {{ name: peers, listen: 127.0.0.1:{routes[number]}, routes: ["
                + ", ".join(f"nats-route://127.0.0.1:{port}" for port in routes)
                + "] }\n"
            )
            running.enter_context(process([str(program), "-c", str(home / "nats.conf")], home))
        for port in clients:
            wait_for_port(port)
        yield ",".join(f"nats://127.0.0.1:{port}" for port in clients)


@contextmanager
def kafka(folder: Path, *, fsync: bool) -> Iterator[str]:
    """Three brokers that are controllers too. By default it leaves syncing to the kernel."""
    java = ["java", HEAP, "-cp", f"{fetching.kafka_jars()}/*"]
    clients, controllers = free_ports(NODES), free_ports(NODES)
    voters = ",".join(f"{number + 1}@127.0.0.1:{port}" for number, port in enumerate(controllers))
    with ExitStack() as running:
        for number in range(NODES):
            home = folder / f"kafka{number}"
            home.mkdir()
            properties = {
                "process.roles": "broker,controller",
                "node.id": number + 1,
                "controller.quorum.voters": voters,
                "listeners": f"PLAINTEXT://127.0.0.1:{clients[number]},CONTROLLER://127.0.0.1:{controllers[number]}",
                "controller.listener.names": "CONTROLLER",
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
                "log.dirs": home / "log",
                "default.replication.factor": NODES,
                "offsets.topic.replication.factor": NODES,
                "offsets.topic.num.partitions": 1,
                "min.insync.replicas": 2,
                "group.initial.rebalance.delay.ms": 0,
                **({"log.flush.interval.messages": 1} if fsync else {}),
            }
            file = home / "server.properties"
            file.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
            format_ = ["kafka.tools.StorageTool", "format", "-t", "MkU3OEVBNTcwNTJENDM2Qk", "-c", str(file)]
            subprocess.run([*java, *format_], check=True, capture_output=True, timeout=START_S)
            running.enter_context(process([*java, "kafka.Kafka", str(file)], home))
        for port in clients:
            wait_for_port(port)
        yield ",".join(f"127.0.0.1:{port}" for port in clients)


@contextmanager
def pulsar(folder: Path, *, fsync: bool) -> Iterator[str]:
    """A broker, ZooKeeper and three bookies in one process, as its own command starts them. By default it syncs."""
    home = fetching.pulsar()
    broker, web, zookeeper, *bookies = free_ports(3 + NODES)
    settings = {
        "brokerServicePort": broker,
        "webServicePort": web,
        "bindAddress": "127.0.0.1",
        "advertisedAddress": "127.0.0.1",
        "managedLedgerDefaultEnsembleSize": NODES,
        "managedLedgerDefaultWriteQuorum": NODES,
        "managedLedgerDefaultAckQuorum": 2,
        "journalSyncData": str(fsync).lower(),
    }
    lines = (home / "conf/standalone.conf").read_text().splitlines()
    kept = [line for line in lines if line.partition("=")[0].strip() not in settings]
    file = folder / "standalone.conf"
    file.write_text("\n".join([*kept, *(f"{name}={value}" for name, value in settings.items())]) + "\n")
    command = [
        str(home / "bin/pulsar"), "standalone", "--config", str(file), "--no-functions-worker", "--no-stream-storage",
        "--num-bookies", str(NODES), "--bookkeeper-port", str(min(bookies)), "--zookeeper-port", str(zookeeper),
        "--zookeeper-dir", str(folder / "zookeeper"), "--bookkeeper-dir", str(folder / "bookkeeper"),
        "--advertised-address", "127.0.0.1",
    ]  # fmt: skip
    environment = {"PULSAR_STANDALONE_USE_ZOOKEEPER": "1", "PULSAR_LOG_DIR": str(folder), "PULSAR_MEM": HEAP}
    with process(command, folder, **environment):
        wait_for_port(broker)
        yield f"pulsar://127.0.0.1:{broker}"


@contextmanager
def process(command: list[str], home: Path, **environment: str) -> Iterator[None]:
    """A server in a process group of its own, which ends with the block; what it prints is in its folder."""
    with (home / "output").open("wb") as output:
        running = subprocess.Popen(
            command, cwd=home, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        try:
            yield
        finally:
            os.killpg(running.pid, signal.SIGTERM)
            try:
                running.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()


def free_ports(count: int) -> list[int]:
    with ExitStack() as open_:
        sockets = [open_.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise NotStarted(f"nothing listens within {START_S:g} s port=`{port}`") from None
            time.sleep(0.2)
