"""`BGEM3Chroma`: a LangChain `Chroma` store that stays consistent."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.utils.iter import batch_iterate

from langchain_bge_dense._engine.calls import check_text, checked_texts
from langchain_bge_dense.chroma.passages import Passages
from langchain_bge_dense.chroma.records import Record, check_id, checked_metadata, record
from langchain_bge_dense.chroma.session import connect
from langchain_bge_dense.chroma.settings import (
    CollectionSettings,
    Wanted,
    cosine_configuration,
    require_cosine,
)

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from chromadb.api import ClientAPI
    from typing_extensions import Self

    from langchain_bge_dense._codes import Kind
    from langchain_bge_dense.chroma.session import Session

_BATCH = 1_000  # documents embedded and written at once
_NAME = re.compile(r"(?!.*\.\.)[a-zA-Z0-9][a-zA-Z0-9._-]{1,510}[a-zA-Z0-9]")
_CLIENT_OPTIONS = (
    "client_settings",
    "host",
    "port",
    "ssl",
    "headers",
    "chroma_cloud_api_key",
    "tenant",
    "database",
)
_LOCATIONS = ("persist_directory", "client", "host", "chroma_cloud_api_key")


class BGEM3Chroma(Chroma):
    """A `Chroma` store in cosine space that updates all signals of a passage together.

    `open_chroma` returns one; use the class for type annotations. Whatever adds, updates or deletes
    documents, LangChain's `index()` included, writes and deletes their lexical weights too, and
    passes the checks of `index_documents`.

    Args:
        collection_name: 3 to 512 characters of `[a-zA-Z0-9._-]`.
        embedding_function: Any LangChain embeddings.
        persist_directory: A folder, made if it does not exist.
        client: A Chroma client of your own, `chromadb.HttpClient(...)` for example.
        lexical: As in `open_chroma`.
        colbert: As in `open_chroma`.
        colbert_pooling: As in `open_chroma`.
        chroma_options: As in `open_chroma`.
    """

    def __init__(  # noqa: PLR0913 - those of `open_chroma`
        self,
        collection_name: str = "langchain",
        embedding_function: Embeddings | None = None,
        persist_directory: str | os.PathLike[str] | None = None,
        *,
        client: ClientAPI | None = None,
        lexical: bool | None = None,
        colbert: Kind | bool | None = None,
        colbert_pooling: int = 1,
        **chroma_options: Any,
    ) -> None:
        embeddings = _checked(embedding_function, collection_name)
        options = {key: value for key, value in chroma_options.items() if value is not None}
        wanted = Wanted.of(lexical, colbert, colbert_pooling)
        wanted.check(embeddings)
        own = CollectionSettings.of(embeddings)
        given = options.pop("collection_metadata", {})
        require_cosine(given.get("hnsw:space", "cosine"), "collection_metadata")
        options |= {
            "collection_metadata": {**given, **wanted.added_to(own, collection_name).metadata()},
            "collection_configuration": cosine_configuration(
                options.pop("collection_configuration", None)
            ),
            "relevance_score_fn": options.get("relevance_score_fn", _relevance),
        }
        session = session_at(persist_directory, client, **options)
        options = {key: value for key, value in options.items() if key not in _CLIENT_OPTIONS}
        self.passages = Passages(session, collection_name, embeddings, own)
        """The passages of the collection, for the other parts of this package."""
        with session.exclusive():
            # Checks an existing collection, and finishes a compaction killed before its rename.
            session.read(self.passages.collection.find)
            super().__init__(collection_name, embeddings, client=session.client, **options)
        self.passages.refresh()
        self.passages.add_signals(wanted)

    @property
    def _client(self) -> ClientAPI:
        """The session's client, which is replaced when the folder is opened again."""
        return self.passages.session.client

    @_client.setter
    def _client(self, client: ClientAPI) -> None:
        """Ignore the client that LangChain sets: the session owns it."""

    @property
    def _chroma_collection(self) -> Any:
        """The guarded collection, for LangChain's methods, or None once it was deleted."""
        return self.passages.collection if self._exists else None

    @_chroma_collection.setter
    def _chroma_collection(self, collection: object) -> None:
        """Remember that LangChain has a collection, which itself would keep its Chroma alive."""
        self._exists = collection is not None

    @property
    def lexical(self) -> bool:
        """Whether the collection has lexical weights."""
        return self.passages.refresh().lexical

    @property
    def colbert(self) -> Kind | None:
        """Kind of the collection's ColBERT codes, if it has any."""
        return self.passages.refresh().colbert

    @property
    def uid(self) -> str:
        """Identifier of the passages, which compaction preserves and a reset replaces.

        Use it as the namespace for a record manager of LangChain's `index()`.

        Example:
            >>> from langchain_core.embeddings import DeterministicFakeEmbedding
            >>> store = open_chroma(DeterministicFakeEmbedding(size=8), "notes")
            >>> before = store.uid
            >>> _ = compact(store)
            >>> store.uid == before
            True
        """
        return self.passages.refresh().uid

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        ids: list[str] | None = None,
        **kwargs: Any,  # noqa: ARG002 - LangChain's signature
    ) -> list[str]:
        """Embed and store texts. A text replaces the one with its id.

        Args:
            texts: The texts.
            metadatas: One for each text; missing ones are empty.
            ids: One for each text; a random id replaces each None, and a missing list.
            kwargs: Not used.

        Returns:
            The ids.

        Raises:
            TypeError: An item is not a text, or has metadata of a type that Chroma cannot store.
            ValueError: A text or its metadata cannot be stored.
            FloatingPointError: A vector is not finite.
        """
        columns = _columns(texts, metadatas, ids)
        records = [
            record(Document.model_construct(page_content=text, metadata=meta, id=name), position)
            for position, (text, meta, name) in enumerate(columns)
        ]
        self._write({r.id: r for r in records}.values(), stored=ids is not None)
        return [r.id for r in records]

    def add_images(self, *_: object, **__: object) -> NoReturn:
        """Reject images, which no text embeddings can embed."""
        msg = "A store of open_chroma holds texts. Add images to a plain langchain_chroma.Chroma."
        raise NotImplementedError(msg)

    def fork(self, *_: object, **__: object) -> NoReturn:
        """Reject a copy by Chroma, which would share the signals of this store's passages."""
        msg = "Chroma's copy would share signals with this store. Index into another collection."
        raise NotImplementedError(msg)

    @classmethod
    def from_texts(cls, texts: Iterable[str], *args: Any, **kwargs: Any) -> Self:
        """Open a store and add texts of any iterable to it (see `open_chroma` and `add_texts`)."""
        return super().from_texts(list(checked_texts(texts)), *args, **kwargs)  # type: ignore[return-value]

    @classmethod
    def from_documents(cls, documents: Iterable[Document], *args: Any, **kwargs: Any) -> Self:
        """Open a store and add documents of any iterable to it (see `open_chroma`)."""
        return super().from_documents(list(documents), *args, **kwargs)  # type: ignore[return-value]

    def update_documents(self, ids: list[str], documents: list[Document]) -> None:
        """Embed documents and replace the stored ones with these ids. Unknown ids are ignored.

        Args:
            ids: Ids of stored documents.
            documents: The new ones. Metadata keys that they lack stay as they are.
        """
        _check_lengths("documents", documents, "ids", ids)
        self.passages.acquire_writer()
        stored = self.passages.stored([check_id(each, n) for n, each in enumerate(ids)])
        records = {
            passage: record(document.model_copy(update={"id": passage}), position)._replace(
                metadata=checked_metadata({**stored[passage][1], **document.metadata}, position)
            )
            for position, (passage, document) in enumerate(zip(ids, documents, strict=True))
            if passage in stored
        }
        self._write(records.values(), stored=True)

    def _write(self, records: Iterable[Record], *, stored: bool) -> None:
        passages = self.passages
        passages.acquire_writer()
        for batch in batch_iterate(min(_BATCH, passages.session.batch_size), records):
            former = passages.stored([r.id for r in batch]) if stored else {}
            passages.write(batch, passages.encode([r.text for r in batch]), former)

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> None:
        """Delete documents and all that belongs to them.

        Args:
            ids: Their ids.
            kwargs: `where` and `where_document`, as in Chroma.

        Raises:
            ValueError: No document is selected.
        """
        which = {key: value for key, value in {"ids": ids, **kwargs}.items() if value is not None}
        if not any(value or key == "ids" for key, value in which.items()):
            msg = "delete() needs a selection. Pass ids, where or where_document."
            raise ValueError(msg)
        if which.get("ids") != []:
            self.passages.acquire_writer()
            self.passages.delete(**which)

    def delete_collection(self) -> None:
        """Delete the collection and all that belongs to its passages."""
        self.passages.acquire_writer()
        self.passages.drop()
        self._chroma_collection = None

    def reset_collection(self) -> None:
        """Delete the collection and create an empty one with the same settings."""
        settings = self.passages.refresh().renewed()
        self._collection_metadata = {**(self._collection_metadata or {}), **settings.metadata()}
        super().reset_collection()

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Get stored documents by their ids. Unknown ids are ignored."""
        stored = self.passages.stored(list(ids))
        return [
            Document(page_content=text, metadata=dict(metadata), id=passage)
            for passage, (text, metadata) in stored.items()
        ]

    def add_missing(self) -> int:
        """Compute the lexical weights and ColBERT codes that passages lack, and store them.

        Passages lack them if they were stored before the collection had these signals, by
        `index_vectors`, or by a plain `Chroma`.

        Returns:
            How many passages lacked any.

        Example:
            >>> with open_chroma(BGEM3Embeddings(model=checkpoint), "notes") as store:
            ...     _ = store.add_texts(["one"])
            ...     _ = index_documents(store, [], lexical=True)
            ...     store.add_missing()
            1
        """
        return self.passages.add_missing()

    def close(self) -> None:
        """Free Chroma's memory and files, and let other processes write to the folder.

        A client that was passed to `open_chroma` stays open.
        """
        self.passages.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_chroma(  # noqa: PLR0913 - LangChain has more
    embeddings: Embeddings,
    collection_name: str = "langchain",
    *,
    persist_directory: str | os.PathLike[str] | None = None,
    client: ClientAPI | None = None,
    lexical: bool | None = None,
    colbert: Kind | bool | None = None,
    colbert_pooling: int = 1,
    **chroma_options: Any,
) -> BGEM3Chroma:
    """Open a collection in cosine space that holds vectors of these embeddings and of no others.

    Fingerprint and dimension of the embeddings are written to a new collection, and checked when it
    is opened again; wrappers count as what they wrap. A collection that plain Chroma filled is
    taken over if it is in cosine space and one of its texts, embedded again, gives its vector.

    One process may write to a folder, and any number search it; a server lets several write. What a
    kill, a full disk, a fork and a server that goes away do is in docs/chroma.md.

    Args:
        embeddings: Any LangChain embeddings.
        collection_name: 3 to 512 characters of `[a-zA-Z0-9._-]`.
        persist_directory: A folder, made if it does not exist; `~` is the user's own. Without
            folder, `client` and `host` the data is in memory, of this store alone.
        client: A Chroma client of your own, `chromadb.HttpClient(...)` for example. To share a
            collection in memory, pass one `chromadb.EphemeralClient()` each time.
        lexical: Store lexical weights of the same forward pass too, for `BGEM3Retriever`. The
            collection records the choice, which is the default afterwards; False for a new one.
        colbert: Keep ColBERT vectors of the same forward pass too, in codes of `"1bit"` (also
            True), `"2bit"` or `"int8"` a dimension: for a passage of 200 tokens of BGE-M3 26, 52
            or 205 KB. The collection records the choice, the default afterwards.
        colbert_pooling: Tokens that share a vector on average; 2 halves the codes.
        chroma_options: Anything else for `langchain_chroma.Chroma`: `host`, `port`, `ssl`,
            `headers`, `tenant`, `database`, `collection_metadata`, `collection_configuration`...

    Returns:
        The store. Its relevance scores are cosines, clipped to 0..1.

    Raises:
        TypeError: `embeddings` is not LangChain `Embeddings`, or lacks an output asked for.
        ValueError: The name is invalid, the data has two places, or the collection has another
            space than cosine, or another model's vectors.
        OSError: The folder could not be written to, or its index is damaged.

    Example:
        >>> from langchain_core.embeddings import DeterministicFakeEmbedding
        >>> store = open_chroma(DeterministicFakeEmbedding(size=8), "notes")
        >>> store.add_texts(["a note"], ids=["1"])
        ['1']
    """
    return BGEM3Chroma(
        collection_name,
        embeddings,
        persist_directory,
        client=client,
        lexical=lexical,
        colbert=colbert,
        colbert_pooling=colbert_pooling,
        **chroma_options,
    )


def _relevance(distance: float) -> float:
    """Turn a cosine distance into a cosine, which rounding can put a hair outside 0..1."""
    return min(1.0, max(0.0, 1.0 - distance))


def _columns(
    texts: Iterable[str], metadatas: object, ids: object
) -> Iterable[tuple[str, dict[str, Any], str]]:
    """Check texts, metadata and ids, and fill in those that lack."""
    texts = list(checked_texts(texts))
    if isinstance(metadatas, (str, Mapping)) or isinstance(ids, str):
        msg = (
            "metadatas and ids are lists with an item for each text. Put a single one into a list."
        )
        raise TypeError(msg)
    given: list[Any] = list(metadatas or ())  # type: ignore[call-overload]
    named: list[Any] = [None] * len(texts) if ids is None else list(ids)  # type: ignore[call-overload]
    if len(given) > len(texts):
        _check_lengths("metadatas", given, "texts", texts)
    _check_lengths("ids", named, "texts", texts)
    for position, (text, name) in enumerate(zip(texts, named, strict=True)):
        check_text(text, position)
        named[position] = str(uuid.uuid4()) if name is None else check_id(name, position)
    given += [None] * (len(texts) - len(given))
    return zip(texts, [each or {} for each in given], named, strict=True)


def _check_lengths(one: str, ones: Sequence[Any], other: str, others: Sequence[Any]) -> None:
    if len(ones) != len(others):
        msg = (
            f"There are {len(ones):,} {one} for {len(others):,} {other}. "
            "Pass one for each, in the same order."
        )
        raise ValueError(msg)


def session_at(persist_directory: Any = None, client: Any = None, **options: Any) -> Session:
    """Open a session at the location that options of `open_chroma` name."""
    given = {key: options[key] for key in _CLIENT_OPTIONS if options.get(key) is not None}
    _check_one_location(persist_directory=persist_directory, client=client, **given)
    return connect(persist_directory, client, given)


def _check_one_location(**options: Any) -> None:
    """Reject more than one location. langchain-chroma checks all but `client`."""
    given = [name for name in _LOCATIONS if options.get(name) is not None]
    if len(given) > 1:
        msg = f"{' and '.join(given)} are given, and a store has one location. Pass one of them."
        raise ValueError(msg)


def _checked(embeddings: object, collection_name: object) -> Embeddings:
    if not isinstance(embeddings, Embeddings):
        msg = (
            f"The embeddings are {type(embeddings).__name__}, not LangChain Embeddings. "
            "Pass BGEM3Embeddings() or another subclass."
        )
        raise TypeError(msg)
    if not isinstance(collection_name, str) or not _NAME.fullmatch(collection_name):
        msg = (
            f"{collection_name!r} is not a name for a collection. Use 3 to 512 characters of "
            "[a-zA-Z0-9._-], a letter or digit first and last, and no two dots in a row."
        )
        raise ValueError(msg)
    return embeddings
