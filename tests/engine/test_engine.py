"""One instance under threads and coroutines, and the life of the model that instances share."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest
from calls import WAIT, Gate, alike, end_as, lowest_int8_cosine, texts, threads

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._engine.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def own(tiny_checkpoint: Path) -> BGEM3Embeddings:
    """Embeddings that share their model with no fixture, for tests of its life."""
    return BGEM3Embeddings(model=tiny_checkpoint, device="cpu", dtype="float32", pooling="mean")


@pytest.fixture
def gate(tiny: BGEM3Embeddings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    encoder = tiny.engine().encoder
    gate = Gate(encoder.forward)
    monkeypatch.setattr(encoder, "forward", gate)
    yield gate
    gate.go_on.set()


LOWEST_COSINE = {"float32": 0.999999, "bfloat16": 0.999, "int8": lowest_int8_cosine()}


@pytest.fixture(params=LOWEST_COSINE)
def narrow(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> BGEM3Embeddings:
    """Embeddings of every dtype of a CPU."""
    return BGEM3Embeddings(model=tiny_checkpoint, device="cpu", dtype=request.param)


def test_sixteen_threads_get_what_one_gets(narrow: BGEM3Embeddings) -> None:
    passages = texts(160)
    alone = np.array(narrow.embed_documents(passages))
    parts = [slice(start, start + 10) for start in range(0, 160, 10)]
    with ThreadPoolExecutor(16) as pool:
        documents = list(pool.map(lambda part: narrow.embed_documents(passages[part]), parts))
        queries = list(pool.map(narrow.embed_query, passages))
    lowest = LOWEST_COSINE[narrow.dtype]
    assert (np.concatenate(documents) * alone).sum(1).min() > lowest
    assert (np.array(queries) * alone).sum(1).min() > lowest


async def test_sixty_four_coroutines_get_what_one_gets(narrow: BGEM3Embeddings) -> None:
    passages = texts(320)
    alone = np.array(narrow.embed_documents(passages))
    parts = [passages[start : start + 5] for start in range(0, 320, 5)]
    found = await asyncio.gather(*map(narrow.aembed_documents, parts))
    assert (np.concatenate(found) * alone).sum(1).min() > LOWEST_COSINE[narrow.dtype]


async def test_texts_that_run_alone_give_the_same_floats_to_the_last_bit(
    tiny: BGEM3Embeddings,
) -> None:
    one_by_one = BGEM3Embeddings(**{**tiny.model_dump(), "batch_tokens": 1})
    passages = texts(64)
    alone = one_by_one.embed_documents(passages)
    queries = asyncio.gather(*(one_by_one.aembed_query(passage) for passage in passages))
    with ThreadPoolExecutor(16) as pool:
        documents = list(pool.map(lambda text: one_by_one.embed_documents([text])[0], passages))
    assert documents == alone
    assert await queries == alone


async def test_a_thousand_queries_at_once_share_batches(tiny: BGEM3Embeddings, gate: Gate) -> None:
    queries = texts(1_000, seed=1)
    at_once = await asyncio.gather(*(tiny.aembed_query(query) for query in queries))
    assert sum(gate.batches) == 1_000
    assert len(gate.batches) < 250
    assert alike(at_once, tiny.embed_documents(queries))


async def test_calls_share_the_threads_of_the_event_loop(tiny: BGEM3Embeddings) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    await tiny.aembed_documents(["once, so that the model's own thread is there"])
    before = threading.active_count()
    calls = asyncio.gather(*(tiny.aembed_query(text) for text in texts(100)))
    await asyncio.sleep(0.01)
    assert threading.active_count() <= before + 2
    await calls


async def test_the_event_loop_goes_on_through_a_long_call(
    tiny: BGEM3Embeddings, gate: Gate
) -> None:
    """Each batch waits for the loop, which would never let it go on if the call held it up."""
    call = asyncio.create_task(tiny.aembed_documents(texts(600)))
    gate.go_on.clear()
    ticks = 0
    while not call.done():
        await asyncio.sleep(0.001)
        if gate.entered.is_set():
            ticks += 1
            gate.entered.clear()
            gate.go_on.set()
            await asyncio.sleep(0)
            gate.go_on.clear()
    gate.go_on.set()
    assert len(await call) == 600
    assert ticks > 5


async def test_a_query_overtakes_a_long_call(tiny: BGEM3Embeddings, gate: Gate) -> None:
    gate.go_on.clear()
    bulk = asyncio.create_task(tiny.aembed_documents(texts(200)))
    await asyncio.to_thread(gate.entered.wait, WAIT)
    query = asyncio.create_task(tiny.aembed_query("free and equal"))
    await asyncio.to_thread(waits_in_the_inbox, tiny)
    gate.go_on.set()
    await query
    assert not bulk.done()
    assert gate.batches[1] == 1
    assert len(await bulk) == 200


def waits_in_the_inbox(embeddings: BGEM3Embeddings) -> None:
    inbox, give_up = embeddings._engine.scheduler._inbox, time.monotonic() + WAIT
    while inbox.empty():
        assert time.monotonic() < give_up
        time.sleep(0.001)


@pytest.mark.parametrize("count", [1, 1_000])
async def test_a_cancelled_coroutine_drops_its_texts(
    tiny: BGEM3Embeddings, gate: Gate, count: int
) -> None:
    gate.go_on.clear()
    running = asyncio.create_task(tiny.aembed_query("the one that runs"))
    await asyncio.to_thread(gate.entered.wait, WAIT)
    gone = asyncio.create_task(tiny.aembed_documents(texts(count)))
    await asyncio.sleep(0.01)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    gate.go_on.set()
    await running
    await tiny.aembed_documents(["the next one"])
    assert gate.batches == [1, 1]


@pytest.fixture
def tokenizing(tiny: BGEM3Embeddings, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Holds up whoever tokenises, until the test lets it go on."""
    encoder = tiny.engine().encoder
    gate = Gate(encoder.tokenize)
    gate.go_on.clear()
    monkeypatch.setattr(encoder, "tokenize", gate)
    return gate


