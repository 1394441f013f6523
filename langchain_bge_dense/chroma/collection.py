"""A Chroma collection: its client, its space, and which model its vectors are of."""

from __future__ import annotations

import os
import re
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import chromadb
import numpy as np
from chromadb.config import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection
    from langchain_core.embeddings import Embeddings

FINGERPRINT = "embedding_fingerprint"
DIMENSION = "embedding_dimension"
LEXICAL = "lexical_weights"
COLBERT = "colbert_codes"  # their kind
COLBERT_POOLING = "colbert_pooling"
COLBERT_MEAN = "colbert_mean"  # float16 in base64
UID = "passages_uid"  # names what belongs to the passages; stays when the collection is compacted

_SAME_COSINE = 0.99  # of one text by one model, in any dtype
_SAMPLE = 10  # stored documents of which the shortest is embedded again
_ALTERNATIVE = (
    "take another collection_name, or delete the collection and index its documents again."
)


class Identity(NamedTuple):
    """What has to be equal for vectors to be comparable.

    Attributes:
        fingerprint: Names the model and whatever else changes its vectors.
        dimension: Width of a vector.
    """

    fingerprint: str
    dimension: int

    @classmethod
    def of(cls, embeddings: Embeddings) -> Identity:
        """Identity of any embeddings; without a `dimension` of their own one query is embedded."""
        dimension = getattr(underlying(embeddings), "dimension", None)
        if not isinstance(dimension, int):
            dimension = len(embeddings.embed_query("dimension"))
        return cls(fingerprint_of(embeddings), dimension)

    def metadata(self) -> dict[str, str | int]:
        """As it is written to a collection."""
        return {FINGERPRINT: self.fingerprint, DIMENSION: self.dimension}


def underlying(embeddings: Embeddings) -> Embeddings:
    """The embeddings behind caches and other wrappers."""
    while (inner := getattr(embeddings, "underlying_embeddings", None)) is not None:
        embeddings = inner
    return embeddings


def fingerprint_of(embeddings: Embeddings) -> str:
    """The fingerprint of what really embeds, else its class and the name of its model.

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
    """Whether two fingerprints name one model: by its digest where both have one.

    >>> same_model("bge-m3-3f2a9c81d0e4-cls", "a-copy-3f2a9c81d0e4-cls")
    True
    """
    return _without_name(one) == _without_name(other)


def _without_name(fingerprint: str) -> str:
    return re.sub(r"^.*?-(?=[0-9a-f]{12}-(?:cls|mean))", "", fingerprint)


def local_client(path: str | None, **names: str) -> ClientAPI:
    """A client of the Chroma in this process, on disk or in memory.

    Args:
        path: Where the data is kept; None: a database in memory that nobody else has.
        names: `tenant` and `database`, as in Chroma.
    """
    # Chroma gives one folder, and memory, to clients of equal settings alone. So the caller's own
    # ones get no telemetry either, and where they were here first, theirs is left as it is.
    os.environ.setdefault("ANONYMIZED_TELEMETRY", "False")
    try:
        return _start(path, Settings(anonymized_telemetry=False), **names)
    except ValueError as error:
        if "different settings" not in str(error):
            raise
        return _start(path, Settings(anonymized_telemetry=True), **names)


def _start(path: str | None, settings: Settings, **names: str) -> ClientAPI:
    if path is not None:
        return chromadb.PersistentClient(path, settings, **names)
    if not names:
        names = {"database": uuid.uuid4().hex}
        chromadb.AdminClient(settings).create_database(names["database"])
    return chromadb.EphemeralClient(settings, **names)


def cosine_configuration(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A collection configuration with cosine for its space.

    Raises:
        ValueError: It names another space.
    """
    configuration = dict(given or {})
    index = "spann" if configuration.get("spann") else "hnsw"
    settings = {"space": "cosine", **(configuration.get(index) or {})}
    require_cosine(settings["space"], "collection_configuration")
    return {**configuration, index: settings}


def require_cosine(space: str, where: str) -> None:
    """Refuse another space than cosine.

    Raises:
        ValueError: It is another.
    """
    if space != "cosine":
        msg = (
            f"The {where} names the space {space!r}, and scores here are cosines. "
            "Leave the space out, or say 'cosine'."
        )
        raise ValueError(msg)


