"""Settings of a collection: its model and its signals."""

from __future__ import annotations

import base64
import json
import re
import shlex
import uuid
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from langchain_bge_dense._codes import Codec, check_kind
from langchain_bge_dense._scoring import cosines
from langchain_bge_dense.embeddings import BGEM3Embeddings
from langchain_bge_dense.errors import AnotherModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chromadb.api.models.Collection import Collection
    from langchain_core.embeddings import Embeddings
    from typing_extensions import Self

    from langchain_bge_dense._codes import Kind

KEY = "langchain_bge_dense"
"""Key of the settings in a collection's metadata."""

# With Chroma's own, equal vectors are linked to each other alone, and hide others.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "hnsw": {"space": "cosine", "max_neighbors": 48, "ef_construction": 400, "ef_search": 400},
    "spann": {"space": "cosine"},
}
SAME_COSINE = 0.99
"""Lowest cosine of two vectors of one text by one model, in any dtype."""
_SAMPLE = 10  # stored documents of which the shortest is embedded again
_ALTERNATIVE = (
    "take another collection_name, or delete the collection and index its documents again."
)


class CollectionSettings(NamedTuple):
    """Settings of one collection, a JSON value in its metadata.

    Attributes:
        fingerprint: Names the model, and whatever else changes its vectors.
        dimension: Width of a vector.
        uid: Identifier that compaction does not change.
        lexical: Whether passages have lexical weights.
        colbert: Kind of their ColBERT codes; None where they have none.
        pooling: Tokens that share a ColBERT vector.
        mean: Of ColBERT vectors, float16 in Base64; empty until the first are stored.
    """

    fingerprint: str
    dimension: int
    uid: str = ""
    lexical: bool = False
    colbert: Kind | None = None
    pooling: int = 1
    mean: str = ""

    @classmethod
    def of(cls, embeddings: Embeddings) -> Self:
        """Make settings of a new collection for any embeddings, which may have to embed a query."""
        dimension = getattr(underlying(embeddings), "dimension", None)
        if not isinstance(dimension, int):
            dimension = len(embeddings.embed_query("dimension"))
        return cls(fingerprint_of(embeddings), dimension, uuid.uuid4().hex)

    @classmethod
    def load(cls, metadata: Mapping[str, Any] | None) -> Self | None:
        """Read the settings of a collection, which has none if another program made it."""
        stored = json.loads((metadata or {}).get(KEY, "{}"))
        return cls(**{key: stored[key] for key in cls._fields if key in stored}) if stored else None

    def metadata(self) -> dict[str, str]:
        """Make the metadata that hold these settings."""
        return {KEY: json.dumps(self._asdict())}

    def renewed(self) -> Self:
        """Copy these settings for other passages."""
        return self._replace(uid=uuid.uuid4().hex)

    def codec(self) -> Codec | None:
        """Make the codec of the ColBERT vectors, if any are stored."""
        if self.colbert is None or not self.mean:
            return None
        mean = np.frombuffer(base64.b64decode(self.mean), np.float16).astype(np.float32)  # (D,)
        return Codec(self.colbert, self.pooling, mean)

    def with_mean_of(self, model: BGEM3Embeddings) -> Self:
        """Add the mean of the model's ColBERT vectors."""
        mean = Codec.of(model, self.colbert or "1bit").mean.astype(np.float16)
        return self._replace(mean=base64.b64encode(mean.tobytes()).decode())

    def signals(self) -> str:
        """Name the signals that the collection stores."""
        codes = f"{self.colbert!r} ColBERT codes with colbert_pooling={self.pooling}"
        return " and ".join(["lexical weights"] * self.lexical + [codes] * bool(self.colbert))


