"""A LangChain loader for a folder of .md, .txt, .csv, .json, .html and .pdf files.

It takes the place of the loaders of langchain-community, which is no longer maintained.
"""

import csv
import json
import logging
import os
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

from bs4 import BeautifulSoup
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from markdownify import MarkdownConverter
from pypdf import PdfReader
from pypdf.errors import DependencyError, DeprecationError, PyPdfError

Pieces: TypeAlias = Iterator[tuple[str, dict[str, Any]]]  # texts and their metadata

logger = logging.getLogger(__name__)

# What the converters raise for files that are damaged, locked, or not what their name says.
UNREADABLE = (OSError, ValueError, RecursionError, csv.Error)

# On damaged files pypdf also stumbles into Python's own errors.
PDF_ERRORS = (
    *(PyPdfError, DependencyError, DeprecationError),
    *(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError),
    *(struct.error, zlib.error),
)

UNSEEN = ["script", "style", "template", "noscript"]
UNMARKED = ["a", "b", "code", "em", "i", "img", "strong"]  # text that stands without Markdown


class FolderLoader(BaseLoader):
    """Reads a folder and what is below it into documents, one file at a time, sorted by name.

    A document is a whole file, a page of a PDF, a row of a CSV or an item of a JSON list. Its
    metadata says which: `source` (the path below the folder), and `page` or `row` (from 1), or
    `pointer`. Hidden files, and files of other types, are left out.

    Attributes:
        failed: Path below the folder to reason, for each file that the last run could not read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.failed: dict[str, str] = {}

    def lazy_load(self) -> Iterator[Document]:
        """Read one file after the other; one that fails is a warning and stands in `failed`."""
        if not self.folder.is_dir():
            msg = f"There is no folder {self.folder}. Give the folder that holds the documents."
            raise NotADirectoryError(msg)
        self.failed = {}
        documents = 0
        for path in self._readable_files():
            for document in self._read(path):
                documents += 1
                yield document
        if not documents:
            msg = (
                f"No text was found in {self.folder} ({len(self.failed)} files could not be read). "
                f"Put files of these types there: {', '.join(CONVERTERS)}."
            )
            raise ValueError(msg)

    def _readable_files(self) -> Iterator[Path]:
        skipped: Counter[str] = Counter()
        for path in self._files():
            suffix = path.suffix.lower()
            if suffix in CONVERTERS:
                yield path
            else:
                skipped[suffix or "no suffix"] += 1
        if skipped:
            kinds = ", ".join(f"{suffix} {count}" for suffix, count in sorted(skipped.items()))
            logger.info("%d files of other types left out: %s", skipped.total(), kinds)

    def _files(self) -> Iterator[Path]:
        walk = os.walk(self.folder, onerror=lambda e: self._report(Path(e.filename), e))
        for folder, subfolders, names in walk:
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))

    def _read(self, path: Path) -> Iterator[Document]:
        source = self._source(path)
        documents = 0
        try:
            converted = CONVERTERS[path.suffix.lower()](path) if path.stat().st_size else ()
            for text, details in converted:
                if text.strip():
                    documents += 1
                    yield Document(_storable(text), metadata={"source": source, **details})
        except UNREADABLE as error:
            self._report(path, error, documents)

    def _report(self, path: Path, error: Exception, documents: int = 0) -> None:
        source, reason = self._source(path), _reason(error)
        self.failed[source] = reason
        kept = f"; what comes before ({documents} documents) is kept" if documents else ""
        logger.warning("%s cannot be read: %s%s", source, reason, kept)

    def _source(self, path: Path) -> str:
        return _storable(path.relative_to(self.folder).as_posix())


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"it is not UTF-8 (byte {byte:#04x}); save it as UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def _storable(text: str) -> str:
    """Replace lone surrogates, which PDFs and JSON escapes can hold and no database takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _whole_text(path: Path) -> Pieces:
    yield path.read_text(encoding="utf-8-sig"), {}


def _csv_rows(path: Path) -> Pieces:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        for number, cells in enumerate(rows, start=1):
            yield _lines(zip_longest(header, cells, fillvalue="")), {"row": number}


def _json_items(path: Path) -> Pieces:
    data = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(data, list):
        yield _json_text(data), {}
        return
    for index, item in enumerate(data):
        yield _json_text(item), {"pointer": f"/{index}"}


def _json_text(item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        return _lines((key, _json_text(value)) for key, value in item.items())
    return "" if item in (None, []) else json.dumps(item, ensure_ascii=False)


def _lines(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{name}: {value}" if name else value for name, value in pairs if value)


def _html_text(path: Path) -> Pieces:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # XHTML is read as HTML on purpose
        soup = BeautifulSoup(path.read_bytes(), "html.parser")
    title = " ".join(soup.title.extract().get_text().split()) if soup.title else ""
    for tag in soup(UNSEEN):
        tag.decompose()
    converter = MarkdownConverter(
        heading_style="ATX", strip=UNMARKED, escape_asterisks=False, escape_underscores=False
    )
    yield converter.convert_soup(soup.body or soup).strip(), {"title": title} if title else {}


def _pdf_pages(path: Path) -> Pieces:
    empty = True
    try:
        with path.open("rb") as file:
            for number, page in enumerate(PdfReader(file).pages, start=1):
                text = page.extract_text()
                empty = empty and not text.strip()
                yield text, {"page": number}
    except PDF_ERRORS as error:
        msg = f"pypdf: {error}"
        raise ValueError(msg) from error
    if empty:
        msg = "no page has text in it; scanned pages need text recognition first"
        raise ValueError(msg)


CONVERTERS: dict[str, Callable[[Path], Pieces]] = {
    ".md": _whole_text,
    ".txt": _whole_text,
    ".csv": _csv_rows,
    ".json": _json_items,
    ".html": _html_text,
    ".htm": _html_text,
    ".pdf": _pdf_pages,
}
