"""Candidates of one query from a collection, and what each signal says of them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from chromadb.errors import InternalError
from langchain_core.documents import Document

from langchain_bge_dense._scoring import dense_scores, maxsim_scores, scaled, score_key
from langchain_bge_dense.chroma.collection import check, underlying
from langchain_bge_dense.chroma.companions import key_of, passage_of
from langchain_bge_dense.chroma.store import BGEM3Chroma
from langchain_bge_dense.embeddings import BGEM3Embeddings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chromadb import Collection
    from numpy.typing import NDArray
    from typing_extensions import Self

    from langchain_bge_dense._engine.outputs import M3Encoding
    from langchain_bge_dense._scoring import Fusion
    from langchain_bge_dense.chroma.colbert import ColbertCodes
    from langchain_bge_dense.chroma.lexical import LexicalWeights
    from langchain_bge_dense.chroma.passages import Passages

_SMALLEST = np.float32(1e-12)  # of what is divided by
_MOST_IDS = 100_000  # of one request, which a server takes up to 40 MiB of


@dataclass(frozen=True)
class Search:
    """What one call asks for.

    Attributes:
        query: The query.
        k: How many documents.
        count: How many candidates of each signal.
        weights: Of the dense, lexical and ColBERT score.
        fusion: How the scores are added up.
        where: Chroma's metadata filter.
        where_document: Chroma's filter of texts.
    """

    query: str
    k: int
    count: int
    weights: tuple[float, ...]
    fusion: Fusion
    where: Mapping[str, Any] | None
    where_document: Mapping[str, Any] | None

    @property
    def filters(self) -> dict[str, Any]:
        """The filters as Chroma takes them; empty: there are none."""
        filters = {"where": self.where, "where_document": self.where_document}
        return {name: value for name, value in filters.items() if value}


def model_of(store: object, embeddings: BGEM3Embeddings | None = None) -> BGEM3Embeddings:
    """The model to search a store with.

    Args:
        store: Of `open_chroma`.
        embeddings: The caller's; None: the store's own.

    Raises:
        ValueError: It is not such a store, its embeddings are others, or not the ones given.
    """
    if not isinstance(store, BGEM3Chroma):
        msg = f"vectorstore is {type(store).__name__}. Use a store of open_chroma."
        raise ValueError(msg)  # noqa: TRY004 - pydantic passes on ValueError alone
    model: object = underlying(embeddings or store.embeddings)  # type: ignore[arg-type]
    if not isinstance(model, BGEM3Embeddings):
        msg = (
            f"The store's embeddings are {type(model).__name__}, not BGEM3Embeddings. Open the "
            "store with BGEM3Embeddings, or pass the ones that filled it as `embeddings`."
        )
        raise ValueError(msg)  # noqa: TRY004 - pydantic passes on ValueError alone
    check(store._passages.collection, model.fingerprint)  # noqa: SLF001 - its own package's
    return model


def passing(collection: Collection, search: Search) -> list[str] | None:
    """Ids of all passages that pass the filters; None: there are no filters.

    Chroma takes most of a query's time to find them. Of given ids it tells the ones that pass 50
    times as slowly: it compares each with all that pass.
    """
    return collection.get(include=[], **search.filters)["ids"] if search.filters else None


@dataclass
class Candidates:
    """`N` passages; every list and array has one entry each.

    Attributes:
        ids: Their ids in the collection.
        texts: What is stored there.
        metadatas: What is stored there.
        fused: What they are ordered by, `(N,)`.
        scores: Scores by signal, `(N,)` each.
    """

    ids: list[str]
    texts: list[str]
    metadatas: list[Mapping[str, Any]]
    fused: NDArray[np.float32]
    scores: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def nearest(
        cls,
        collection: Collection,
        vector: NDArray[np.float32],
        search: Search,
        among: list[str] | None = None,
    ) -> Self:
        """The passages with the nearest dense vectors.

        Args:
            collection: In cosine space.
            vector: The query's, `(D,)`.
            search: How many, and the filters.
            among: What `passing` gave, if it was asked for.
        """
        found = _query(collection, vector, search, among)
        columns = (found[name][0] for name in ("ids", "documents", "metadatas", "distances"))
        # A passage without a text was deleted since the index was read.
        rows = [row for row in zip(*columns, strict=True) if row[1] is not None]
        made = cls(
            [row[0] for row in rows],
            [row[1] for row in rows],
            [row[2] or {} for row in rows],
            np.zeros(len(rows), np.float32),
        )
        made.scores["dense"] = 1 - np.array([row[3] for row in rows], np.float32)  # (N,)
        return made

    @property
    def keys(self) -> list[str]:
        """Names of what was computed of them."""
        return list(map(key_of, self.ids, self.texts))

    def add(self, collection: Collection, ids: Sequence[str], vector: NDArray[np.float32]) -> None:
        """Add passages by their ids, those that are still stored."""
        known = set(self.ids)
        new = [passage for passage in ids if passage not in known]
        if not new:
            return
        found: Any = collection.get(ids=new, include=["documents", "metadatas", "embeddings"])
        if not found["ids"]:
            return
        self.ids += found["ids"]
        self.texts += [text or "" for text in found["documents"]]
        self.metadatas += [metadata or {} for metadata in found["metadatas"]]
        dense = _cosines(np.asarray(found["embeddings"], np.float32), vector)
        self.scores["dense"] = np.concatenate([self.scores["dense"], dense])  # (N,)
        self.fused = np.zeros(len(self.ids), np.float32)  # (N,)

    def fuse(self, signal: str, weight: float, fusion: Fusion) -> None:
        """Add the scores of a signal to what the candidates are ordered by."""
        self.fused = self.fused + np.float32(weight) * scaled(self.scores[signal], fusion)

    def best(self, count: int) -> Candidates:
        """Those with the highest fused scores, the best first."""
        order = np.argsort(-self.fused, kind="stable")[:count]  # (count,)
        numbers = order.tolist()
        return Candidates(
            [self.ids[n] for n in numbers],
            [self.texts[n] for n in numbers],
            [self.metadatas[n] for n in numbers],
            self.fused[order],
            {signal: values[order] for signal, values in self.scores.items()},
        )

    def documents(self, *, scores: bool) -> list[Document]:
        """As documents, with their scores in the metadata or without."""
        named = {"fused": self.fused, **self.scores} if scores else {}
        return [
            Document(
                text,
                id=passage,
                metadata={
                    **metadata,
                    **{score_key(name): float(v[n]) for name, v in named.items()},
                },
            )
            for n, (passage, text, metadata) in enumerate(
                zip(self.ids, self.texts, self.metadatas, strict=True)
            )
        ]


def _query(
    collection: Collection,
    vector: NDArray[np.float32],
    search: Search,
    among: list[str] | None,
) -> Any:
    """Chroma's answer about the nearest passages; ids that are known spare it the filters."""
    query: Any = partial(
        collection.query,
        query_embeddings=[vector],  # type: ignore[arg-type]
        n_results=search.count,
        include=["documents", "metadatas", "distances"],
    )
    if among and len(among) <= _MOST_IDS:
        with contextlib.suppress(InternalError):  # one of them was deleted meanwhile
            return query(ids=among)
    return query(**search.filters)