class Wanted(NamedTuple):
    """Requested signals; None means those of the collection."""

    lexical: bool | None = None
    colbert: Kind | Literal[False] | None = None
    pooling: int = 1

    @classmethod
    def of(cls, lexical: bool | None, colbert: Kind | bool | None, pooling: int) -> Wanted:
        """Check and normalize the arguments of a caller."""
        kind: Any = "1bit" if colbert is True else colbert
        check_kind("1bit" if kind is None or kind is False else kind, pooling)
        return cls(lexical, kind, pooling)

    def check(self, embeddings: Embeddings) -> None:
        """Check that the embeddings can produce the requested signals."""
        options = {"lexical=True": self.lexical, f"colbert={self.colbert!r}": self.colbert}
        wanted = [option for option, value in options.items() if value]
        if wanted and not isinstance(underlying(embeddings), BGEM3Embeddings):
            msg = (
                f"{' and '.join(wanted)} needs BGEM3Embeddings, and {type(embeddings).__name__} "
                "computes dense vectors alone. Open the store with the former, or leave it out."
            )
            raise TypeError(msg)

    def added_to(self, found: CollectionSettings, name: str) -> CollectionSettings:
        """Add the requested signals to the settings of a collection, which cannot change others."""
        refused = ""
        if self.lexical is False and found.lexical:
            refused = "lexical=False"
        elif found.colbert and self.colbert not in {None, found.colbert}:
            refused = f"colbert={self.colbert!r}"
        elif found.colbert and self.colbert and self.pooling != found.pooling:
            refused = f"colbert={self.colbert!r} with colbert_pooling={self.pooling}"
        if refused:
            msg = (
                f"{refused} was requested, and collection {name!r} has {found.signals()}. "
                "Leave it out, or take another collection_name."
            )
            raise ValueError(msg)
        if self.colbert and not found.colbert:
            found = found._replace(colbert=self.colbert, pooling=self.pooling)
        return found._replace(lexical=bool(self.lexical) or found.lexical)


def underlying(embeddings: Embeddings) -> Embeddings:
    """Find the embeddings behind caches and other wrappers."""
    while (inner := getattr(embeddings, "underlying_embeddings", None)) is not None:
        embeddings = inner
    return embeddings


def fingerprint_of(embeddings: Embeddings) -> str:
    """Name the innermost embeddings by fingerprint, or by class and model.

    >>> from langchain_core.embeddings import DeterministicFakeEmbedding
    >>> fingerprint_of(DeterministicFakeEmbedding(size=8))
    'langchain_core.embeddings.fake.DeterministicFakeEmbedding'
    """
    embeddings = underlying(embeddings)
    kind = type(embeddings)
    values = [getattr(embeddings, name, None) for name in ("fingerprint", "model", "model_name")]
    own, *models = [value if isinstance(value, str) else None for value in values]
    model = next(filter(None, models), "")
    return own or f"{kind.__module__}.{kind.__qualname__} {model}".rstrip()


def same_model(one: str, other: str) -> bool:
    """Compare the models of two fingerprints, by their digests where both have one.

    >>> same_model("bge-m3-3f2a9c81d0e4-cls", "a-copy-3f2a9c81d0e4-cls")
    True
    """
    return _without_name(one) == _without_name(other)


def _without_name(fingerprint: str) -> str:
    return re.sub(r"^.*?-(?=[0-9a-f]{12}-(?:cls|mean))", "", fingerprint)


