"""The scheduler with an encoder of a few lines, which says what ran when and can be held up."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import pytest

from langchain_bge_dense._encoder import Row, Signals, Tokens, Vectors
from langchain_bge_dense._jobs import Job, Waiting
from langchain_bge_dense._scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT = 20.0  # seconds; only a test that fails takes so long
DENSE = Signals()
BOTH = Signals(dense=True, lexical=True)


class Letters:
    """Makes a token of each letter, and of a text the number of its letters."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.signals: list[Signals] = []
        self.copies: list[int] = []
        self.entered: SimpleQueue[None] = SimpleQueue()
        self.pieces: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.may_tokenize = threading.Event()
        self.may_tokenize.set()

    def tokenize(self, texts: list[str], max_length: int) -> list[Tokens]:
        assert self.may_tokenize.wait(WAIT)
        self.pieces.append(len(texts))
        if "untokenizable" in texts:
            raise ValueError(texts)
        return [Tokens(np.array([ord(c) for c in text]), len(text)) for text in texts]

    def forward(self, batch: list[np.ndarray], signals: Signals) -> list[Row]:
        texts = ["".join(map(chr, ids)) for ids in batch]
        self.batches.append(texts)
        self.signals.append(signals)
        self.entered.put(None)
        assert self.go_on.wait(WAIT)
        if "poison" in texts:
            raise MemoryError(texts)
        return [
            Row(len(text), [1.0] * len(text) if signals.lexical else None, None) for text in texts
        ]

    def collect(self, rows: list[Row], batch: list[np.ndarray], first: int = 0) -> Vectors:
        self.copies.append(len(rows))
        if any("".join(map(chr, ids)) == "overflow" for ids in batch):
            raise FloatingPointError(first)
        weights = None if rows[0].weights is None else [row.weights for row in rows]
        return Vectors(np.array([[row.dense] for row in rows], np.float32), weights, None)

    def hold(self) -> Callable[[], None]:
        """Stop the next batch in its middle; the return value lets it go on."""
        while not self.entered.empty():
            self.entered.get()
        self.go_on.clear()
        return self.go_on.set

    def in_a_batch(self) -> None:
        self.entered.get(timeout=WAIT)


@pytest.fixture
def encoder() -> Letters:
    return Letters()


@pytest.fixture
def scheduler(encoder: Letters) -> Iterator[Scheduler]:
    made = Scheduler(encoder)
    yield made
    encoder.go_on.set()
    made.stop()
    assert not any(thread.is_alive() for thread in made._threads.values())


def ask(scheduler: Scheduler, *texts: str, signals: Signals = DENSE, **options) -> Job:
    job = Job(list(texts), signals, max_length=512, batch_tokens=64, **options)
    scheduler.submit(job)
    return job


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def dense(job: Job) -> list[float]:
    return job.future.result(WAIT).vectors.dense[:, 0].tolist()


def test_results_come_in_the_order_of_the_texts(scheduler: Scheduler) -> None:
    texts = ["a" * length for length in (5, 50, 1, 64, 5, 30, 80, 2)]
    assert dense(ask(scheduler, *texts)) == [5, 50, 1, 64, 5, 30, 80, 2]


def test_more_texts_than_are_tokenised_at_once_come_back_whole(scheduler: Scheduler) -> None:
    texts = ["a" * (1 + index % 60) for index in range(600)]
    assert dense(ask(scheduler, *texts)) == [len(text) for text in texts]


def test_a_query_goes_before_documents_at_the_next_batch(
    scheduler: Scheduler, encoder: Letters
) -> None:
    go_on = encoder.hold()
    documents = ask(scheduler, *["d" * 60] * 5)
    encoder.in_a_batch()
    query = ask(scheduler, "query", urgent=True)
    go_on()
    dense(query)
    dense(documents)
    assert encoder.batches[1] == ["query"]


