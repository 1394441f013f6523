"""Forks, interrupts and exits, with the model at work.

Run as a script, this file loads a model and forks a child for each scenario below, which runs it
and leaves as any Python program does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from langchain_bge_dense import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from langchain_bge_dense._engine.encoder import Encoder

LIMIT = 60  # seconds; only a scenario that hangs takes so long
TEXT = "all human beings are born free and equal"
FEW = [TEXT[: 3 + 5 * n] for n in range(8)] * 8
MANY = [f"{TEXT} " * 20] * 100_000  # minutes, even on the tiny checkpoint

SCENARIOS: dict[str, Callable[[BGEM3Embeddings], None]] = {}


def scenario(run: Callable[[BGEM3Embeddings], None]) -> Callable[[BGEM3Embeddings], None]:
    SCENARIOS[run.__name__] = run
    return run


@scenario
def exit_while_a_thread_waits_for_its_vectors(embeddings: BGEM3Embeddings) -> None:
    running = watch(embeddings._engine.encoder)
    threading.Thread(target=embeddings.embed_documents, args=[MANY], daemon=True).start()
    running.wait()


@scenario
def exit_in_the_middle_of_a_stream(embeddings: BGEM3Embeddings) -> None:
    global stream  # noqa: PLW0603 - is still there when modules are torn down
    stream = embeddings.embed_stream(iter([TEXT[:9]] * 4_200))
    next(stream)


@scenario
def exit_of_an_event_loop_with_a_call_under_way(embeddings: BGEM3Embeddings) -> None:
    async def main() -> None:
        running = watch(embeddings._engine.encoder)
        main.call = asyncio.create_task(embeddings.aembed_documents(MANY[:1_000]))
        await asyncio.to_thread(running.wait)

    asyncio.run(main())


@scenario
def exit_right_after_a_cancelled_call(embeddings: BGEM3Embeddings) -> None:
    async def main() -> None:
        call = asyncio.create_task(embeddings.aembed_documents(MANY[:1_000]))
        await asyncio.sleep(0.01)
        call.cancel()

    asyncio.run(main())


@scenario
def sys_exit_in_a_thread_that_embeds(embeddings: BGEM3Embeddings) -> None:
    def embed() -> None:
        embeddings.embed_documents(FEW)
        sys.exit(3)

    threading.Thread(target=embed).start()


@scenario
def exit_in_the_middle_of_a_batch_that_takes_minutes(embeddings: BGEM3Embeddings) -> None:
    encoder = embeddings._engine.encoder
    forward = encoder.forward
    encoder.forward = lambda *args: [forward(*args) for _ in range(1_000_000)]
    running = watch(encoder)
    threading.Thread(target=embeddings.embed_query, args=[TEXT], daemon=True).start()
    running.wait()


@scenario
def hard_exit_with_work_queued(embeddings: BGEM3Embeddings) -> None:
    running = watch(embeddings._engine.encoder)
    threading.Thread(target=embeddings.embed_documents, args=[MANY]).start()
    running.wait()
    os._exit(0)


@scenario
def ctrl_c_in_a_long_call(embeddings: BGEM3Embeddings) -> None:
    expected = embeddings.embed_query(TEXT)
    running = watch(embeddings._engine.encoder)
    threading.Thread(target=send_ctrl_c, args=[running]).start()
    try:
        embeddings.embed_documents(MANY)
    except KeyboardInterrupt:
        ran = running.batches
    else:
        raise AssertionError
    assert alike([embeddings.embed_query(TEXT)], [expected])
    assert running.batches <= ran + 2  # the one that was running, and the query


@scenario
def ctrl_c_in_a_stream(embeddings: BGEM3Embeddings) -> None:
    running = watch(embeddings._engine.encoder)
    threading.Thread(target=send_ctrl_c, args=[running]).start()
    vectors = 0
    try:
        for _ in embeddings.embed_stream(MANY):
            vectors += 1
    except KeyboardInterrupt:
        ran = running.batches
    else:
        raise AssertionError
    assert len(embeddings.embed_query(TEXT)) == 32
    assert running.batches <= ran + 2


@scenario
def fork_after_use(embeddings: BGEM3Embeddings) -> None:
    expected = embeddings.embed_documents(FEW)
    before = dict(os.environ)
    in_child(lambda: same(embeddings, expected))
    in_child(lambda: in_child(lambda: same(embeddings, expected)))
    assert same(embeddings, expected)
    assert dict(os.environ) == before


@scenario
def fork_with_the_tokenizers_threads_asked_for(embeddings: BGEM3Embeddings) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    expected = embeddings.embed_documents(FEW)
    in_child(lambda: same(embeddings, expected))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


@scenario
def fork_while_another_thread_embeds(embeddings: BGEM3Embeddings) -> None:
    expected = embeddings.embed_documents(FEW)
    running = watch(embeddings._engine.encoder)
    threading.Thread(target=embeddings.embed_documents, args=[MANY], daemon=True).start()
    for _ in range(3):
        running.wait()
        in_child(lambda: same(embeddings, expected))
        running.clear()
    assert same(embeddings, expected)


@scenario
def fork_while_another_thread_tokenises(embeddings: BGEM3Embeddings) -> None:
    from langchain_bge_dense._engine.process import tokenizers

    entered, leave = threading.Event(), threading.Event()

    def tokenise() -> None:
        with tokenizers.use():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=tokenise)
    thread.start()
    entered.wait()
    in_child(lambda: tokenizers.at_exit() is None)  # does not wait for a thread of the parent
    leave.set()
    thread.join()


@scenario
def fork_while_locks_are_held(embeddings: BGEM3Embeddings) -> None:
    from langchain_bge_dense._engine.engine import _loading_lock

    scheduler = embeddings._engine.scheduler
    expected = embeddings.embed_documents(FEW)
    with _loading_lock, scheduler._lock, scheduler.loaded._condition:
        in_child(lambda: same(embeddings, expected) and same(fresh(embeddings), expected))


@scenario
def fork_while_a_result_is_delivered(embeddings: BGEM3Embeddings) -> None:
    from langchain_bge_dense._engine.calls import Call, wait
    from langchain_bge_dense._engine.encoding import Outputs

    engine = embeddings._engine
    expected = embeddings.embed_documents(FEW)
    call = Call(engine, FEW, Outputs(), embeddings.session().documents)
    request = call.advance()

    def go_on() -> bool:
        with pytest.raises(RuntimeError, match="forked during this call"):
            wait(request)
        call.close()
        return same(embeddings, expected)

    with held_by_another_thread(request.future._condition):
        in_child(go_on)
    wait(request)


@scenario
def exit_while_a_model_is_loaded(embeddings: BGEM3Embeddings) -> None:
    from langchain_bge_dense._engine import loading

    started, load = threading.Event(), loading.load_encoder

    def slow(*args: object) -> Encoder:
        started.set()
        time.sleep(0.5)
        return load(*args)

    def load_or_end() -> None:
        with contextlib.suppress(RuntimeError):  # of transformers, that Python is exiting
            fresh(embeddings).load()

    loading.load_encoder = slow
    threading.Thread(target=load_or_end, daemon=True).start()
    started.wait()


@scenario
def ctrl_c_while_a_model_is_loaded(embeddings: BGEM3Embeddings) -> None:
    from langchain_bge_dense._engine import loading

    started, load = threading.Event(), loading.load_encoder
    go_on = threading.Event()

    def slow(*args: object) -> Encoder:
        started.set()
        go_on.wait()
        return load(*args)

    loading.load_encoder = slow
    threading.Thread(target=interrupt_after, args=[started, go_on]).start()
    try:
        fresh(embeddings).load()
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError
    assert len(fresh(embeddings).embed_query(TEXT)) == 32


@scenario
def fork_in_the_middle_of_a_stream(embeddings: BGEM3Embeddings) -> None:
    vectors = embeddings.embed_stream(iter([TEXT[:9]] * 4_200))
    first = next(vectors)

    def go_on() -> bool:
        with pytest.raises(RuntimeError, match="forked during this call"):
            list(vectors)
        return (next(embeddings.embed_stream([TEXT[:9]])) == first).all()

    in_child(go_on)
    assert sum(1 for _ in vectors) == 4_199


@scenario
def workers_that_multiprocessing_forks(embeddings: BGEM3Embeddings) -> None:
    expected = embeddings.embed_documents(FEW[:8])
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(embeddings.embed_query, FEW[:8]))
    assert alike(found, expected)


@scenario
def workers_forked_before_the_model_is_loaded(embeddings: BGEM3Embeddings) -> None:
    embeddings = fresh(embeddings)
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(embeddings.embed_query, FEW[:8]))
    assert alike(found, embeddings.embed_documents(FEW[:8]))


class Running(threading.Event):
    """Set once a batch has begun."""

    batches = 0


def watch(encoder: Encoder) -> Running:
    running = Running()
    forward = encoder.forward

    def watched(*args: object) -> object:
        running.batches += 1
        running.set()
        return forward(*args)

    encoder.forward = watched
    return running


@contextlib.contextmanager
def held_by_another_thread(lock: threading.Condition) -> Iterator[None]:
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            let_go.wait()

    threading.Thread(target=hold).start()
    held.wait()
    yield
    let_go.set()


def interrupt_after(started: threading.Event, go_on: threading.Event) -> None:
    started.wait()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)  # or the load is over before anybody is interrupted
    go_on.set()


def send_ctrl_c(running: Running) -> None:
    running.wait()
    os.kill(os.getpid(), signal.SIGINT)


def same(embeddings: BGEM3Embeddings, expected: list[list[float]]) -> bool:
    return alike(embeddings.embed_documents(FEW), expected)


def fresh(embeddings: BGEM3Embeddings) -> BGEM3Embeddings:
    """The same with a model of its own."""
    from langchain_bge_dense._engine.engine import _engines

    _engines.clear()
    return BGEM3Embeddings(**embeddings.model_dump())


def alike(vectors: list[list[float]], expected: list[list[float]]) -> bool:
    # Batches of a narrow dtype are rounded by their shapes.
    return (np.array(vectors) * np.array(expected)).sum(1).min() > 0.999


def in_child(task: Callable[[], bool | None]) -> None:
    """Fork, run the task in the child and see it return True, or None."""
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        return
    signal.alarm(LIMIT)
    code = 1
    try:
        code = int(task() is False)
    finally:
        os._exit(code)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def outcomes(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple]:
    if request.param == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no bfloat16, and a log line says so")
    folder = tmp_path_factory.mktemp("outcomes")
    path = os.pathsep.join(filter(None, sys.path))
    subprocess.run(
        [sys.executable, "-W", "ignore", __file__, tiny_checkpoint, request.param, folder],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"},
        check=True,
        timeout=10 * LIMIT,
    )
    codes = json.loads((folder / "codes.json").read_text())
    return {name: (code, (folder / name).read_text()) for name, code in codes.items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("name", SCENARIOS)
def test_it_ends_well_and_without_a_word(name: str, outcomes: dict[str, tuple]) -> None:
    assert outcomes[name] == (0, "")


def test_a_spawned_process_gets_the_settings_and_loads_its_own_model(
    tiny: BGEM3Embeddings,
) -> None:
    expected = tiny.embed_query(TEXT)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(tiny.embed_query, TEXT).result(LIMIT) == pytest.approx(
            expected, abs=1e-6
        )


def test_a_pickle_holds_settings_alone(tiny: BGEM3Embeddings) -> None:
    tiny.embed_query(TEXT)
    stored = pickle.dumps(tiny)
    assert len(stored) < 2_000
    assert pickle.loads(stored).embed_query(TEXT) == tiny.embed_query(TEXT)  # noqa: S301


def main(checkpoint: str, dtype: str, folder: Path) -> None:
    embeddings = BGEM3Embeddings(model=checkpoint, device="cpu", dtype=dtype).load()
    codes = {}
    for name, run in SCENARIOS.items():
        if not (pid := os.fork()):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
            signal.alarm(LIMIT)
            run(embeddings)
            return
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(*sys.argv[1:3], Path(sys.argv[3]))
