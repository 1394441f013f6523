"""Many callers of a server at once, some of them rude, while it is killed and comes back."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from calls import WAIT, alike, texts
from model_server import HOST, ModelServer

from langchain_bge_dense import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

PASSAGES = texts(500, seed=7)
BODY = 100_000  # bytes that the server takes
BAD = [
    (["free", None], TypeError, "Text 1 is NoneType, not str"),
    (["free", "equal", "a\ud800"], ValueError, "Text 2 has a lone surrogate"),
    (["free", "and " * 600], ValueError, "Text 1 has "),
]


class Callers:
    """What callers do, each time in one of several ways, and what came of it.

    Args:
        server: Asked by all.
        embeddings: One of several clients of it.
        vectors: What is right, by passage.
    """

    def __init__(
        self, server: ModelServer, embeddings: BGEM3Embeddings, vectors: dict[str, list[float]]
    ) -> None:
        self.server, self.embeddings, self.vectors = server, embeddings, vectors
        self.tried: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def call(self, chooser: random.Random) -> None:
        ways: list[Callable[[random.Random], Awaitable[bool | None]]] = [
            *[self.query] * 4,
            *[self.documents] * 2,
            self.cancelled,
            self.bad_text,
            self.too_large,
            self.slow_reader,
        ]
        way = chooser.choice(ways)
        try:
            right = await asyncio.wait_for(way(chooser), 6 * WAIT)
        except Exception as error:  # noqa: BLE001 - each is a wrong answer
            right = False
            self.wrong.append(f"{way.__name__}: {error!r}")
        if right is None:
            return
        self.tried[way.__name__] += 1
        if not right:
            self.wrong.append(way.__name__)

    async def query(self, chooser: random.Random) -> bool:
        text = chooser.choice(PASSAGES)
        return alike([await self.embeddings.aembed_query(text)], [self.vectors[text]])

    async def documents(self, chooser: random.Random) -> bool:
        passages = chooser.choices(PASSAGES, k=chooser.randint(1, 30))
        found = await self.embeddings.aembed_documents(passages)
        return alike(found, [self.vectors[text] for text in passages])

    async def cancelled(self, chooser: random.Random) -> bool:
        call = asyncio.create_task(self.embeddings.aembed_documents(PASSAGES))
        await asyncio.sleep(chooser.uniform(0, 0.1))
        call.cancel()
        await asyncio.wait({call})
        return call.cancelled() or alike(call.result(), list(self.vectors.values()))

    async def bad_text(self, chooser: random.Random) -> bool:
        passages, error, words = chooser.choice(BAD)
        try:
            await self.embeddings.aembed_documents(passages)
        except error as raised:
            return str(raised).startswith(words)
        return False

    async def too_large(self, chooser: random.Random) -> bool | None:
        asked = {"texts": ["a" * 2 * BODY]}
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=WAIT) as http:
                reply = await http.post(f"{self.server.base_url}/encode", json=asked)
        except httpx.TransportError:
            return None  # it was killed, or had hung up before all was sent
        return reply.status_code == 413

    async def slow_reader(self, chooser: random.Random) -> bool | None:
        """Read a large reply in small bits, and leave or not before its end."""
        passages = chooser.choices(PASSAGES, k=100)
        body = json.dumps({"texts": passages}).encode()
        head = f"POST /encode HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        reply = b""
        try:
            reader, writer = await asyncio.open_connection(HOST, self.server.port, limit=1_024)
            writer.write(head.encode() + body)
            while len(reply) < 20_000 and (part := await reader.read(1_024)):
                reply += part
                await asyncio.sleep(0.05)
            if chooser.random() < 0.5:
                writer.close()
                return reply == b"" or reply.startswith(b"HTTP/1.1 200 ")
            reply += await reader.read(-1)
            writer.close()
        except OSError:
            return None
        try:
            dense = json.loads(reply.partition(b"\r\n\r\n")[2])["dense"]
        except ValueError:
            return None  # cut short when it was killed
        return alike(dense, [self.vectors[text] for text in passages])


@pytest.mark.parametrize(
    ("callers", "seconds"),
    [pytest.param(30, 6, id="some"), pytest.param(200, 60, id="many", marks=pytest.mark.soak)],
)
async def test_callers_of_a_server_that_is_killed(  # noqa: PLR0917
    tiny: BGEM3Embeddings,
    tiny_checkpoint: Path,
    tmp_path: Path,
    callers: int,
    seconds: float,
    record_property: Any,
) -> None:
    vectors = dict(zip(PASSAGES, tiny.embed_documents(PASSAGES), strict=True))
    options = ["--model", str(tiny_checkpoint), "--dtype", "float32", "--device", "cpu"]
    with ModelServer(tmp_path, *options, "--max-body", str(BODY)) as server:
        fields = {"base_url": server.base_url, "on_truncate": "raise"}
        # The server takes no key and asks for none: each makes connections of its own.
        clients = [BGEM3Embeddings(**fields, api_key=f"client {n}") for n in range(4)]
        groups = [Callers(server, client, vectors) for client in clients]
        end = time.monotonic() + seconds

        async def caller(number: int) -> None:
            chooser = random.Random(number)
            while time.monotonic() < end:
                await groups[number % len(groups)].call(chooser)

        tasks = [asyncio.create_task(caller(number)) for number in range(callers)]
        await asyncio.sleep(seconds / 2)
        server.kill()
        await asyncio.to_thread(server.start)
        _, hanging = await asyncio.wait(tasks, timeout=seconds + 6 * WAIT)
        assert not hanging
        assert [wrong for group in groups for wrong in group.wrong] == []
        tried = sum((group.tried for group in groups), Counter())
        assert tried.keys() >= {"query", "documents", "cancelled", "bad_text", "too_large"}
        assert len(await clients[0].aembed_query("free")) == 32  # it goes on
        assert "Traceback" not in server.log.read_text()
        for client in clients:
            client.close()
    told = ", ".join(f"{count:,} {name}" for name, count in sorted(tried.items()))
    record_property("tried", f"{callers} callers for {seconds:.0f} s ({told}), 1 kill")
