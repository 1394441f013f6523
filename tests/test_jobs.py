"""Which waiting texts share a batch and in what order, without a model and without threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from langchain_bge_dense._encoder import Signals, Tokens, Vectors
from langchain_bge_dense._jobs import Item, Job, Waiting, run_around


def job(*lengths: int, budget: int = 64) -> Job:
    """A tokenised job whose texts have these many tokens."""
    made = Job(["text"] * len(lengths), Signals(), max_length=512, batch_tokens=budget)
    made.tokens = [Tokens(np.zeros(length, np.int32), length) for length in lengths]
    made.rows = [None] * len(lengths)
    return made


def waiting(*jobs: Job) -> Waiting:
    queue = Waiting()
    queue.add(jobs)
    return queue


def drain(queue: Waiting) -> list[list[Item]]:
    batches = []
    while batch := queue.take():
        batches.append(batch)
    return batches


def lengths(batch: list[Item]) -> list[int]:
    return [item.length for item in batch]


def callers(batch: list[Item]) -> set[Job]:
    return {item.job for item in batch}


@pytest.mark.parametrize(
    ("have", "seed", "budget", "bounds"),
    [
        ([5, 5, 5, 5], 3, 15, (1, 4)),  # three fit
        ([5, 5, 5, 5], 1, 15, (0, 3)),  # room is left for one behind
        ([10, 10, 11, 11], 1, 64, (0, 4)),  # padded to 11, four still fit
        ([10, 10, 11, 11], 1, 40, (0, 3)),
        ([9], 0, 4, (0, 1)),  # over the budget alone: still runs
        ([1, 9, 9], 2, 32, (1, 3)),  # 1 padded to 9 would cost more than a batch of its own
        ([9, 9, 30], 1, 96, (0, 2)),  # and so would both padded to 30
    ],
)
def test_a_run_fits_the_budget_and_pads_little(
    have: list[int], seed: int, budget: int, bounds: tuple[int, int]
) -> None:
    [caller] = [job(*have)]
    items = [Item(length, place, caller, place) for place, length in enumerate(have)]
    assert run_around(items, seed, budget) == bounds


def test_the_longest_texts_of_a_caller_run_first() -> None:
    batches = drain(waiting(job(8, 30, 9, 31, 9)))
    assert [lengths(batch) for batch in batches] == [[30, 31], [8, 9, 9]]


def test_texts_of_equal_length_keep_their_order() -> None:
    [batch] = drain(waiting(job(3, 3, 3, 3)))
    assert [item.place for item in batch] == [0, 1, 2, 3]


def test_callers_share_a_batch() -> None:
    first, second = job(4, 4), job(4)
    [batch] = drain(waiting(first, second))
    assert callers(batch) == {first, second}


def test_a_small_caller_does_not_wait_for_a_bulk_one() -> None:
    bulk, small = job(*[60] * 50), job(7, 7)
    batches = drain(waiting(bulk, small))
    assert [callers(batch) for batch in batches[:2]] == [{bulk}, {small}]


def test_a_bulk_caller_moves_on_while_small_ones_keep_coming() -> None:
    bulk = job(*[60] * 4)
    queue = waiting(bulk)
    done = 0
    for _ in range(8):
        queue.add([job(7)])
        done += callers(queue.take()) == {bulk}
    assert done == 4


def test_the_texts_of_a_gone_caller_are_dropped() -> None:
    gone, stays = job(9, 4), job(4)
    queue = waiting(gone, stays)
    gone.future.cancel()
    assert [callers(batch) for batch in drain(queue)] == [{stays}]
    assert not queue


def test_nothing_is_left_once_the_only_caller_is_gone() -> None:
    gone = job(9, 4)
    queue = waiting(gone)
    gone.future.cancel()
    assert queue
    assert queue.take() == []
    assert not queue
    assert queue.jobs() == []


Step = st.one_of(
    st.lists(st.integers(1, 80), min_size=1, max_size=12).map(lambda sizes: ("add", sizes)),
    st.integers(0, 30).map(lambda which: ("cancel", which)),
    st.just(("take", None)),
)


@given(steps=st.lists(Step, max_size=60), budgets=st.lists(st.integers(1, 200), min_size=1))
def test_every_text_that_is_wanted_runs_once_within_its_budget(steps, budgets) -> None:
    queue = Waiting()
    jobs: list[Job] = []
    ran: list[tuple[int, int]] = []

    def take() -> bool:
        batch = queue.take()
        assert not any(item.job.future.cancelled() for item in batch)
        assert lengths(batch) == sorted(lengths(batch))
        if len(batch) > 1:
            widest = max(item.job.batch_tokens for item in batch)
            assert len(batch) * max(lengths(batch)) <= widest
        ran.extend((jobs.index(item.job), item.place) for item in batch)
        return bool(batch)

    for action, value in steps:
        if action == "add":
            jobs.append(job(*value, budget=budgets[len(jobs) % len(budgets)]))
            queue.add(jobs[-1:])
        elif action == "cancel" and jobs:
            jobs[value % len(jobs)].future.cancel()
        elif action == "take":
            take()
    while take():
        pass

    assert not queue
    assert len(ran) == len(set(ran))
    wanted = {
        (index, place)
        for index, asked in enumerate(jobs)
        if not asked.future.cancelled()
        for place in range(len(asked.texts))
    }
    assert wanted <= set(ran)


def test_a_caller_that_has_gone_is_told_nothing() -> None:
    gone = job(3)
    gone.future.cancel()
    gone.succeed(Vectors(np.zeros((1, 2), np.float32), None, None))
    gone.fail(ValueError("late"))
    assert gone.future.cancelled()


def test_the_first_error_of_a_caller_stays() -> None:
    failed = job(3)
    failed.fail(ValueError("first"))
    failed.fail(ValueError("second"))
    with pytest.raises(ValueError, match="first"):
        failed.future.result()


class Lengths:
    """Stands in for an encoder's tokenizer: a token a character."""

    def tokenize(self, texts: list[str], max_length: int) -> list[Tokens]:
        return [Tokens(np.zeros(min(len(t), max_length), np.int32), len(t)) for t in texts]


def test_a_job_is_tokenised_piece_by_piece() -> None:
    made = Job(["a", "ab", "abc"], Signals(), max_length=9, batch_tokens=64)
    made.tokenize(Lengths(), 2)
    assert not made.tokenized
    made.tokenize(Lengths(), 2)
    assert made.tokenized
    assert [tokens.total for tokens in made.tokens] == [1, 2, 3]
    assert made.rows == [None] * 3


def test_a_refused_text_is_named_by_its_place_in_the_call() -> None:
    texts = ["a", "ab", "abcde"]
    made = Job(texts, Signals(), max_length=4, batch_tokens=64, first=2_048, refuse_long=True)
    made.tokenize(Lengths(), 2)
    with pytest.raises(ValueError, match=r"Text 2050 has 5 tokens, more than max_length=4\."):
        made.tokenize(Lengths(), 2)
