"""`M3Encoding` as bytes between a server and its clients: safetensors, float32 to the last bit."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load, save

from langchain_bge_dense._engine.outputs import M3Encoding

if TYPE_CHECKING:
    from collections.abc import Sequence, Sized

    from numpy.typing import NDArray

MEDIA_TYPE = "application/vnd.safetensors"


def pack(encoding: M3Encoding) -> bytes:
    """Pack an encoding of N texts into bytes, output after output.

    Returns:
        A safetensors file of `token_counts` `(N,)`, `truncated` `(N,)`, and, as asked for, `dense`
        `(N, D)`, `lexical_sizes` `(N,)`, `lexical_ids` `(S,)`, `lexical_weights` `(S,)`,
        `colbert_sizes` `(N,)` and `colbert` `(S, D)`.
    """
    tensors: dict[str, NDArray[Any]] = {
        "token_counts": encoding.token_counts,
        "truncated": encoding.truncated,
    }
    if encoding.dense is not None:
        tensors["dense"] = encoding.dense
    if (rows := encoding.lexical) is not None:
        tensors["lexical_sizes"] = _sizes(rows)
        tensors["lexical_ids"] = np.array([id_ for row in rows for id_ in row], np.int32)
        weights = [weight for row in rows for weight in row.values()]
        tensors["lexical_weights"] = np.array(weights, np.float32)
    if encoding.colbert is not None:
        tensors["colbert_sizes"] = _sizes(encoding.colbert)
        if encoding.colbert:
            tensors["colbert"] = np.concatenate(encoding.colbert)
    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def unpack(replies: Sequence[bytes]) -> M3Encoding:
    """Join the replies of one call, at least one, each with the next texts."""
    parts = [load(reply) for reply in replies]

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([part[name] for part in parts if name in part])

    dense = lexical = colbert = None
    if "dense" in parts[0]:
        dense = joined("dense")  # (N, D)
    if "lexical_sizes" in parts[0]:
        ids, weights = joined("lexical_ids").tolist(), joined("lexical_weights").tolist()
        lexical = [
            dict(zip(ids[start:stop], weights[start:stop], strict=True))
            for start, stop in pairwise(_bounds(joined("lexical_sizes")))
        ]
    if "colbert_sizes" in parts[0]:
        vectors = joined("colbert")  # (S, D)
        colbert = [
            vectors[start:stop] for start, stop in pairwise(_bounds(joined("colbert_sizes")))
        ]
    return M3Encoding(dense, lexical, colbert, joined("token_counts"), joined("truncated"))


def _sizes(rows: Sequence[Sized]) -> NDArray[np.int64]:
    return np.array([len(row) for row in rows], np.int64)


def _bounds(sizes: NDArray[np.int64]) -> list[int]:
    return [0, *np.cumsum(sizes).tolist()]