def cosine_configuration(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Configure a collection in cosine space, whose graph keeps equal vectors in reach."""
    configuration = dict(given or {})
    index = "spann" if configuration.get("spann") else "hnsw"
    settings = {**_DEFAULTS[index], **(configuration.get(index) or {})}
    require_cosine(settings["space"], "collection_configuration")
    return {**configuration, index: settings}


def require_cosine(space: str, where: str) -> None:
    """Check that a space is cosine."""
    if space != "cosine":
        msg = (
            f"The {where} sets the space {space!r}, and a store needs 'cosine'. "
            "Leave the space out, or set it to 'cosine'."
        )
        raise ValueError(msg)


def add_metadata(collection: Collection, metadata: Mapping[str, Any]) -> None:
    """Add to the metadata of a collection."""
    # Chroma takes no hnsw:space here; the configuration holds the space.
    stored = {k: v for k, v in (collection.metadata or {}).items() if k != "hnsw:space"}
    if stored != {**stored, **metadata}:
        collection.modify(metadata={**stored, **metadata})


def claim(
    collection: Collection, embeddings: Embeddings, own: CollectionSettings, location: str
) -> CollectionSettings:
    """Check that the embeddings fit a collection, and write settings to one that has none.

    Without settings, a stored document is embedded again and compared with its vector.
    """
    _check_space(collection, embeddings, location)
    found = CollectionSettings.load(collection.metadata)
    if found is None:
        _check_vectors(collection, embeddings, own)
        found = own.renewed()
        add_metadata(collection, found.metadata())
    check_model(collection.name, found, own.fingerprint)
    _check_dimension(collection.name, found.dimension, own)
    return found


def check_model(name: str, found: CollectionSettings, fingerprint: str) -> None:
    """Check that a collection holds vectors of a model."""
    if not same_model(found.fingerprint, fingerprint):
        msg = (
            f"Collection {name!r} holds vectors of {found.fingerprint!r}, not of {fingerprint!r}. "
            f"Open it with the first model, {_ALTERNATIVE}"
        )
        raise AnotherModelError(msg)


def _check_space(collection: Collection, embeddings: Embeddings, location: str) -> None:
    configuration = collection.configuration_json
    index = configuration.get("hnsw") or configuration.get("spann") or {}
    space = index.get("space", "l2")
    if space != "cosine":
        msg = (
            f"Collection {collection.name!r} has the space {space!r}, not 'cosine'. To take its "
            "vectors over without computing them again, pass the same arguments to adopt of "
            f"langchain_bge_dense.chroma{_command(collection.name, embeddings, location)}. "
            "Or take another collection_name."
        )
        raise ValueError(msg)


def _command(name: str, embeddings: Embeddings, location: str) -> str:
    """Write the command that adopts a collection which another process can open."""
    model = underlying(embeddings)
    if not location or not isinstance(model, BGEM3Embeddings):
        return ""
    parts = ["python", "-m", "langchain_bge_dense.chroma", "adopt", location]
    parts += ["--collection", name]
    for field in ("model", "base_url"):
        if (value := getattr(model, field)) != BGEM3Embeddings.model_fields[field].default:
            parts += [f"--{field.replace('_', '-')}", value]
    return f", or type: {shlex.join(parts)}"


def _check_dimension(name: str, stored: int, own: CollectionSettings) -> None:
    if stored != own.dimension:
        msg = (
            f"Collection {name!r} holds vectors of {stored} numbers, and those of "
            f"{own.fingerprint!r} have {own.dimension}. "
            f"Open it with the first model, {_ALTERNATIVE}"
        )
        raise AnotherModelError(msg)


def _check_vectors(collection: Collection, embeddings: Embeddings, own: CollectionSettings) -> None:
    """Check that a collection of another program is empty, or of the embeddings."""
    sample = collection.get(limit=_SAMPLE, include=["documents", "embeddings"])
    vectors = sample["embeddings"]
    if vectors is not None and len(vectors):
        _check_dimension(collection.name, len(vectors[0]), own)
        _check_stored_texts(collection.name, sample["documents"] or [], vectors, embeddings)


def _check_stored_texts(
    name: str, documents: Sequence[str | None], vectors: Any, embeddings: Embeddings
) -> None:
    texts = [(text, vector) for text, vector in zip(documents, vectors, strict=True) if text]
    if not texts:
        msg = (
            f"Collection {name!r} has vectors and no texts, so that nothing shows which "
            f"model filled it. {_ALTERNATIVE.capitalize()}"
        )
        raise ValueError(msg)
    text, stored = min(texts, key=lambda pair: len(pair[0]))
    [cosine] = cosines(np.asarray([stored]), np.asarray(embeddings.embed_documents([text])[0]))
    if not cosine >= SAME_COSINE:
        msg = (
            f"Collection {name!r} was filled by another model than "
            f"{fingerprint_of(embeddings)!r}: a stored text embedded again has cosine {cosine:.3f} "
            f"to its stored vector. Open it with the first model, {_ALTERNATIVE}"
        )
        raise AnotherModelError(msg)
