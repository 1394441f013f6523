"""Which waiting texts share a batch and in what order, and the thread that runs them.

The encoder is one of a few lines, which says what ran when and can be held up.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_bge_dense._engine.encoding import Outputs, TextOutputs, Tokens
from langchain_bge_dense._engine.scheduler import Queue, Request, Scheduler, Sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT = 20.0  # seconds; only a test that fails takes so long
DENSE = Outputs()
BOTH = Outputs(dense=True, lexical=True)


def request(*lengths: int, budget: int = 64) -> Request:
    """A request whose texts have these many tokens."""
    tokens = [Tokens(np.zeros(length, np.int32), length) for length in lengths]
    return Request(tokens, DENSE, budget)


def queue_of(*requests: Request) -> Queue:
    queue = Queue()
    for each in requests:
        queue.add(each)
    return queue


def drain(queue: Queue) -> list[list[Sequence]]:
    batches = []
    while batch := queue.next_batch():
        batches.append(batch)
    return batches


def lengths(batch: list[Sequence]) -> list[int]:
    return [len(sequence.ids) for sequence in batch]


def callers(batch: list[Sequence]) -> set[Request]:
    return {sequence.request for sequence in batch}


class TestQueue:
    @pytest.mark.parametrize(
        ("have", "batches"),
        [
            ([5, 5, 5, 5], [[5, 5, 5], [5]]),  # three fit
            ([16], [[16]]),  # above the budget alone: still runs
            ([16, 16], [[16], [16]]),
            ([9, 8, 7, 6], [[9, 6], [8, 7]]),  # a short text fills the room that is left
            ([8, 4, 3], [[8, 4, 3]]),  # to the last token
            ([7, 1, 8], [[8, 7], [1]]),  # the longest first
        ],
    )
    def test_a_batch_fills_the_budget_in_true_tokens(
        self, have: list[int], batches: list[list[int]]
    ) -> None:
        found = drain(queue_of(request(*have, budget=15)))
        assert [lengths(batch) for batch in found] == batches

    def test_texts_of_equal_length_keep_their_order(self) -> None:
        [batch] = drain(queue_of(request(3, 3, 3, 3)))
        assert [sequence.position for sequence in batch] == [0, 1, 2, 3]

    def test_callers_share_a_batch(self) -> None:
        first, second = request(4, 4), request(4)
        [batch] = drain(queue_of(first, second))
        assert callers(batch) == {first, second}

    def test_the_budget_is_that_of_whose_text_comes_first(self) -> None:
        first, second = request(4, budget=10), request(4, 4, 4, budget=1_000)
        assert lengths(queue_of(first, second).next_batch()) == [4, 4]

    def test_a_small_caller_does_not_wait_for_a_bulk_one(self) -> None:
        bulk, small = request(*[60] * 50), request(7, 7)
        batches = drain(queue_of(bulk, small))
        assert [callers(batch) for batch in batches[:2]] == [{bulk}, {small}]

    def test_a_bulk_caller_moves_on_while_small_ones_keep_coming(self) -> None:
        bulk = request(*[60] * 4)
        queue = queue_of(bulk)
        done = 0
        for _ in range(8):
            queue.add(request(7))
            done += bulk in callers(queue.next_batch())
        assert done == 4

    def test_the_texts_of_a_gone_caller_are_dropped(self) -> None:
        gone, stays = request(9, 4), request(4)
        queue = queue_of(gone, stays)
        gone.future.cancel()
        assert [callers(batch) for batch in drain(queue)] == [{stays}]
        assert not queue

    def test_nothing_is_left_once_the_only_caller_is_gone(self) -> None:
        gone = request(9, 4)
        queue = queue_of(gone)
        gone.future.cancel()
        assert queue
        assert queue.next_batch() == []
        assert not queue
        assert queue.requests() == []

    @given(
        steps=st.lists(
            st.one_of(
                st.lists(st.integers(1, 80), min_size=1, max_size=12).map(lambda s: ("add", s)),
                st.integers(0, 30).map(lambda which: ("cancel", which)),
                st.just(("take", None)),
            ),
            max_size=60,
        ),
        budgets=st.lists(st.integers(1, 200), min_size=1),
    )
    def test_every_text_that_is_wanted_runs_once_within_its_budget(self, steps, budgets) -> None:
        queue = Queue()
        requests: list[Request] = []
        ran: list[tuple[int, int]] = []

        def take() -> bool:
            batch = queue.next_batch()
            assert not any(sequence.request.future.cancelled() for sequence in batch)
            if len(batch) > 1:
                assert sum(lengths(batch)) <= batch[0].request.batch_tokens
            ran.extend((requests.index(each.request), each.position) for each in batch)
            return bool(batch)

        for action, value in steps:
            if action == "add":
                budget = budgets[len(requests) % len(budgets)]
                requests.append(request(*value, budget=budget))
                queue.add(requests[-1])
            elif action == "cancel" and requests:
                requests[value % len(requests)].future.cancel()
            elif action == "take":
                take()
        while take():
            pass

        assert not queue
        assert len(ran) == len(set(ran))
        wanted = {
            (index, position)
            for index, each in enumerate(requests)
            if not each.future.cancelled()
            for position in range(len(each.tokens))
        }
        assert wanted <= set(ran)

    @given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=9), min_size=1, max_size=9))
    def test_every_caller_moves_on_within_a_few_batches(self, callers_lengths) -> None:
        """By turns the oldest and the smallest: nobody is passed over for ever."""
        requests = [request(*each) for each in callers_lengths]
        batches = drain(queue_of(*requests))
        for age, each in enumerate(requests):
            first = next(i for i, batch in enumerate(batches) if each in callers(batch))
            before = sum(len(other.tokens) for other in requests[:age])
            assert first <= 2 * before


class TestRequest:
    def test_a_caller_that_has_gone_gets_nothing(self) -> None:
        gone = request(3)
        gone.future.cancel()
        gone.deliver(0, TextOutputs(np.zeros(2, np.float32), None, None))
        gone.fail(ValueError("late"))
        assert gone.future.cancelled()

    def test_the_first_error_of_a_caller_stays(self) -> None:
        failed = request(3)
        failed.fail(ValueError("first"))
        failed.fail(ValueError("second"))
        with pytest.raises(ValueError, match="first"):
            failed.future.result()

    def test_a_non_finite_text_is_named_by_its_place_in_the_call(self) -> None:
        tokens = [Tokens(np.zeros(3, np.int32), 3)] * 4
        failed = Request(tokens, DENSE, 64, first=2_048)
        failed.deliver(2, None)
        message = r"^Text 2050 has a non-finite vector, .*\. The checkpoint's .* the original\.$"
        with pytest.raises(FloatingPointError, match=message):
            failed.future.result()


class Letters:
    """Makes a token of each letter, and of a text the number of its letters."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.outputs: list[Outputs] = []
        self.entered: SimpleQueue[None] = SimpleQueue()
        self.go_on = threading.Event()
        self.go_on.set()

    def forward(self, batch: list[np.ndarray], outputs: Outputs) -> list[TextOutputs | None]:
        texts = ["".join(map(chr, ids)) for ids in batch]
        self.batches.append(texts)
        self.outputs.append(outputs)
        self.entered.put(None)
        assert self.go_on.wait(WAIT)
        if "poison" in texts:
            raise MemoryError(texts)
        return [None if text == "overflow" else self.row(text, outputs) for text in texts]

    @staticmethod
    def row(text: str, outputs: Outputs) -> TextOutputs:
        weights = np.ones(len(text), np.float32) if outputs.lexical else None
        return TextOutputs(np.array([len(text)], np.float32), weights, None)

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
    made = Scheduler(lambda: encoder)
    yield made
    encoder.go_on.set()
    made.stop()
    assert not made._thread.is_alive()