async def test_a_call_cancelled_while_it_is_tokenised_never_runs(
    tiny: BGEM3Embeddings, gate: Gate, tokenizing: Gate
) -> None:
    gone = asyncio.create_task(tiny.aembed_documents(texts(100)))
    await asyncio.to_thread(tokenizing.entered.wait, WAIT)  # the loop goes on meanwhile
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    tokenizing.go_on.set()
    await tiny.aembed_documents(texts(3))
    await tiny.aembed_documents(texts(3))
    assert sum(gate.batches) == 6


async def test_a_call_that_times_out_leaves_the_instance_usable(
    tiny: BGEM3Embeddings, gate: Gate
) -> None:
    gate.go_on.clear()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(tiny.aembed_documents(texts(1_000)), 0.05)
    gate.go_on.set()
    assert len(await tiny.aembed_query("free")) == 32


def test_two_event_loops_one_after_the_other(tiny: BGEM3Embeddings) -> None:
    first = asyncio.run(tiny.aembed_query("free and equal"))
    assert asyncio.run(tiny.aembed_query("free and equal")) == first


async def test_a_bad_text_of_one_coroutine_is_no_one_elses(tiny: BGEM3Embeddings) -> None:
    strict = BGEM3Embeddings(**{**tiny.model_dump(), "on_truncate": "raise", "max_length": 8})
    calls = [strict.aembed_documents(["free", text]) for text in ("equal", "and " * 50, "\ud800")]
    good, long, broken = await asyncio.gather(*calls, return_exceptions=True)
    assert np.shape(good) == (2, 32)
    assert "Text 1 has" in str(long)
    assert "surrogate" in str(broken)


def test_a_stream_that_is_left_early_drops_the_rest(tiny: BGEM3Embeddings, gate: Gate) -> None:
    stream = tiny.embed_stream(iter(texts(6_000)))
    next(stream)
    gate.go_on.clear()
    gate.entered.clear()
    assert gate.entered.wait(WAIT)
    stream.close()
    gate.go_on.set()
    ran = sum(gate.batches)
    tiny.embed_query("free")
    tiny.embed_documents(["free"])
    assert sum(gate.batches) == ran + 2


def test_instances_with_equal_settings_share_one_model_and_its_thread(
    own: BGEM3Embeddings,
) -> None:
    before = threads()
    own.embed_documents(["free", "and"])
    made = threads() - before
    twin = BGEM3Embeddings(**own.model_dump())
    twin.embed_documents(["equal", "too"])
    assert len(made) == 1
    assert threads() - before == made
    own.close()
    assert len(twin.embed_query("the twin still has it")) == 32
    assert threads() - before == made
    twin.close()
    assert threads() == before


def test_a_closed_instance_loads_its_model_again(own: BGEM3Embeddings) -> None:
    vector = own.embed_query("free")
    own.close()
    own.close()
    assert own.embed_query("free") == vector
    own.close()


def test_the_end_of_an_instance_ends_its_thread(own: BGEM3Embeddings) -> None:
    before = threads()
    # Nobody but this instance and the cycle that it is in holds the model.
    cycle: list[object] = [BGEM3Embeddings(**own.model_dump())]
    cycle.append(cycle)
    cycle[0].embed_documents(["free", "and"])
    assert len(threads() - before) == 1
    del cycle
    gc.collect()
    assert threads() == before


def test_closing_lets_a_running_call_end(own: BGEM3Embeddings) -> None:
    before = threads()
    with held(own) as gate, ThreadPoolExecutor(1) as pool:
        call = pool.submit(own.embed_documents, texts(300))
        assert gate.entered.wait(WAIT)
        own.close()
        gate.go_on.set()
        assert len(call.result(WAIT)) == 300
    del gate
    assert threads() == before


async def test_closing_lets_a_running_coroutine_end(own: BGEM3Embeddings) -> None:
    before = threads()
    with held(own) as gate:
        call = asyncio.create_task(own.aembed_documents(texts(300)))
        await asyncio.to_thread(gate.entered.wait, WAIT)
        own.close()
        gate.go_on.set()
        assert len(await call) == 300
    del gate
    assert end_as(before)


