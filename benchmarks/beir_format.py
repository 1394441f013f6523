"""Retrieval sets as BEIR lays them out: written, read, scored.

A folder has `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and a file of
judgements for each split, `qrels/test.tsv` (`query-id`, `corpus-id`, `score`).
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ir_measures
from ir_measures import RR, R, nDCG
from langchain_core.documents import Document

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

MEASURES = {"nDCG@10": nDCG @ 10, "R@1": R @ 1, "R@10": R @ 10, "R@100": R @ 100, "MRR@10": RR @ 10}


@dataclass(frozen=True)
class RetrievalSet:
    """The queries of one split, and the passages that answer them.

    Attributes:
        folder: Where its files lie.
        queries: Texts by id, those that the split has judgements of.
        relevant: Grades by passage id, by query id.
    """

    folder: Path
    queries: dict[str, str]
    relevant: dict[str, dict[str, int]]

    @classmethod
    def read(cls, folder: Path, split: str = "test") -> RetrievalSet:
        """Read queries and judgements; passages are read by `documents`."""
        relevant: dict[str, dict[str, int]] = {}
        with (folder / "qrels" / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                grades = relevant.setdefault(row["query-id"], {})
                grades[row["corpus-id"]] = int(row["score"])
        texts = {str(line["_id"]): line["text"] for line in lines(folder / "queries.jsonl")}
        return cls(folder, {query: texts[query] for query in relevant}, relevant)

    @property
    def name(self) -> str:
        return self.folder.name

    def documents(self) -> Iterator[Document]:
        """Every passage, its title in front of its text, under its own id."""
        for line in lines(self.folder / "corpus.jsonl"):
            text = f"{line.get('title') or ''} {line['text']}".strip()
            yield Document(text, id=str(line["_id"]))


def lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as opened:
        yield from map(json.loads, opened)


def write(
    folder: Path, passages: Sequence[str], questions: Sequence[str], right: Iterable[int]
) -> None:
    """Write texts in that format; `right` has the number of each question's passage."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = ({"_id": f"p{n}", "title": "", "text": text} for n, text in enumerate(passages))
    write_lines(folder / "corpus.jsonl", corpus)
    queries = ({"_id": f"q{n}", "text": text} for n, text in enumerate(questions))
    write_lines(folder / "queries.jsonl", queries)
    rows = [f"q{question}\tp{passage}\t1\n" for question, passage in enumerate(right)]
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "test.tsv").write_text(header + "".join(rows), encoding="utf-8")


def write_lines(file: Path, entries: Iterable[Mapping[str, str]]) -> None:
    with file.open("w", encoding="utf-8") as opened:
        opened.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def measures(
    relevant: Mapping[str, Mapping[str, int]], rankings: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Each of MEASURES for rankings of passage ids, the best first, by query id."""
    run = {  # ranks as scores: no two are equal, and none is rounded
        query: {passage: -float(rank) for rank, passage in enumerate(ranking)}
        for query, ranking in rankings.items()
    }
    found = ir_measures.calc_aggregate(list(MEASURES.values()), relevant, run)
    return {name: found[measure] for name, measure in MEASURES.items()}
