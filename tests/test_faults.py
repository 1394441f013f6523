"""Faults that take minutes to try: see `faults.py` for the whole table."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from calls import alike, texts, threads
from chroma_server import ChromaServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from indexing_process import BATCH
from langchain_core.documents import Document
from test_recovery import contents
from tiny_m3 import build

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.chroma import index_documents, open_chroma

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.soak

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

KILLS = 20
DOCUMENTS = 3_000  # Chroma rewrites its index at each thousand
LATEST = 0.8  # seconds after its first document at which a process is killed

CALLERS = 200
WARM_UP, SECONDS = 5.0, 60.0
GROWTH = 1.05  # of memory, from the first third to the last


def indexing(folder: Path, count: int = DOCUMENTS) -> subprocess.Popen[str]:
    place = json.dumps({"persist_directory": str(folder)})
    return subprocess.Popen(
        [sys.executable, str(HERE / "indexing_process.py"), place, str(count)],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def embedded(output: str) -> int:
    """How many texts a process began to embed."""
    return sum(int(line[7:]) for line in output.splitlines() if line.startswith("embeds "))


def test_killed_at_twenty_random_moments(tmp_path, record_property):
    process = indexing(tmp_path / "undisturbed")
    process.communicate(timeout=300)
    undisturbed = contents(tmp_path / "undisturbed")
    moments = random.Random(5)
    kills = rounds = begun = here = 0
    folder = tmp_path / "killed"
    while kills < KILLS or process.returncode != 0:
        process = indexing(folder)
        if kills < KILLS and process.stdout.readline():
            time.sleep(moments.uniform(0, LATEST))
            process.kill()
        begun += embedded(process.communicate(timeout=300)[0])
        if process.returncode:
            kills, here = kills + 1, here + 1
            continue
        # One batch of each killed process may have been embedded and not stored.
        assert DOCUMENTS <= begun <= DOCUMENTS + here * BATCH
        assert contents(folder) == undisturbed
        rounds, begun, here = rounds + 1, 0, 0
        folder = tmp_path / f"killed-{rounds}"
    record_property("tried", f"{kills} kills on the way to {rounds} x {DOCUMENTS:,} documents")


def unshare() -> list[str]:
    """A command that gives a process mounts of its own, where this user may have such."""
    command = ["unshare", "--map-root-user", "--mount"]
    probe = [*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if (
        not shutil.which("unshare")
        or subprocess.run(probe, capture_output=True, check=False).returncode
    ):
        pytest.skip("this user may mount no file system")
    return command


def test_disk_full(tmp_path, record_property):
    count, copy = 3_000, tmp_path / "copy"
    (tmp_path / "mounted").mkdir()
    command = [*unshare(), "env", f"PYTHONPATH={ENVIRONMENT['PYTHONPATH']}", sys.executable]
    script = [HERE / "full_disk_process.py", tmp_path / "mounted", count, copy]
    ended = subprocess.run(
        [*command, *map(str, script)], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout)
    *full, last = seen["attempts"]
    assert len(full) > 2
    for line in full:
        assert line.startswith(f"OSError: Could not read or write '{tmp_path / 'mounted'}'")
        assert "Make room" in line
    stored = list(map(int, seen["stored"]))
    assert stored == sorted(stored)
    assert stored[-1] > 0
    assert last.startswith("IndexResult")
    indexing(tmp_path / "undisturbed", count).communicate(timeout=300)
    assert contents(copy) == contents(tmp_path / "undisturbed")
    record_property("tried", f"full {len(full)} times on the way to {count:,} documents")


class Callers:
    """Two hundred callers of one instance, each with its own mix of good and bad calls."""

    def __init__(self, embeddings: BGEM3Embeddings) -> None:
        self.embeddings = embeddings
        self.pool = texts(300, seed=3)
        self.expected = np.array(embeddings.embed_documents(self.pool))
        self.until = time.monotonic() + WARM_UP + SECONDS
        self.good = self.cancelled = self.bad = 0

    def going(self) -> bool:
        return time.monotonic() < self.until

    async def all(self) -> None:
        await asyncio.gather(*(self.one(random.Random(number)) for number in range(CALLERS)))

    async def one(self, chance: random.Random) -> None:
        while self.going():
            picked = [chance.randrange(len(self.pool)) for _ in range(chance.randint(1, 12))]
            kind = chance.random()
            if kind < 0.2:
                await self.cancel(picked, chance.uniform(0, 0.3))
            elif kind < 0.3:
                await self.refuse(picked, chance.choice([None, 7, "lone \ud800"]))
            else:
                await self.check(picked)

    async def check(self, picked: list[int]) -> None:
        if len(picked) == 1:
            found = [await self.embeddings.aembed_query(self.pool[picked[0]])]
        else:
            found = await self.embeddings.aembed_documents([self.pool[n] for n in picked])
        assert alike(found, self.expected[picked])
        self.good += 1

    async def cancel(self, picked: list[int], after: float) -> None:
        call = asyncio.create_task(self.check(picked))
        await asyncio.sleep(after)
        self.cancelled += call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert call.cancelled() or call.exception() is None

    async def refuse(self, picked: list[int], bad: object) -> None:
        with pytest.raises((TypeError, ValueError), match=f"Text {len(picked)} "):
            await self.embeddings.aembed_documents([*(self.pool[n] for n in picked), bad])
        self.bad += 1

    def bulk(self) -> int:
        """Long calls, of which each is checked, until the time is over."""
        calls = 0
        while self.going():
            assert alike(self.embeddings.embed_documents(self.pool), self.expected)
            calls += 1
        return calls

    def index(self, server: ChromaServer) -> int:
        """Documents into a server, whose memory is not this process's."""
        store = open_chroma(self.embeddings, host=server.host, port=server.port)

        def documents() -> Iterator[Document]:
            number = 0
            while self.going():
                yield Document(self.pool[number % len(self.pool)], metadata={"number": number})
                number += 1

        done = index_documents(store, documents())
        assert done.skipped == 0
        assert store._collection.count() == done.added
        return done.added


