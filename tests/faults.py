"""What can go wrong, the tests that try it, and a line on each when they are done.

A plugin of pytest that `make soak` loads: it runs the tests of this table alone.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

# Fault to its tests, by the beginnings of their names.
FAULTS = {
    "an indexing process is killed at random moments": ["test_faults.py::test_killed_at"],
    "an indexing process is killed while Chroma persists its index": [
        "test_recovery.py::test_killed_while",
        "test_recovery.py::test_a_search_after",
    ],
    "the disk is full while indexing": [
        "test_faults.py::test_disk_full",
        "test_recovery.py::test_no_room",
        "test_colbert.py::test_a_full_disk",
    ],
    "two processes index into one Chroma server": ["test_server.py::test_two_processes"],
    "a process that writes ColBERT codes is killed": [
        "test_colbert.py::test_killed",
        "test_colbert.py::test_a_transaction",
    ],
    "compaction is killed at each of its steps": ["test_compaction.py::test_killed"],
    "files of Chroma's index are cut short or missing": ["test_recovery.py::TestDamage"],
    "a process searches a folder that another one writes": [
        "test_connection.py::test_a_reader",
        "test_connection.py::test_many_threads",
    ],
    "a store is used in a forked child": ["test_connection.py::test_a_forked_child"],
    "the Chroma server stops, and comes back or does not": [
        "test_server.py::test_the_server",
        "test_session.py::TestServer",
    ],
    "a folder is removed, emptied or replaced while it is open": [
        "test_session.py::TestFolderThatChanges"
    ],
    "equal passages by the hundred": ["test_session.py::TestEqualPassages"],
    "a Ray actor is killed in the middle of a job": ["test_ray.py::test_each_row"],
    "many callers, cancelled calls, bad texts and indexing at once": [
        "test_faults.py::test_two_hundred_callers"
    ],
    "a checkpoint file is cut short, swapped, damaged or closed": [
        "test_checkpoint.py::test_a_damaged",
        "test_checkpoint.py::test_a_file_that_may_not_be_read",
        "test_checkpoint.py::test_changed_bytes",
    ],
    "batches of hundreds of sizes": ["test_faults.py::test_memory_of_many_sizes"],
    "a weight is not finite": [
        "test_encoder.py::test_non_finite",
        "test_indexing.py::test_vectors_that_are_not_finite",
    ],
    "Ctrl-C in a long call": ["test_processes.py::*ctrl_c"],
    "fork, spawn, pickle and exit with work queued": [
        "test_processes.py::test_it_ends_well",
        "test_processes.py::test_a_spawned",
        "test_processes.py::test_a_pickle",
    ],
    "texts of arbitrary Unicode, and items that are no texts": [
        "test_faults.py::test_arbitrary_unicode"
    ],
    "a checkpoint folder of someone who means harm": ["test_hostile.py"],
    "names, texts and metadata with filter operators in them": ["test_untrusted.py"],
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the table; of all tests, some have to be of each of its lines."""
    idle = [fault for fault in FAULTS if not any(_of(fault, item.nodeid) for item in items)]
    if idle and config.args_source == pytest.Config.ArgsSource.TESTPATHS:
        msg = f"No test tries this: {'; '.join(idle)}. Correct the table in {__file__}."
        raise pytest.UsageError(msg)
    kept = [item for item in items if any(_of(fault, item.nodeid) for fault in FAULTS)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was tried, and what was lost."""
    reports = [
        report
        for outcome in ("passed", "failed", "skipped", "error")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" or not report.passed
    ]
    terminalreporter.section("what was tried: what was lost")
    for fault in FAULTS:
        terminalreporter.line(f"{fault}: {_told([r for r in reports if _of(fault, r.nodeid)])}")


def _of(fault: str, nodeid: str) -> bool:
    file, _, test = nodeid.partition("::")
    name = f"{Path(file).name}::{test}"
    return any(fnmatchcase(name, f"{pattern}*") for pattern in FAULTS[fault])


def _told(reports: Iterable[pytest.TestReport]) -> str:
    """One fault's tests in a few words."""
    ran = [report for report in reports if not report.skipped]
    lost = [report.nodeid.rpartition("::")[2] for report in ran if report.failed]
    details = [value for report in ran for name, value in report.user_properties if name == "tried"]
    if not ran:
        return "not tried here"
    tried = "; ".join(details) or f"{len(ran)} test{'s' if len(ran) > 1 else ''}"
    return f"{tried}: {'LOST in ' + ', '.join(lost) if lost else 'nothing lost'}"