def enqueue(scheduler: Scheduler, *texts: str, outputs: Outputs = DENSE, **options) -> Request:
    tokens = [Tokens(np.array([ord(c) for c in text], np.int32), len(text)) for text in texts]
    made = Request(tokens, outputs, options.pop("batch_tokens", 64), **options)
    scheduler.enqueue(made)
    return made


def dense(made: Request) -> list[float]:
    return [float(row.dense[0]) for row in made.future.result(WAIT)]


def test_the_encoder_is_loaded_in_the_thread_that_runs_it() -> None:
    threads = []

    class Noting(Letters):
        def forward(self, *args: object) -> list[TextOutputs | None]:
            threads.append(threading.current_thread())
            return super().forward(*args)

    def load() -> Noting:
        threads.append(threading.current_thread())
        return Noting()

    scheduler = Scheduler(load)
    dense(enqueue(scheduler, "a"))
    dense(enqueue(scheduler, "b"))
    scheduler.stop()
    assert set(threads) == {scheduler._thread}
    assert len(threads) == 3
    assert isinstance(scheduler.loaded.result(), Noting)


def test_an_error_while_loading_is_for_whoever_waits_and_ends_the_thread() -> None:
    def load() -> Letters:
        msg = "damaged"
        raise ValueError(msg)

    scheduler = Scheduler(load)
    with pytest.raises(ValueError, match="damaged"):
        scheduler.loaded.result(WAIT)
    scheduler._thread.join(WAIT)
    assert not scheduler._thread.is_alive()