class Memory(threading.Thread):
    """Samples the memory of this process, once it has grown to what many callers need."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[int] = []
        self._stopped = threading.Event()

    def run(self) -> None:
        self._stopped.wait(WARM_UP)
        while not self._stopped.wait(0.2):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append(pages)

    def growth(self) -> float:
        """Mean of the last third over that of the first."""
        self._stopped.set()
        self.join()
        third = len(self.samples) // 3
        return float(np.mean(self.samples[-third:]) / np.mean(self.samples[:third]))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc")
def test_two_hundred_callers(tiny_checkpoint, tmp_path, record_property):
    before = threads()
    own = BGEM3Embeddings(model=tiny_checkpoint, device="cpu", dtype="float32", pooling="cls")
    with ChromaServer(tmp_path / "server") as server, ThreadPoolExecutor(2) as pool:
        callers, memory = Callers(own), Memory()
        memory.start()
        bulk = pool.submit(callers.bulk)
        indexed = pool.submit(callers.index, server)
        asyncio.run(callers.all())
        growth = memory.growth()
        calls, documents = bulk.result(), indexed.result()
    assert min(callers.good, callers.cancelled, callers.bad, calls, documents) > 0
    assert growth < GROWTH
    own.close()
    assert threads() == before
    record_property(
        "tried",
        f"{CALLERS} callers for {WARM_UP + SECONDS:.0f} s: {callers.good:,} good calls, "
        f"{callers.cancelled:,} cancelled, {callers.bad:,} bad, {documents:,} documents indexed; "
        f"memory grew by {growth - 1:.1%}",
    )


MANY_SIZES = """
import random, sys
from langchain_bge_dense import BGEM3Embeddings

def resident():
    pages = open("/proc/self/statm").read().split()[1]
    return int(pages) * 4096 / 2**20

embeddings = BGEM3Embeddings(model=sys.argv[1], device="cpu", dtype=sys.argv[2])

def run(tokens):
    words = ["a"] * (tokens - 2)
    embeddings.encode([" ".join(words)], lexical=True, colbert=True)

for size in (1_000, 512, 300):
    run(size)
before = resident()
for size in random.Random(1).sample(range(8, 1_000), 240):
    run(size)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_memory_of_many_sizes(tmp_path, record_property, dtype):
    """One layer is enough: what is kept of a size is the same for all of them."""
    folder = build(
        tmp_path / "wide", layers=1, hidden=1_024, heads=16, intermediate=4_096, positions=1_026
    )
    command = [sys.executable, "-c", MANY_SIZES, str(folder), dtype]
    run = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    assert float(run.stdout) < 150  # without limits 776 to 1,051, and growing
    record_property("tried", f"{dtype}: 240 sizes took {float(run.stdout):.0f} MiB")


LONGEST, MOST = 20_000, 500
ANY = st.text(st.characters(), min_size=1, max_size=30)  # lone surrogates too
OTHER = st.sampled_from([None, 3, 0.5, b"bytes", ["list"]])


@st.composite
def lists(draw: st.DrawFn) -> list[object]:
    """Up to 500 items of up to 20,000 characters, few of both: 100,000 characters in all."""
    count = draw(st.integers(0, MOST))
    longest = min(LONGEST, 100_000 // max(count, 1))
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=10))
    seeds = draw(st.lists(ANY, min_size=1, max_size=10))
    items: list[object] = [
        (seed * (length // len(seed) + 1))[:length]
        for number in range(count)
        for seed, length in [(seeds[number % len(seeds)], lengths[number % len(lengths)])]
    ]
    for place in draw(st.lists(st.integers(0, MOST), max_size=2)):
        items[place:place] = [draw(OTHER)] if draw(st.integers(0, 3)) == 0 else []
    return items


def refused(item: object) -> type[Exception] | None:
    if not isinstance(item, str):
        return TypeError
    return ValueError if any("\ud800" <= char <= "\udfff" for char in item) else None


def test_arbitrary_unicode(tiny_checkpoint, record_property):
    embeddings = BGEM3Embeddings(
        model=tiny_checkpoint, device="cpu", dtype="float32", on_truncate="ignore"
    )
    tried = {"lists": 0, "texts": 0, "refused": 0}

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(lists())
    def holds(items: list[object]) -> None:
        tried["lists"] += 1
        tried["texts"] += len(items)
        bad = next((n for n, item in enumerate(items) if refused(item)), None)
        if bad is not None:
            tried["refused"] += 1
            with pytest.raises(refused(items[bad]), match=f"^Text {bad} "):
                embeddings.embed_documents(items)
            return
        encoding = embeddings.encode(items, lexical=True)
        assert encoding.dense.shape == (len(items), embeddings.dimension)
        np.testing.assert_allclose(np.linalg.norm(encoding.dense, axis=1), 1, atol=1e-5)
        assert len(encoding.lexical) == len(encoding.truncated) == len(items)
        for place in {0, len(items) // 2, len(items) - 1} if items else ():
            alone = embeddings.embed_documents([items[place]])[0]
            assert alike([encoding.dense[place]], [alone])
            assert encoding.token_counts[place] == embeddings.count_tokens(items[place]) + 2

    holds()
    embeddings.close()
    record_property(
        "tried",
        f"{tried['lists']} lists, {tried['texts']:,} texts of up to {LONGEST:,} characters, "
        f"{tried['refused']} lists with a bad item",
    )