def colbert_scores(
    passages: Passages,
    model: BGEM3Embeddings,
    query: NDArray[np.float32],
    keys: Sequence[str],
    texts: Sequence[str],
) -> tuple[NDArray[np.float32], int]:
    """MaxSim of passages, from their codes where the collection has them.

    Args:
        passages: Of the collection.
        model: Computes the vectors of those that have no codes.
        query: ColBERT vectors, `(Q, D)`.
        keys: Of N passages.
        texts: Theirs.

    Returns:
        Scores, `(N,)`, and how many passages had no codes.
    """
    codec = passages.codec()
    codes = passages.codes.read(keys) if codec else {}
    scores = np.empty(len(keys), np.float32)  # (N,)
    kept = [row for row, key in enumerate(keys) if key in codes]
    lacking = [row for row, key in enumerate(keys) if key not in codes]
    if codec and kept:
        scores[kept] = codec.maxsim(query, [codes[keys[row]] for row in kept])
    if lacking:
        encoding = model.encode([texts[row] for row in lacking], dense=False, colbert=True)
        scores[lacking] = maxsim_scores(query, encoding.colbert or [])
    return scores, len(lacking)


def stored_vectors(
    passages: Passages, ids: Sequence[str], texts: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """ColBERT vectors of passages as their codes have them.

    Args:
        passages: Of the collection.
        ids: Of N passages.
        texts: Theirs.

    Returns:
        By id, `(T, D)`; nothing of passages without codes, or where tokens share vectors.
    """
    codec = passages.codec()
    if codec is None or codec.pooling > 1:
        return {}
    codes = passages.codes.read(list(map(key_of, ids, texts)))
    return {passage_of(key): codec.decompress(code) for key, code in codes.items()}


def stored_scores(
    passages: Passages, query: M3Encoding, ids: Sequence[str], texts: Sequence[str]
) -> tuple[list[int], dict[str, NDArray[np.float32]]]:
    """Scores of passages from what a collection keeps of them.

    Args:
        passages: Of the collection.
        query: One text, with the outputs to score by.
        ids: Of N passages.
        texts: Theirs.

    Returns:
        Rows of the M passages that are stored with these texts and all outputs, and their scores
        by signal, `(M,)` each.
    """
    found: Any = passages.collection.get(ids=list(ids), include=["documents", "embeddings"])
    vectors = dict(zip(found["ids"], found["embeddings"], strict=True))
    stored = dict(zip(found["ids"], found["documents"], strict=True))
    rows = {key_of(p, texts[row]): row for row, p in enumerate(ids) if stored.get(p) == texts[row]}
    needed: list[LexicalWeights | ColbertCodes] = [
        *[passages.weights] * (query.lexical is not None),
        *[passages.codes] * (query.colbert is not None),
    ]
    for companion in needed:
        present = companion.present(list(rows))
        rows = {key: row for key, row in rows.items() if key in present}
    keys = list(rows)
    if not keys:
        return [], {}
    scores = {}
    if query.dense is not None:
        chosen = np.array([vectors[passage_of(key)] for key in keys])  # (M, D)
        scores["dense"] = _cosines(chosen, query.dense[0])
    if query.lexical is not None:
        scores["lexical"] = passages.weights.scores(query.lexical[0]).of(keys)
    codec = passages.codec()
    if query.colbert is not None and codec:
        codes = passages.codes.read(keys)
        scores["colbert"] = codec.maxsim(query.colbert[0], [codes[key] for key in keys])
    return list(rows.values()), scores


def _cosines(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosines of `(N, D)` vectors and a `(D,)` one, `(N,)`; 0 where one has no length."""
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)  # (N,)
    cosines: NDArray[np.float32] = dense_scores(query, vectors) / np.maximum(norms, _SMALLEST)
    return cosines  # (N,)