def test_results_come_in_the_order_of_the_texts(scheduler: Scheduler) -> None:
    texts = ["a" * length for length in (5, 50, 1, 64, 5, 30, 80, 2)]
    assert dense(enqueue(scheduler, *texts)) == [5, 50, 1, 64, 5, 30, 80, 2]


def test_a_query_goes_before_documents_at_the_next_batch(
    scheduler: Scheduler, encoder: Letters
) -> None:
    go_on = encoder.hold()
    documents = enqueue(scheduler, *["d" * 60] * 5)
    encoder.in_a_batch()
    queries = [enqueue(scheduler, "q" * 60, urgent=True) for _ in range(3)]
    go_on()
    assert [dense(query) for query in queries] == [[60]] * 3
    dense(documents)
    assert encoder.batches[1:4] == [["q" * 60]] * 3


def test_what_waits_together_shares_a_batch_across_callers(
    scheduler: Scheduler, encoder: Letters
) -> None:
    go_on = encoder.hold()
    first = enqueue(scheduler, "x" * 60, urgent=True)
    encoder.in_a_batch()
    others = [enqueue(scheduler, "abcd", urgent=True) for _ in range(8)]
    go_on()
    assert [dense(each) for each in [first, *others]] == [[60], *[[4]] * 8]
    assert encoder.batches[1:] == [["abcd"] * 8]


def test_batch_mates_get_only_what_they_asked_for(scheduler: Scheduler, encoder: Letters) -> None:
    go_on = encoder.hold()
    enqueue(scheduler, "x" * 60, urgent=True)
    encoder.in_a_batch()
    plain = enqueue(scheduler, "abcd", urgent=True)
    rich = enqueue(scheduler, "abcd", urgent=True, outputs=BOTH)
    go_on()
    assert plain.future.result(WAIT)[0].lexical is None
    assert rich.future.result(WAIT)[0].lexical.tolist() == [1.0] * 4
    assert encoder.outputs[1:] == [BOTH]


def test_cancelling_drops_what_has_not_run(scheduler: Scheduler, encoder: Letters) -> None:
    go_on = encoder.hold()
    gone = enqueue(scheduler, *["g" * 60] * 5)
    encoder.in_a_batch()
    stays = enqueue(scheduler, "stay")
    gone.future.cancel()
    go_on()
    assert dense(stays) == [4]
    assert encoder.batches == [["g" * 60], ["stay"]]


@pytest.mark.parametrize(
    ("text", "error"), [("poison", MemoryError), ("overflow", FloatingPointError)]
)
def test_an_error_of_a_shared_batch_reaches_only_the_caller_who_caused_it(
    scheduler: Scheduler, encoder: Letters, text: str, error: type[Exception]
) -> None:
    go_on = encoder.hold()
    enqueue(scheduler, "x" * 60, urgent=True)
    encoder.in_a_batch()
    mate = "m" * len(text)
    requests = [enqueue(scheduler, letters, urgent=True) for letters in (mate, text, mate)]
    go_on()
    with pytest.raises(error):
        dense(requests[1])
    assert dense(requests[0]) == dense(requests[2]) == [len(text)]
    assert sorted(encoder.batches[1]) == sorted([mate, text, mate])
    again = [[mate], [mate], [text]] if error is MemoryError else []
    assert sorted(encoder.batches[2:]) == sorted(again)