def test_what_waits_together_shares_a_batch_across_callers(
    scheduler: Scheduler, encoder: Letters
) -> None:
    go_on = encoder.hold()
    first = ask(scheduler, "x" * 60, urgent=True)
    encoder.in_a_batch()
    others = [ask(scheduler, "abcd", urgent=True) for _ in range(8)]
    go_on()
    assert [dense(job) for job in [first, *others]] == [[60], *[[4]] * 8]
    assert encoder.batches[1:] == [["abcd"] * 8]
    assert encoder.copies == [1, 8]  # results leave the device together, too


def test_batch_mates_get_only_what_they_asked_for(scheduler: Scheduler, encoder: Letters) -> None:
    go_on = encoder.hold()
    ask(scheduler, "x" * 60, urgent=True)
    encoder.in_a_batch()
    plain = ask(scheduler, "abcd", urgent=True)
    rich = ask(scheduler, "abcd", urgent=True, signals=BOTH)
    go_on()
    assert plain.future.result(WAIT).vectors.weights is None
    assert rich.future.result(WAIT).vectors.weights == [[1.0] * 4]
    assert encoder.signals[1:] == [BOTH]


def test_cancelling_drops_what_has_not_run(scheduler: Scheduler, encoder: Letters) -> None:
    go_on = encoder.hold()
    gone = ask(scheduler, *["g" * 60] * 5)
    encoder.in_a_batch()
    stays = ask(scheduler, "stay")
    gone.future.cancel()
    go_on()
    assert dense(stays) == [4]
    assert encoder.batches == [["g" * 60], ["stay"]]


def test_a_call_cancelled_before_it_is_tokenised_never_runs(
    scheduler: Scheduler, encoder: Letters
) -> None:
    go_on = encoder.hold()
    ask(scheduler, "x", urgent=True)
    encoder.in_a_batch()
    gone = ask(scheduler, "gone", urgent=True)
    gone.future.cancel()
    go_on()
    assert dense(ask(scheduler, "stay", urgent=True)) == [4]
    assert ["gone"] not in encoder.batches


@pytest.mark.parametrize("urgent", [True, False])
def test_an_error_while_tokenising_reaches_only_its_caller(
    scheduler: Scheduler, encoder: Letters, *, urgent: bool
) -> None:
    go_on = encoder.hold()
    ask(scheduler, "x", urgent=True)
    encoder.in_a_batch()
    bad = ask(scheduler, "untokenizable", urgent=urgent)
    good = ask(scheduler, "good", urgent=urgent)
    go_on()
    with pytest.raises(ValueError, match="untokenizable"):
        dense(bad)
    assert dense(good) == [4]


@pytest.mark.parametrize(
    ("text", "error"), [("poison", MemoryError), ("overflow", FloatingPointError)]
)
def test_an_error_of_a_shared_batch_reaches_only_the_caller_who_caused_it(
    scheduler: Scheduler, encoder: Letters, text: str, error: type[Exception]
) -> None:
    go_on = encoder.hold()
    ask(scheduler, "x" * 60, urgent=True)
    encoder.in_a_batch()
    mate = "m" * len(text)
    jobs = [ask(scheduler, letters, urgent=True) for letters in (mate, text, mate)]
    go_on()
    with pytest.raises(error):
        dense(jobs[1])
    assert dense(jobs[0]) == dense(jobs[2]) == [len(text)]
    assert [mate, text, mate] in encoder.batches


def test_a_caller_with_one_bad_text_of_many_gets_the_error_at_once(
    scheduler: Scheduler, encoder: Letters
) -> None:
    bad = ask(scheduler, "poison", *["d" * 60] * 9, *["e"] * 9)
    with pytest.raises(MemoryError):
        dense(bad)
    assert dense(ask(scheduler, "next")) == [4]


