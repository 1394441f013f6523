"""BGE-M3 over a Ray Data dataset, for corpora that outgrow one machine.

Needs the extra `ray`. Reading and writing are Ray's own.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_bge_dense._extras import needs

# Before Ray starts: it would report its usage to its makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
with needs("ray", __name__):
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy

from langchain_bge_dense._codes import Codec, Kind, check_kind, colbert_windows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from ray.data import Dataset

    from langchain_bge_dense.embeddings import BGEM3Embeddings

__all__ = ["embed_dataset"]

_ROWS = 2_048  # embedded at once
_CORES = 4  # of one actor, where the machine has more

# Not of a fixed size: pyarrow 25 cannot read nulls of such a column from Parquet.
_VECTOR = pa.list_(pa.float32())
_LEXICAL = pa.map_(pa.int32(), pa.float32())


def embed_dataset(  # noqa: PLR0913
    dataset: Dataset,
    embeddings: BGEM3Embeddings,
    *,
    text_column: str = "text",
    vector_column: str = "vector",
    lexical_column: str | None = None,
    colbert_column: str | None = None,
    colbert: Kind = "1bit",
    colbert_pooling: int = 1,
    error_column: str = "error",
    concurrency: int | tuple[int, int] | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
) -> Dataset:
    """Add a column of dense vectors to a dataset, on all machines of a Ray cluster.

    Actors each load the model once, from the settings of `embeddings`, its token included: they
    have to find the checkpoint under the same id or path, and this package installed. A row whose
    text cannot be embedded keeps its place, with the reason in the error column and null for a
    vector. A block whose actor dies is embedded again by another one, and arrives once. Rows come
    in no certain order, unless Ray is told to keep it.

    Args:
        dataset: Any; with very small blocks the forward passes are small too, which `repartition`
            changes.
        embeddings: The settings of the model. `document_instruction` and `on_truncate` hold.
        text_column: Of strings.
        vector_column: Added, a list of D float32.
        lexical_column: Added where it is named, a map of token id to weight.
        colbert_column: Added where it is named, the passage's ColBERT vectors as codes in binary,
            which `index_vectors` takes with the vector, for a store that keeps codes of this kind.
        colbert: Bits a dimension of a code: `"1bit"`, `"2bit"` or `"int8"`.
        colbert_pooling: Tokens that share a code, on average.
        error_column: Added, null where all is well.
        concurrency: Actors, or the fewest and the most of them; by default as many as the cluster
            has GPUs, or groups of cores, for.
        num_cpus: Cores per actor, and threads of its model. By default 0 with a GPU, else 4
            or all but one of a smaller machine's, as Ray needs one for reading.
        num_gpus: GPUs per actor, a fraction to share one. By default 1 where the cluster has
            some and `embeddings.device` allows them.

    Returns:
        A lazy dataset of the rows with all their columns.

    Raises:
        ValueError: The text column is not there, the name of an added one is taken, or there are
            no such codes.

    Example:
        >>> import ray
        >>> from langchain_bge_dense import BGEM3Embeddings
        >>> dataset = ray.data.from_items([{"text": "equal rights"}, {"text": None}])
        >>> embedded = embed_dataset(dataset, BGEM3Embeddings(model=checkpoint))
        >>> rows = {row["text"]: row for row in embedded.take_all()}
        >>> len(rows["equal rights"]["vector"]), rows[None]["error"]
        (32, 'The text is NoneType, not str. Convert it first, or drop it from the list.')
    """
    check_kind(colbert, colbert_pooling)
    columns = _Columns(text_column, vector_column, lexical_column, error_column, colbert_column)
    _check(columns, dataset.columns() or [])
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    least, most, taken = _actors(machines, embeddings.device, concurrency, num_cpus, num_gpus)
    # Ray would join small blocks to batches of a given size, and fail where their types differ.
    return dataset.map_batches(
        _Embedder,
        fn_constructor_args=(embeddings, columns, colbert, colbert_pooling),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=least, max_size=most),
        **taken,
    )


class _Columns(NamedTuple):
    text: str
    vector: str
    lexical: str | None
    error: str
    colbert: str | None = None


class _Row(NamedTuple):
    """Outputs of one text, or its error."""

    vector: np.ndarray[Any, np.dtype[np.float32]] | None  # (D,)
    weights: dict[int, float] | None
    codes: bytes | None
    error: str | None


class _Embedder:
    """An actor: one loaded model."""

    def __init__(
        self,
        embeddings: BGEM3Embeddings,
        columns: _Columns,
        colbert: Kind = "1bit",
        pooling: int = 1,
    ) -> None:
        self._embeddings = embeddings
        self._columns = columns
        self._codec: Codec | None = None
        self._encode([])  # a model that cannot be loaded ends the job; it is no row's fault
        if columns.colbert is not None:
            self._codec = Codec.of(embeddings, colbert, pooling)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        for start in range(0, max(len(block), 1), _ROWS):
            yield self._embedded(block.slice(start, _ROWS))

    def _embedded(self, table: pa.Table) -> pa.Table:
        text, vector, lexical, error, colbert = self._columns
        given = text in table.column_names  # a file of many may lack the column
        texts = table.column(text).to_pylist() if given else [None] * len(table)
        parts = colbert_windows(texts) if self._codec else [texts]
        rows = [row for part in parts for row in self._encode(part)]
        table = table.append_column(vector, pa.array([row.vector for row in rows], _VECTOR))
        if lexical is not None:
            weights = [None if row.weights is None else list(row.weights.items()) for row in rows]
            table = table.append_column(lexical, pa.array(weights, _LEXICAL))
        if colbert is not None:
            codes = [row.codes for row in rows]
            table = table.append_column(colbert, pa.array(codes, pa.large_binary()))
        return table.append_column(error, pa.array([row.error for row in rows], pa.string()))

    def _encode(self, texts: Sequence[Any]) -> list[_Row]:
        """Embed texts, by halves where one of them is bad."""
        lexical = self._columns.lexical is not None
        try:
            encoding = self._embeddings.encode(texts, lexical=lexical, colbert=bool(self._codec))
        except (TypeError, ValueError, FloatingPointError) as error:
            if not texts:
                raise
            if len(texts) == 1:
                return [_Row(None, None, None, str(error).replace("Text 0 ", "The text ", 1))]
            half = len(texts) // 2
            return self._encode(texts[:half]) + self._encode(texts[half:])
        lacking = [None] * len(texts)
        codes = map(self._codec.compress, encoding.colbert or ()) if self._codec else lacking
        columns: Any = (encoding.dense, encoding.lexical or lacking, codes)
        return [
            _Row(vector, weights, code, None)
            for vector, weights, code in zip(*columns, strict=True)
        ]


def _check(columns: _Columns, there: Sequence[str]) -> None:
    """Check that the text column exists and that the added ones do not."""
    if there and columns.text not in there:
        msg = (
            f"The dataset has no column {columns.text!r}; it has {', '.join(there)}. "
            "Name the one with the texts in text_column."
        )
        raise ValueError(msg)
    taken = {*there, columns.text}
    for kind, name in zip(columns._fields[1:], columns[1:], strict=True):
        if name in taken:
            msg = (
                f"{kind}_column={name!r} is the name of another column. "
                "Take a free one, or drop that column first."
            )
            raise ValueError(msg)
        if name is not None:
            taken.add(name)


def _actors(
    machines: Sequence[Mapping[str, float]],
    device: str,
    concurrency: int | tuple[int, int] | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
) -> tuple[int, int, dict[str, Any]]:
    """Choose the fewest and the most actors, and the resources of each.

    >>> _actors([{"CPU": 16}, {"CPU": 2}], "auto")
    (3, 3, {'num_cpus': 4, 'num_gpus': 0})
    >>> _actors([{"CPU": 16, "GPU": 8}, {"CPU": 16}], "auto")
    (8, 8, {'num_cpus': 0, 'num_gpus': 1})
    """
    cores = [machine.get("CPU", 0) for machine in machines]
    gpus = sum(machine.get("GPU", 0) for machine in machines)
    if num_gpus is None:
        num_gpus = 1 if gpus and device.startswith(("auto", "cuda")) else 0
    if num_cpus is None:
        num_cpus = 0 if num_gpus else min(_CORES, max(cores) - 1)
    if concurrency is None:
        room = gpus // num_gpus if num_gpus else _groups(cores, num_cpus)
        concurrency = max(1, int(room))
    least, most = concurrency if isinstance(concurrency, tuple) else (concurrency, concurrency)
    return least, most, {"num_cpus": num_cpus, "num_gpus": num_gpus}


def _groups(cores: Sequence[float], size: float) -> float:
    """Group the cores of all machines, and leave one core of each out."""
    return sum(max(0, count - 1) // size for count in cores) if size else 1