@contextmanager
def held(embeddings: BGEM3Embeddings) -> Iterator[Gate]:
    encoder = embeddings.engine().encoder
    gate = Gate(encoder.forward)
    gate.go_on.clear()
    encoder.forward = gate
    yield gate
    del encoder.forward


def test_closing_while_others_embed_never_breaks_a_call(own: BGEM3Embeddings) -> None:
    """Calls find the model, wait for it or load it anew, whatever the moment."""
    expected = own.embed_query("free and equal")
    done = threading.Event()

    def close() -> None:
        while not done.wait(0.02):
            own.close()

    closing = threading.Thread(target=close)
    closing.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(own.embed_query, ["free and equal"] * 60))
    finally:
        done.set()
        closing.join()
    assert alike(found, [expected] * 60)
    own.close()


def test_a_close_at_the_worst_moment_leaves_the_call_its_model(
    own: BGEM3Embeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may close the instance between its loading and its use."""

    def closing(self: BGEM3Embeddings, name: str, value: object) -> None:
        settings(self, name, value)
        if name in ("_engine", "_session"):
            settings(self, name, None)

    settings = BGEM3Embeddings.__setattr__
    monkeypatch.setattr(BGEM3Embeddings, "__setattr__", closing)
    assert len(own.embed_query("free")) == 32
    assert own.dimension == 32
    assert own._engine is None


class TestWindows:
    """A call of many texts is cut into requests, of which its caller knows nothing."""

    LONG = "free " * 40
    TEXTS = ("a", LONG, "b", "c", "d", "e", LONG, "f", "g", LONG, "h")

    @pytest.fixture
    def cut(self, tiny: BGEM3Embeddings, monkeypatch: pytest.MonkeyPatch) -> BGEM3Embeddings:
        monkeypatch.setattr(Engine, "window", 4)
        monkeypatch.setattr(Engine, "colbert_window", 3)
        return tiny.model_copy(update={"max_length": 16})

    def test_what_was_cut_is_counted_over_all_requests(self, cut: BGEM3Embeddings) -> None:
        with pytest.warns(UserWarning, match="were cut") as seen:
            encoding = cut.encode(self.TEXTS, lexical=True, colbert=True)
        assert encoding.truncated.nonzero()[0].tolist() == [1, 6, 9]
        assert len(encoding.dense) == len(encoding.lexical) == len(encoding.colbert) == 11
        [warning] = seen
        named = re.findall(r"(\d+) \((\d+) tokens\)", str(warning.message))
        counts = encoding.token_counts.tolist()
        assert named == [(str(i), str(counts[i])) for i in (1, 6, 9)]

    def test_a_stream_warns_of_each_text_by_its_index(self, cut: BGEM3Embeddings) -> None:
        with pytest.warns(UserWarning, match="were cut") as seen:
            vectors = list(cut.embed_stream(iter(self.TEXTS)))
        assert len(vectors) == 11
        messages = [str(warning.message) for warning in seen]
        assert [re.findall(r"(\d+) \(", message) for message in messages] == [["1"], ["6"], ["9"]]

    async def test_a_warning_of_an_async_call_points_at_its_caller(
        self, cut: BGEM3Embeddings
    ) -> None:
        with pytest.warns(UserWarning, match=r"cut: 1 .*, 6 .*, 9 ") as seen:
            await cut.aembed_documents(list(self.TEXTS))
        assert [warning.filename for warning in seen] == [__file__]

    @pytest.mark.parametrize(
        ("bad", "error", "words"),
        [
            (LONG, ValueError, r"Text 6 has \d+ tokens"),
            (None, TypeError, "Text 6 is NoneType"),
            ("\ud800", ValueError, "Text 6 has a lone surrogate"),
        ],
    )
    async def test_errors_name_the_callers_index(
        self, cut: BGEM3Embeddings, bad: object, error: type[Exception], words: str
    ) -> None:
        strict = cut.model_copy(update={"on_truncate": "raise"})
        passages = ["a", "b", "c", "d", "e", "f", bad, "g"]
        for call in (strict.embed_documents, strict.encode, lambda p: list(strict.embed_stream(p))):
            with pytest.raises(error, match=words):
                call(passages)
        with pytest.raises(error, match=words):
            await strict.aembed_documents(passages)

    def test_results_are_those_of_one_request(
        self, tiny: BGEM3Embeddings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passages = texts(30)
        whole = tiny.encode(passages, lexical=True, colbert=True)
        monkeypatch.setattr(Engine, "colbert_window", 7)
        parts = tiny.encode(passages, lexical=True, colbert=True)
        np.testing.assert_allclose(parts.dense, whole.dense, atol=1e-6)
        assert [set(weights) for weights in parts.lexical] == [set(w) for w in whole.lexical]
        assert [len(vectors) for vectors in parts.colbert] == [len(v) for v in whole.colbert]
        assert parts.token_counts.tolist() == whole.token_counts.tolist()