def test_an_error_of_the_machinery_reaches_everyone_who_waits_and_the_thread_lives(
    scheduler: Scheduler, encoder: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = encoder.hold()
    running = ask(scheduler, "x", urgent=True)
    encoder.in_a_batch()

    def out_of_memory(self: Waiting) -> None:
        raise MemoryError

    waiting = [ask(scheduler, "abcd", urgent=urgent) for urgent in (True, True)]
    with monkeypatch.context() as patched:
        patched.setattr(Waiting, "take", out_of_memory)
        go_on()
        for job in waiting:
            with pytest.raises(MemoryError):
                dense(job)
    assert dense(running) == [1]
    assert dense(ask(scheduler, "next", urgent=True)) == [4]


def test_documents_of_a_small_caller_run_between_those_of_a_bulk_one(
    scheduler: Scheduler, encoder: Letters
) -> None:
    go_on = encoder.hold()
    bulk = ask(scheduler, *["b" * 60] * 300)
    encoder.in_a_batch()
    small = ask(scheduler, "small", "small")
    until(lambda: small.tokenized)
    go_on()
    dense(small)
    dense(bulk)
    assert encoder.batches.index(["small", "small"]) < 5


def test_tokenising_goes_by_turns(scheduler: Scheduler, encoder: Letters) -> None:
    encoder.may_tokenize.clear()
    jobs = [ask(scheduler, *["b"] * 600), ask(scheduler, "small")]
    encoder.may_tokenize.set()
    assert [dense(job) for job in jobs] == [[1] * 600, [5]]
    assert encoder.pieces == [256, 1, 256, 88]


def test_texts_are_tokenised_while_a_batch_runs(scheduler: Scheduler, encoder: Letters) -> None:
    go_on = encoder.hold()
    ask(scheduler, "x")
    encoder.in_a_batch()
    following = ask(scheduler, "following")
    until(lambda: following.tokenized)
    assert not following.future.done()
    go_on()
    assert dense(following) == [9]


def test_there_is_one_thread_for_queries_and_another_for_documents(scheduler: Scheduler) -> None:
    assert not scheduler._threads
    dense(ask(scheduler, "query", urgent=True))
    assert list(scheduler._threads) == ["encoder"]
    dense(ask(scheduler, "document"))
    dense(ask(scheduler, "another"))
    assert list(scheduler._threads) == ["encoder", "tokenizer"]


def test_after_a_stop_there_is_no_thread_and_no_new_work(encoder: Letters) -> None:
    scheduler = Scheduler(encoder)
    dense(ask(scheduler, "document"))
    scheduler.stop()
    assert not any(thread.is_alive() for thread in scheduler._threads.values())
    with pytest.raises(RuntimeError, match="Python is exiting"):
        ask(scheduler, "late")


def test_a_stop_waits_for_the_running_batch_and_drops_the_rest(encoder: Letters) -> None:
    scheduler = Scheduler(encoder)
    go_on = encoder.hold()
    ask(scheduler, *["d" * 60] * 5)
    encoder.in_a_batch()
    threading.Timer(0.1, go_on).start()
    scheduler.stop()
    assert len(encoder.batches) == 1
    assert not any(thread.is_alive() for thread in scheduler._threads.values())


def test_a_stop_from_the_encoders_own_thread_does_not_wait_for_itself(encoder: Letters) -> None:
    scheduler = Scheduler(encoder)
    job = Job(["x"], Signals(), 512, 64, urgent=True)
    job.future.add_done_callback(lambda _: scheduler.stop())
    scheduler.submit(job)
    assert dense(job) == [1]
    scheduler._threads["encoder"].join(WAIT)
    assert not scheduler._threads["encoder"].is_alive()


def test_an_idle_thread_holds_on_to_no_texts_and_no_results(scheduler: Scheduler) -> None:
    jobs = [ask(scheduler, "query", urgent=True), ask(scheduler, "document")]
    for job in jobs:
        dense(job)
    dense(ask(scheduler, "x", urgent=True))  # by its end, the thread is through with the others
    held = [weakref.ref(job) for job in jobs]
    del job, jobs
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_many_threads_submit_at_once(scheduler: Scheduler, encoder: Letters) -> None:
    jobs: list[Job] = []

    def caller() -> None:
        jobs.extend(ask(scheduler, "q" * (n % 9 + 1), urgent=n % 2 == 0) for n in range(100))

    callers = [threading.Thread(target=caller) for _ in range(10)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert all(dense(job) == [len(job.texts[0])] for job in jobs)
    assert len(jobs) == sum(map(len, encoder.batches)) == 1_000