def claim(collection: Collection, embeddings: Embeddings, identity: Identity) -> None:
    """Check that the embeddings fit the collection, and write their identity to one that has none.

    Args:
        collection: As Chroma gives it now.
        embeddings: Embed a stored document again where the collection does not name its model.
        identity: Of the embeddings.

    Raises:
        ValueError: The collection has another space, or its vectors are another model's.
    """
    _check_space(collection)
    if FINGERPRINT in (collection.metadata or {}):
        check(collection, identity.fingerprint)
        stored = collection.metadata.get(DIMENSION, identity.dimension)
        _check_dimension(collection, stored, identity)
    else:
        _adopt(collection, embeddings, identity)


def check(collection: Collection, fingerprint: str) -> None:
    """Refuse embeddings other than those that the collection names.

    Raises:
        ValueError: It names others, or none.
    """
    stored = (collection.metadata or {}).get(FINGERPRINT)
    if stored is None:
        msg = (
            f"Collection {collection.name!r} does not say which model filled it. "
            "Open it with open_chroma, which checks that."
        )
        raise ValueError(msg)
    if not same_model(stored, fingerprint):
        msg = (
            f"Collection {collection.name!r} holds vectors of {stored!r}, not of {fingerprint!r}. "
            f"Open it with the first model, {_ALTERNATIVE}"
        )
        raise ValueError(msg)


def add_metadata(collection: Collection, **added: Any) -> None:
    """Write to a collection's metadata what it lacks or has otherwise."""
    # Chroma takes no hnsw:space here; the configuration holds the space.
    stored = {k: v for k, v in (collection.metadata or {}).items() if k != "hnsw:space"}
    if stored != {**stored, **added}:
        collection.modify(metadata={**stored, **added})


def _check_space(collection: Collection) -> None:
    configuration = collection.configuration_json
    index = configuration.get("hnsw") or configuration.get("spann") or {}
    space = index.get("space", "l2")
    if space != "cosine":
        msg = (
            f"Collection {collection.name!r} has the space {space!r}, which cannot be changed to "
            f"'cosine'. {_ALTERNATIVE.capitalize()}"
        )
        raise ValueError(msg)


def _check_dimension(collection: Collection, stored: int, identity: Identity) -> None:
    if stored != identity.dimension:
        msg = (
            f"Collection {collection.name!r} holds vectors of {stored} numbers, and those of "
            f"{identity.fingerprint!r} have {identity.dimension}. "
            f"Open it with the first model, {_ALTERNATIVE}"
        )
        raise ValueError(msg)


def _adopt(collection: Collection, embeddings: Embeddings, identity: Identity) -> None:
    sample = collection.get(limit=_SAMPLE, include=["documents", "embeddings"])
    vectors = sample["embeddings"]
    if vectors is not None and len(vectors):
        _check_dimension(collection, len(vectors[0]), identity)
        _check_sample(collection, sample["documents"] or [], vectors, embeddings)
    add_metadata(collection, **identity.metadata())


def _check_sample(
    collection: Collection,
    documents: Sequence[str | None],
    vectors: Any,
    embeddings: Embeddings,
) -> None:
    texts = [(text, vector) for text, vector in zip(documents, vectors, strict=True) if text]
    if not texts:
        msg = (
            f"Collection {collection.name!r} has vectors and no texts, so that nothing shows which "
            f"model filled it. {_ALTERNATIVE.capitalize()}"
        )
        raise ValueError(msg)
    text, stored = min(texts, key=lambda pair: len(pair[0]))
    cosine = _cosine(np.asarray(stored), np.asarray(embeddings.embed_documents([text])[0]))
    if not cosine >= _SAME_COSINE:
        msg = (
            f"Collection {collection.name!r} was filled by another model than "
            f"{fingerprint_of(embeddings)!r}: a stored text embedded again has cosine {cosine:.3f} "
            f"to its stored vector. Open it with the first model, {_ALTERNATIVE}"
        )
        raise ValueError(msg)


def _cosine(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))
