"""The floor under workload N: bare parts that move the same bytes, and nothing else.

Embedded: aiohttp processes GET the model and PUT as many bytes to a Starlette app that writes and syncs them.
Kafka: idempotent producers with acks=all send 900 KB records, one consumer reads them; the GET is the same.
A round begins when the last body of the one before is in.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_PIECE = 900_000
_TOPIC = "floor"


class _Round:
    """Counts the bodies of a round; the next one opens with the last."""

    def __init__(self, nodes: int) -> None:
        self.nodes, self.count, self.number, self.began = nodes, 0, 0, 0.0
        self.opened = asyncio.Condition()
        self.seconds: list[float] = []

    async def body(self) -> None:
        self.count += 1
        if self.count % self.nodes == 0:
            await self.open()

    async def open(self) -> None:
        async with self.opened:
            now = time.perf_counter()
            if self.number:
                print(now - self.began, flush=True)
            self.number, self.began = self.number + 1, now
            self.opened.notify_all()


def server(nodes: str, size: str, rounds: str, directory: str, kafka: str = "") -> None:
    """Serve the floor: print the address, then each round's seconds."""
    asyncio.run(_serve(int(nodes), int(size), int(rounds), Path(directory), kafka))


async def _serve(nodes: int, size: int, rounds: int, directory: Path, kafka: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    model = os.urandom(size)
    state, here = _Round(nodes), 0

    async def get(request: Request) -> Response:
        nonlocal here
        number = int(request.path_params["round"])
        here += number == 1
        if here == nodes and state.number == 0:
            await state.open()
        async with state.opened:
            await state.opened.wait_for(lambda: state.number >= number)
        return Response(model)

    async def put(request: Request) -> Response:
        with (directory / f"{state.number}-{request.path_params['node']}").open("wb", buffering=0) as file:
            async for chunk in request.stream():
                file.write(chunk)
            await asyncio.to_thread(os.fsync, file.fileno())
        await state.body()
        return Response()

    app = Starlette(routes=[Route("/{round:int}", get), Route("/{round:int}/{node}", put, methods=["PUT"])])
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(app, http="httptools", lifespan="off", log_config=None))
    serving = asyncio.create_task(web.serve(sockets=[listener]))
    consuming = asyncio.create_task(_consume(kafka, state, size)) if kafka else None
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    while state.number <= rounds and not (consuming and consuming.done()):
        await asyncio.sleep(0.05)
    if consuming:
        consuming.cancel()
    web.should_exit = True
    await serving


async def _consume(kafka: str, state: _Round, size: int) -> None:
    """Read the bodies; for the least overhead one message at a time, as soon as it is there."""
    from confluent_kafka import Consumer, TopicPartition
    from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]

    admin = AdminClient({"bootstrap.servers": kafka})
    made = admin.create_topics([NewTopic(_TOPIC, 1, config={"flush.messages": "1"})])
    await asyncio.to_thread(made[_TOPIC].result)
    consumer = Consumer({"bootstrap.servers": kafka, "group.id": "floor", "enable.auto.commit": False, "fetch.wait.max.ms": 5})
    consumer.assign([TopicPartition(_TOPIC, 0, 0)])
    came: dict[Any, int] = {}
    while True:
        if message := await asyncio.to_thread(consumer.poll, 1.0):
            key, value = message.key(), message.value()
            came[key] = came.get(key, 0) + len(value or b"")
            if came[key] == size:
                came[key] = 0
                await state.body()


def node(url: str, number: str, nodes: str, size: str, rounds: str, directory: str, kafka: str = "") -> None:
    """Be one of the floor's nodes."""
    del nodes, directory
    asyncio.run(_take_part(url, number, os.urandom(int(size)), int(rounds), kafka))


async def _take_part(url: str, number: str, body: bytes, rounds: int, kafka: str) -> None:
    producer: Any = None
    if kafka:
        from confluent_kafka import Producer

        producer = Producer({"bootstrap.servers": kafka, "enable.idempotence": True, "acks": "all", "linger.ms": 0})
    async with aiohttp.ClientSession() as session:
        for round_ in range(1, rounds + 1):
            async with session.get(f"{url}/{round_}") as response:
                await response.read()
            if kafka:
                for lo in range(0, len(body), _PIECE):
                    producer.produce(_TOPIC, body[lo : lo + _PIECE], number)
                await asyncio.to_thread(producer.flush)
            else:
                async with session.put(f"{url}/{round_}/{number}", data=memoryview(body)) as response:
                    await response.read()


if __name__ == "__main__":
    (server if sys.argv[1] == "server" else node)(*sys.argv[2:])