def test_a_caller_with_one_bad_text_of_many_gets_the_error_at_once(
    scheduler: Scheduler, encoder: Letters
) -> None:
    bad = enqueue(scheduler, *["d" * 60] * 3, "poison", *["e"] * 9, batch_tokens=60)
    with pytest.raises(MemoryError):
        dense(bad)
    assert dense(enqueue(scheduler, "next")) == [4]
    assert len(encoder.batches) == 5  # three of 60 letters, that of the poison, and the next


def test_an_error_of_the_machinery_reaches_everyone_who_waits_and_the_thread_lives(
    scheduler: Scheduler, encoder: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = encoder.hold()
    running = enqueue(scheduler, "x", urgent=True)
    encoder.in_a_batch()

    def out_of_memory(self: Queue) -> None:
        raise MemoryError

    waiting = [enqueue(scheduler, "abcd", urgent=urgent) for urgent in (True, False)]
    with monkeypatch.context() as patched:
        patched.setattr(Queue, "next_batch", out_of_memory)
        go_on()
        for each in waiting:
            with pytest.raises(MemoryError):
                dense(each)
    assert dense(running) == [1]
    assert dense(enqueue(scheduler, "next", urgent=True)) == [4]


def test_documents_of_a_small_caller_run_between_those_of_a_bulk_one(
    scheduler: Scheduler, encoder: Letters
) -> None:
    go_on = encoder.hold()
    bulk = enqueue(scheduler, *["b" * 60] * 300)
    encoder.in_a_batch()
    small = enqueue(scheduler, "small", "small")
    go_on()
    dense(small)
    dense(bulk)
    assert encoder.batches.index(["small", "small"]) < 4


def test_after_a_stop_there_is_no_thread_and_no_new_work(encoder: Letters) -> None:
    scheduler = Scheduler(lambda: encoder)
    dense(enqueue(scheduler, "document"))
    scheduler.stop()
    assert not scheduler._thread.is_alive()
    with pytest.raises(RuntimeError, match=r"^The model was stopped, as Python is exiting\. Embed"):
        enqueue(scheduler, "late")


def test_a_stop_waits_for_the_running_batch_and_drops_the_rest(encoder: Letters) -> None:
    scheduler = Scheduler(lambda: encoder)
    go_on = encoder.hold()
    enqueue(scheduler, *["d" * 60] * 5)
    encoder.in_a_batch()
    threading.Timer(0.1, go_on).start()
    scheduler.stop()
    assert len(encoder.batches) == 1
    assert not scheduler._thread.is_alive()


def test_a_stop_from_the_encoders_own_thread_does_not_wait_for_itself(encoder: Letters) -> None:
    scheduler = Scheduler(lambda: encoder)
    go_on = encoder.hold()
    made = enqueue(scheduler, "x", urgent=True)
    made.future.add_done_callback(lambda _: scheduler.stop())
    go_on()
    assert dense(made) == [1]
    scheduler._thread.join(WAIT)
    assert not scheduler._thread.is_alive()


def test_an_idle_thread_holds_on_to_no_texts_and_no_results(scheduler: Scheduler) -> None:
    requests = [enqueue(scheduler, "query", urgent=True), enqueue(scheduler, "document")]
    for each in requests:
        dense(each)
    dense(enqueue(scheduler, "x", urgent=True))  # by its end, the thread is through with the others
    held = [weakref.ref(each) for each in requests]
    del each, requests
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_an_idle_thread_waits(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    dense(enqueue(scheduler, "x"))
    turns = []
    next_batch = Queue.next_batch
    monkeypatch.setattr(Queue, "next_batch", lambda queue: turns.append(1) or next_batch(queue))
    time.sleep(0.1)
    assert not turns
    dense(enqueue(scheduler, "x"))
    assert turns


def test_many_threads_enqueue_at_once(scheduler: Scheduler, encoder: Letters) -> None:
    requests: list[Request] = []

    def caller() -> None:
        requests.extend(
            enqueue(scheduler, "q" * (n % 9 + 1), urgent=n % 2 == 0) for n in range(100)
        )

    threads = [threading.Thread(target=caller) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(dense(each) == [each.tokens[0].total] for each in requests)
    assert len(requests) == sum(map(len, encoder.batches)) == 1_000
