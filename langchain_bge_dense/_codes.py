"""ColBERT vectors in few bits: codes of 1, 2 or 8 bits a dimension, and MaxSim from them.

A token's vector is kept as `mean + scale * code`: one mean for all tokens of a model, one scale a
token, and a code a dimension. The scale is the one by which the vector's product with itself is
right, so that scores have no bias (RaBitQ, arXiv:2405.12497). The query is not compressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from langchain_bge_dense._engine.calls import windows
from langchain_bge_dense._scoring import product

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from langchain_bge_dense.embeddings import BGEM3Embeddings

Kind = Literal["1bit", "2bit", "int8"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# The best quantiser of normally distributed numbers of variance 1 to four levels has them at
# 0.4528 and 1.5104 on each side, 3 to 10, and changes between them at 0.9816 (J. Max, "Quantizing
# for minimum distortion", 1960, table I, N = 4). A code is the lowest level and what its bits add.
_THRESHOLD = 0.9816
_LOWEST = {"1bit": -1, "2bit": -10, "int8": 0}
_BITS = {"1bit": (2,), "2bit": (13, 7)}
_PEAK = 127  # of int8 codes
_SMALLEST = 1e-12  # of what is divided by: a vector that equals the mean has no residual
_CHUNK = 2_048  # tokens unpacked at once
_CHARACTERS = 1 << 16  # of texts encoded at once: at most as many tokens, of 4 KiB each
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
    """A codec of ColBERT vectors, which scores their codes, too.

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
        """Make the codec of a model, which is equal wherever it is made."""
        session = embeddings.session()
        options = session.documents._replace(instruction="", on_truncate="ignore")
        encoding = embeddings.engine().encode(_SENTENCES, options, dense=False, colbert=True)
        mean = np.concatenate(encoding.colbert or []).mean(axis=0)  # (D,)
        return cls(kind, pooling, mean.astype(np.float16).astype(np.float32))

    def compress(self, vectors: NDArray[np.float32]) -> bytes:
        """Compress `(T, D)` vectors of a passage: its kind, a scale for each token, the codes."""
        residuals = pooled(vectors, self.pooling) - self.mean  # (P, D)
        packed = _QUANTISERS[self.kind](residuals)  # (P, B)
        units = self._levels(packed)  # (P, D)
        products = np.einsum("pd,pd->p", residuals, units)  # (P,)
        squares = np.einsum("pd,pd->p", residuals, residuals)  # (P,)
        scales = squares / np.maximum(products, _SMALLEST)  # (P,)
        parts = (np.uint8(KINDS.index(self.kind)), scales.astype(np.float16), packed)
        return b"".join(part.tobytes() for part in parts)

    def decompress(self, codes: bytes) -> NDArray[np.float32]:
        """Restore the vectors of a passage from its codes, `(P, D)`."""
        scales, packed = self._parts(codes)
        vectors: NDArray[np.float32] = self.mean + scales[:, None] * self._levels(packed)
        return vectors  # (P, D)

    def check(self, codes: bytes) -> None:
        """Check that codes have this kind and width."""
        token = 2 + self._width
        if codes[:1] != bytes([KINDS.index(self.kind)]) or (len(codes) - 1) % token:
            msg = (
                f"ColBERT codes of {len(codes):,} bytes are not of {self.kind!r} and "
                f"{len(self.mean):,} dimensions. Compute them with the collection's own settings."
            )
            raise ValueError(msg)

    def maxsim(self, query: NDArray[np.float32], passages: Sequence[bytes]) -> NDArray[np.float32]:
        """Compute `_scoring.maxsim_scores` of `(Q, D)` vectors from codes of N passages, `(N,)`."""
        if not passages:
            return np.empty(0, np.float32)
        parts = [self._parts(codes) for codes in passages]
        scales = np.concatenate([scales for scales, _ in parts])  # (P,)
        products = self._products(np.concatenate([codes for _, codes in parts]), query)  # (P, Q)
        products *= scales[:, None]
        starts = np.cumsum([0, *(len(scales) for scales, _ in parts[:-1])])  # (N,)
        best = np.maximum.reduceat(products, starts, axis=0)  # (N, Q)
        scores: NDArray[np.float32] = best.mean(axis=1) + product(query, self.mean).mean()  # (N,)
        return scores

    def _products(
        self, packed: NDArray[np.uint8], query: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Multiply codes by query vectors, `(P, Q)`. A bit counts as much as it adds to a level."""
        values = _BITS.get(self.kind, (1,))
        weights = np.kron(query.T, np.array(values, np.float32)[:, None])  # (D bits, Q)
        products = np.empty((len(packed), len(query)), np.float32)  # (P, Q)
        numbers = np.empty((min(_CHUNK, len(packed)), len(weights)), np.float32)
        for start in range(0, len(packed), _CHUNK):
            rows = numbers[: len(packed) - start]
            rows[:] = self._numbers(packed[start : start + _CHUNK])
            products[start : start + _CHUNK] = product(rows, weights)
        products += _LOWEST[self.kind] * query.sum(axis=1)
        return products

    def _numbers(self, packed: NDArray[np.uint8]) -> NDArray[np.uint8 | np.int8]:
        """Unpack codes `(P, B)` to bits, `(P, D bits)`, or to integers of 8 bits."""
        if self.kind == "int8":
            return packed.view(np.int8)
        return np.unpackbits(packed, axis=1, count=len(self.mean) * len(_BITS[self.kind]))

    @property
    def _width(self) -> int:
        """Bytes of a token's codes, B."""
        return -(-len(self.mean) // _PER_BYTE[self.kind])

    def _parts(self, codes: bytes) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Split the codes of a passage into scales `(P,)` and packed codes `(P, B)`."""
        count = (len(codes) - 1) // (2 + self._width)
        scales = np.frombuffer(codes, np.float16, count, 1).astype(np.float32)
        packed = np.frombuffer(codes, np.uint8, count * self._width, 1 + 2 * count)
        return scales, packed.reshape(count, self._width)

    def _levels(self, packed: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Unpack codes `(P, B)` to the numbers that a scale is multiplied by, `(P, D)`."""
        numbers = self._numbers(packed).reshape(len(packed), len(self.mean), -1)
        values = np.array(_BITS.get(self.kind, (1,)), np.float32)
        levels: NDArray[np.float32] = numbers @ values + np.float32(_LOWEST[self.kind])
        return levels  # (P, D)


def check_kind(kind: object, pooling: int) -> None:
    """Check kind and pooling of codes."""
    if kind not in KINDS or pooling < 1:
        msg = (
            f"colbert={kind!r} with colbert_pooling={pooling} is not supported. "
            f"Use one of {', '.join(map(repr, KINDS))}, and a pooling of 1 or more."
        )
        raise ValueError(msg)


def colbert_windows(texts: Sequence[Any]) -> Iterator[list[Any]]:
    """Split texts into windows whose ColBERT vectors fit into memory."""
    return windows(texts, lambda text: len(str(text)), _CHARACTERS)


def pooled(vectors: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Pool `(T, D)` vectors into directions of the most similar tokens' means (arXiv:2409.14683).

    Each of Ward's clusters, of `factor` tokens on average, gives a vector as long as its tokens'
    are on average, `(P, D)`; in long passages clusters are of neighbouring tokens alone.
    """
    if factor == 1 or len(vectors) <= factor:
        return vectors
    parts = np.array_split(vectors, -(-len(vectors) // _POOLED))
    return np.concatenate([_clustered(part, factor) for part in parts])


def _clustered(vectors: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    from scipy.cluster.hierarchy import fcluster, linkage

    squares = np.square(vectors).sum(axis=1)  # (T,)
    distances = squares[:, None] + squares - 2 * product(vectors, vectors.T)  # (T, T)
    pairs = np.sqrt(np.maximum(distances[np.triu_indices(len(vectors), 1)], 0))
    tree = linkage(pairs, "ward")
    labels = fcluster(tree, max(1, len(vectors) // factor), "maxclust") - 1  # (T,)
    sums = np.zeros((labels.max() + 1, vectors.shape[1]), np.float32)  # (P, D)
    np.add.at(sums, labels, vectors)
    lengths = np.bincount(labels, np.sqrt(squares)) / np.bincount(labels)  # (P,)
    norms = np.maximum(np.linalg.norm(sums, axis=1), _SMALLEST)  # (P,)
    sums *= (lengths / norms)[:, None]
    return sums


def _signs(residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.packbits(residuals > 0, axis=1)


def _four_levels(residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
    deviations = np.sqrt(np.square(residuals).mean(axis=1, keepdims=True))  # (P, 1)
    positive, outer = residuals > 0, np.abs(residuals) > _THRESHOLD * deviations
    bits = np.stack([positive, positive == outer], axis=2).reshape(len(residuals), -1)  # (P, 2 D)
    return np.packbits(bits, axis=1)


def _integers(residuals: NDArray[np.float32]) -> NDArray[np.uint8]:
    steps = np.abs(residuals).max(axis=1, keepdims=True) / _PEAK  # (P, 1)
    codes: NDArray[np.int8] = np.rint(residuals / np.maximum(steps, _SMALLEST)).astype(np.int8)
    return codes.view(np.uint8)


_QUANTISERS = {"1bit": _signs, "2bit": _four_levels, "int8": _integers}
_PER_BYTE = {"1bit": 8, "2bit": 4, "int8": 1}
