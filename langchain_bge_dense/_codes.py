"""ColBERT vectors in few bits: codes of 1, 2 or 8 bits a dimension, and MaxSim from them.

A token's vector is kept as `mean + scale * code`: one mean for all tokens of a model, one scale a
token, and a code a dimension. The query is not compressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from langchain_bge_dense.embeddings import BGEM3Embeddings

Kind = Literal["1bit", "2bit", "int8"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Levels of the best quantiser of four levels for normally distributed numbers of variance 1, and
# the threshold between them (J. Max, "Quantizing for minimum distortion", 1960, table I, N = 4).
_INNER, _OUTER, _THRESHOLD = 0.4528, 1.5104, 0.9816
_PEAK = 127  # of int8 codes
_SMALLEST_SCALE = 6e-8  # float16's own; a vector that equals the mean divides nothing by it
_CHUNK = 1_024  # tokens unpacked at once: what they unpack to stays in the cache
_POOLED = 512  # tokens clustered at once: the time grows with their square

# A mean over tokens of everyday sentences stands for that of all tokens of a model: it takes away
# what they have in common, which would otherwise fix the signs of many dimensions.
_SENTENCES = (
    "The committee met on Thursday to discuss the annual budget.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "How do I return an item that was damaged in transit?",
    "The function returns a list of integers sorted in ascending order.",
    "She opened the window and looked out over the quiet garden.",
    "Patients with high blood pressure should avoid too much salt.",
    "The company reported revenue of 3.2 billion dollars in 2021.",
    "A contract is void if either party was under age when it was signed.",
    "委员会星期四开会讨论年度预算。",
    "海平面上水在一百摄氏度沸腾。",
    "运输途中损坏的商品如何退货？",
    "该函数返回按升序排列的整数列表。",
    "她打开窗户，望着安静的花园。",
    "高血压患者应避免摄入过多的盐。",
    "该公司报告2021年收入为32亿美元。",
    "签订合同时任何一方未成年，合同即无效。",
)


class Codec(NamedTuple):
    """How ColBERT vectors become codes, and scores.

    Attributes:
        kind: Bits a dimension.
        pooling: Tokens that share a vector, on average; 1: each has its own.
        mean: Taken off each vector, `(D,)` float32.
    """

    kind: Kind
    pooling: int
    mean: NDArray[np.float32]

    @classmethod
    def of(cls, embeddings: BGEM3Embeddings, kind: Kind = "1bit", pooling: int = 1) -> Codec:
        """The codec of a model, equal wherever it is made.

        Raises:
            ValueError: The checkpoint has no ColBERT head.
        """
        encoding = embeddings.encode(_SENTENCES, dense=False, colbert=True, instruction="")
        mean = np.concatenate(encoding.colbert or []).mean(axis=0)  # (D,)
        return cls(kind, pooling, mean.astype(np.float16).astype(np.float32))

    def compress(self, vectors: NDArray[np.float32]) -> bytes:
        """Codes of a passage: its kind, a scale a token, and the codes themselves.

        Args:
            vectors: `(T, D)`, of unit length.
        """
        residuals = pooled(vectors, self.pooling) - self.mean  # (P, D)
        scales, codes = _QUANTISERS[self.kind](residuals)  # (P, 1) and (P, B)
        kind = bytes([KINDS.index(self.kind)])
        return kind + scales.astype(np.float16).tobytes() + codes.tobytes()

    def decompress(self, codes: bytes) -> NDArray[np.float32]:
        """Vectors of a passage as its codes have them, `(P, D)`."""
        scales, packed = self._parts(codes)
        vectors: NDArray[np.float32] = self.mean + scales[:, None] * self._unpacked(packed)
        return vectors  # (P, D)

    def check(self, codes: bytes) -> None:
        """Refuse codes of another kind or width.

        Raises:
            ValueError: They are.
        """
        token = 2 + self._width
        if codes[:1] != bytes([KINDS.index(self.kind)]) or (len(codes) - 1) % token:
            msg = (
                f"ColBERT codes of {len(codes):,} bytes are not of {self.kind!r} and "
                f"{len(self.mean):,} dimensions. Compute them with the collection's own settings."
            )
            raise ValueError(msg)

    def maxsim(self, query: NDArray[np.float32], passages: Sequence[bytes]) -> NDArray[np.float32]:
        """`_scoring.maxsim_scores` from codes.

        Args:
            query: ColBERT vectors, `(Q, D)`.
            passages: Codes of N passages.

        Returns:
            Scores, `(N,)`.
        """
        if not passages:
            return np.empty(0, np.float32)
        parts = [self._parts(codes) for codes in passages]
        lengths = [len(scales) for scales, _ in parts]
        scales = np.concatenate([scales for scales, _ in parts])  # (P,)
        packed = np.concatenate([codes for _, codes in parts])  # (P, B)
        products = np.empty((len(query), len(packed)), np.float32)  # (Q, P)
        for start in range(0, len(packed), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            np.matmul(query, self._unpacked(packed[chunk]).T, out=products[:, chunk])
        products *= scales
        starts = np.cumsum([0, *lengths[:-1]])  # (N,)
        best = np.maximum.reduceat(products, starts, axis=1)  # (Q, N)
        scores: NDArray[np.float32] = best.mean(axis=0) + (query @ self.mean).mean()  # (N,)
        return scores

    @property
    def _width(self) -> int:
        """Bytes of a token's codes, B."""
        return -(-len(self.mean) // _PER_BYTE[self.kind])

    def _parts(self, codes: bytes) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Scales `(P,)` and packed codes `(P, B)` of a passage."""
        count = (len(codes) - 1) // (2 + self._width)
        scales = np.frombuffer(codes, np.float16, count, 1).astype(np.float32)
        packed = np.frombuffer(codes, np.uint8, count * self._width, 1 + 2 * count)
        return scales, packed.reshape(count, self._width)

    def _unpacked(self, packed: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Packed codes `(P, B)` as the numbers that a scale is multiplied by, `(P, D)`."""
        if self.kind == "int8":
            return packed.view(np.int8).astype(np.float32)
        levels = _LEVELS[self.kind][packed]  # (P, B, codes of a byte)
        return levels.reshape(len(packed), -1)[:, : len(self.mean)]


def pooled(vectors: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Means of the most similar tokens, a `factor`-th of them (arXiv:2409.14683).

    Args:
        vectors: Of a passage's tokens, `(T, D)`, of unit length.
        factor: Tokens per cluster on average.

    Returns:
        Means of Ward's clusters, `(P, D)`; neighbours alone are clustered in long passages.
    """
    if factor == 1 or len(vectors) <= factor:
        return vectors
    parts = np.array_split(vectors, -(-len(vectors) // _POOLED))
    return np.concatenate([_clustered(part, factor) for part in parts])


def _clustered(vectors: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    from scipy.cluster.hierarchy import fcluster, linkage

    count = len(vectors)
    cosines: NDArray[np.float32] = vectors @ vectors.T
    distances = np.sqrt(np.maximum(2 - 2 * cosines, 0))  # (T, T)
    tree = linkage(distances[np.triu_indices(count, 1)], "ward")
    labels = fcluster(tree, max(1, count // factor), "maxclust") - 1  # (T,)
    sums = np.zeros((labels.max() + 1, vectors.shape[1]), np.float32)  # (P, D)
    np.add.at(sums, labels, vectors)
    means = sums / np.bincount(labels)[:, None]  # (P, D)
    return means.astype(np.float32)


Quantised = tuple["NDArray[np.float32]", "NDArray[np.uint8]"]


def _signs(residuals: NDArray[np.float32]) -> Quantised:
    scales = np.abs(residuals).mean(axis=1, keepdims=True)  # (P, 1)
    return scales, np.packbits(residuals > 0, axis=1)


def _four_levels(residuals: NDArray[np.float32]) -> Quantised:
    scales = np.sqrt(np.square(residuals).mean(axis=1, keepdims=True))  # (P, 1)
    outer = np.abs(residuals) > _THRESHOLD * scales
    bits = np.stack([residuals > 0, outer], axis=2).reshape(len(residuals), -1)  # (P, 2 D)
    return scales, np.packbits(bits, axis=1)


def _int8(residuals: NDArray[np.float32]) -> Quantised:
    scales = np.abs(residuals).max(axis=1, keepdims=True) / _PEAK  # (P, 1)
    scales = np.maximum(scales.astype(np.float16), _SMALLEST_SCALE).astype(np.float32)
    return scales, np.clip(np.rint(residuals / scales), -_PEAK, _PEAK).astype(np.int8).view(
        np.uint8
    )


_QUANTISERS = {"1bit": _signs, "2bit": _four_levels, "int8": _int8}
_PER_BYTE = {"1bit": 8, "2bit": 4, "int8": 1}


def _levels() -> dict[str, NDArray[np.float32]]:
    """What each byte of codes unpacks to, `(256, codes of a byte)`."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)  # (256, 8)
    signs = bits * np.float32(2) - 1
    magnitudes = np.where(bits[:, 1::2], np.float32(_OUTER), np.float32(_INNER))  # (256, 4)
    return {"1bit": signs, "2bit": signs[:, ::2] * magnitudes}


_LEVELS = _levels()
