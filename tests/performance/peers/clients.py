"""The clients of other projects, as their users use them. Runs in an environment of its own, without magnetar.

    python clients.py PEER publish|latency|consume --servers S --size BYTES --seconds N

publish   the client's fastest way; ends when all is confirmed
latency   one message after the other, each confirmed
consume   what was published to the topic before, by one consumer that acknowledges in groups of a thousand

Prints one JSON object: messages, elapsed_s, and for latency p50_ms and p99_ms.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import time
from typing import Any

TOPIC = "bench"
IN_FLIGHT = 4000
PULL = 1000
CONSUMED = 500_000
"""Messages that are consumed at most."""
READY_S = 60.0
QUIET_S = 10.0
"""After so long without a message there is none left."""

Figures = dict[str, float]


def summary(latencies_s: list[float], elapsed_s: float) -> Figures:
    ordered = sorted(latencies_s)
    at = {name: ordered[int(len(ordered) * share)] * 1e3 for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99))}
    return {"messages": len(ordered), "elapsed_s": elapsed_s, **at}


async def until_ready(attempt: Any) -> Any:
    deadline = time.monotonic() + READY_S
    while True:
        try:
            return await attempt()
        except Exception:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.5)


# --- NATS JetStream ---


class Nats:
    async def _open(self, servers: str) -> Any:
        import nats

        client = await until_ready(lambda: nats.connect(servers.split(",")))
        return client, client.jetstream(publish_async_max_pending=IN_FLIGHT)

    async def prepare(self, servers: str) -> None:
        from nats.js.api import StorageType

        client, stream = await self._open(servers)
        await until_ready(
            lambda: stream.add_stream(name=TOPIC, subjects=[TOPIC], num_replicas=3, storage=StorageType.FILE)
        )
        await client.close()

    async def publish(self, servers: str, payload: bytes, seconds: float) -> Figures:
        client, stream = await self._open(servers)
        begin, messages = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            for _ in range(100):
                await stream.publish_async(TOPIC, payload, wait_stall=READY_S)
            messages += 100
        await stream.publish_async_completed()
        elapsed = time.perf_counter() - begin
        await client.close()
        return {"messages": messages, "elapsed_s": elapsed}

    async def latency(self, servers: str, payload: bytes, seconds: float) -> Figures:
        client, stream = await self._open(servers)
        begin, latencies = time.perf_counter(), []
        while (sent := time.perf_counter()) - begin < seconds:
            await stream.publish(TOPIC, payload)
            latencies.append(time.perf_counter() - sent)
        await client.close()
        return summary(latencies, time.perf_counter() - begin)

    async def consume(self, servers: str, seconds: float) -> Figures:
        from nats.js.api import AckPolicy, ConsumerConfig

        client, stream = await self._open(servers)
        subscription = await stream.pull_subscribe(TOPIC, "reader", config=ConsumerConfig(ack_policy=AckPolicy.ALL))
        stored = (await stream.stream_info(TOPIC)).state.messages
        begin, messages = time.perf_counter(), 0
        while messages < min(stored, CONSUMED) and time.perf_counter() - begin < seconds:
            got = await subscription.fetch(PULL, timeout=QUIET_S)
            await got[-1].ack()
            messages += len(got)
        elapsed = time.perf_counter() - begin
        await client.close()
        return {"messages": messages, "elapsed_s": elapsed}


# --- Kafka ---


class Confluent:
    async def prepare(self, servers: str) -> None:
        from confluent_kafka.admin import AdminClient, NewTopic

        async def create() -> None:
            admin = AdminClient({"bootstrap.servers": servers})
            if len(admin.list_topics(timeout=5).brokers) < 3:
                raise RuntimeError("not all brokers are there")
            [created] = admin.create_topics([NewTopic(TOPIC, 1, 3)]).values()
            created.result()

        await until_ready(create)

    def _producer(self, servers: str, **settings: object) -> Any:
        from confluent_kafka import Producer

        return Producer({"bootstrap.servers": servers, "acks": "all", "enable.idempotence": True, **settings})

    async def publish(self, servers: str, payload: bytes, seconds: float) -> Figures:
        producer = self._producer(servers)
        begin, messages = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            for _ in range(1000):
                try:
                    producer.produce(TOPIC, payload)
                except BufferError:
                    producer.poll(0.1)
                    continue
                messages += 1
            producer.poll(0)
        left = producer.flush(READY_S)
        return {"messages": messages - left, "elapsed_s": time.perf_counter() - begin}

    async def latency(self, servers: str, payload: bytes, seconds: float) -> Figures:
        producer = self._producer(servers, **{"linger.ms": 0})
        begin, latencies = time.perf_counter(), []
        while (sent := time.perf_counter()) - begin < seconds:
            producer.produce(TOPIC, payload)
            producer.flush()
            latencies.append(time.perf_counter() - sent)
        return summary(latencies, time.perf_counter() - begin)

    async def consume(self, servers: str, seconds: float) -> Figures:
        from confluent_kafka import Consumer, TopicPartition

        consumer = Consumer({"bootstrap.servers": servers, "group.id": "reader", "auto.offset.reset": "earliest"})
        _, stored = consumer.get_watermark_offsets(TopicPartition(TOPIC, 0))
        consumer.subscribe([TOPIC])
        got = consumer.consume(1, READY_S)  # Joining the group is not what is measured.
        begin, messages = time.perf_counter(), 0
        while messages < min(stored, CONSUMED) - 1 and time.perf_counter() - begin < seconds and got:
            got = consumer.consume(PULL, QUIET_S)
            messages += len([message.value() for message in got])
        elapsed = time.perf_counter() - begin
        consumer.close()
        return {"messages": messages, "elapsed_s": elapsed}


class Aiokafka(Confluent):
    async def publish(self, servers: str, payload: bytes, seconds: float) -> Figures:
        from aiokafka import AIOKafkaProducer

        async with AIOKafkaProducer(bootstrap_servers=servers, acks="all", max_batch_size=256 << 10) as producer:
            begin, messages, last = time.perf_counter(), 0, None
            while time.perf_counter() - begin < seconds:
                for _ in range(100):
                    last = await producer.send(TOPIC, payload)
                messages += 100
            await producer.flush()
            assert last is not None
            await last
            return {"messages": messages, "elapsed_s": time.perf_counter() - begin}

    async def latency(self, servers: str, payload: bytes, seconds: float) -> Figures:
        from aiokafka import AIOKafkaProducer

        async with AIOKafkaProducer(bootstrap_servers=servers, acks="all") as producer:
            begin, latencies = time.perf_counter(), []
            while (sent := time.perf_counter()) - begin < seconds:
                await producer.send_and_wait(TOPIC, payload)
                latencies.append(time.perf_counter() - sent)
            return summary(latencies, time.perf_counter() - begin)

    async def consume(self, servers: str, seconds: float) -> Figures:
        from aiokafka import AIOKafkaConsumer, TopicPartition

        async with AIOKafkaConsumer(
            TOPIC, bootstrap_servers=servers, group_id="reader", auto_offset_reset="earliest"
        ) as consumer:
            place = TopicPartition(TOPIC, 0)
            stored = (await consumer.end_offsets([place]))[place]
            begin, messages = time.perf_counter(), 0
            while messages < min(stored, CONSUMED) and time.perf_counter() - begin < seconds:
                got = await consumer.getmany(timeout_ms=int(QUIET_S * 1e3), max_records=PULL)
                messages += sum(len(part) for part in got.values())
            return {"messages": messages, "elapsed_s": time.perf_counter() - begin}


# --- Pulsar ---


class Pulsar:
    def _client(self, servers: str) -> Any:
        import pulsar

        return pulsar.Client(servers, logger=pulsar.FileLogger(pulsar.LoggerLevel.Error, os.devnull))

    async def prepare(self, servers: str) -> None:
        async def create() -> None:
            client = self._client(servers)
            try:
                # Without a subscription Pulsar deletes what it stored.
                client.subscribe(TOPIC, "reader", initial_position=self._earliest()).close()
            finally:
                client.close()

        await until_ready(create)

    def _earliest(self) -> Any:
        import pulsar

        return pulsar.InitialPosition.Earliest

    async def publish(self, servers: str, payload: bytes, seconds: float) -> Figures:
        import pulsar

        client = self._client(servers)
        producer = client.create_producer(
            TOPIC, batching_enabled=True, batching_max_publish_delay_ms=1, block_if_queue_full=True,
            max_pending_messages=IN_FLIGHT,
        )  # fmt: skip
        stored = itertools.count()

        def answered(result: object, _id: object) -> None:
            if result == pulsar.Result.Ok:
                next(stored)

        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            for _ in range(100):
                producer.send_async(payload, answered)
        producer.flush()
        elapsed = time.perf_counter() - begin
        client.close()
        return {"messages": next(stored), "elapsed_s": elapsed}

    async def latency(self, servers: str, payload: bytes, seconds: float) -> Figures:
        client = self._client(servers)
        producer = client.create_producer(TOPIC, batching_enabled=False)
        begin, latencies = time.perf_counter(), []
        while (sent := time.perf_counter()) - begin < seconds:
            producer.send(payload)
            latencies.append(time.perf_counter() - sent)
        client.close()
        return summary(latencies, time.perf_counter() - begin)

    async def consume(self, servers: str, seconds: float) -> Figures:
        import pulsar

        client = self._client(servers)
        consumer = client.subscribe(TOPIC, "reader", initial_position=self._earliest())
        begin = last = time.perf_counter()
        messages = 0
        while messages < CONSUMED and time.perf_counter() - begin < seconds:
            try:
                message = consumer.receive(timeout_millis=int(QUIET_S * 1e3))
            except pulsar.Timeout:
                break
            message.data()
            messages, last = messages + 1, time.perf_counter()
            if messages % PULL == 0:
                consumer.acknowledge_cumulative(message)
        client.close()
        return {"messages": messages, "elapsed_s": last - begin}


PEERS = {"nats-py": Nats, "confluent-kafka": Confluent, "aiokafka": Aiokafka, "pulsar-client": Pulsar}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("workload", choices=["prepare", "publish", "latency", "consume"])
    parser.add_argument("--servers", required=True)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=5.0)
    asked = parser.parse_args()
    peer: Any = PEERS[asked.peer]()
    match asked.workload:
        case "prepare":
            await peer.prepare(asked.servers)
            return
        case "consume":
            figures = await peer.consume(asked.servers, asked.seconds)
        case workload:
            figures = await getattr(peer, workload)(asked.servers, os.urandom(asked.size), asked.seconds)
    print(json.dumps(figures))


if __name__ == "__main__":
    asyncio.run(main())
