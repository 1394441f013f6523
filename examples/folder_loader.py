"""A LangChain loader for a folder of .md, .txt, .csv, .json, .jsonl, .html, .docx and .pdf files.

It takes the place of the loaders of langchain-community, which is no longer maintained.
"""

import csv
import json
import logging
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO, TypeAlias
from xml.parsers.expat import ExpatError
from zipfile import BadZipFile

import mammoth
from bs4 import BeautifulSoup
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from markdownify import MarkdownConverter
from pypdf import PdfReader
from pypdf.errors import DependencyError, DeprecationError, PyPdfError
from tqdm import tqdm

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

# On damaged .docx files, mammoth into those of the archive and of its parts.
DOCX_ERRORS = (BadZipFile, ExpatError, AttributeError, LookupError, TypeError, zlib.error)

NAMED = 5  # of the files that are left out
DELIMITERS = ",;\t|"

UNSEEN = ["script", "style", "template", "noscript"]
UNMARKED = ["a", "b", "code", "em", "i", "img", "strong"]  # text that stands without Markdown


class FolderLoader(BaseLoader):
    """Reads a folder and what is below it into documents, one file at a time, sorted by name.

    A document is a whole file, a page of a PDF, a row of a CSV or of JSON Lines, or an item of a
    JSON list. Its metadata says which: `source` (the path below the folder), and `page` or `row`
    (from 1), or `pointer`. Hidden files, and files of other types, are left out; a warning names
    the latter.

    Args:
        folder: The folder.
        show_progress: Show a bar over files.

    Attributes:
        failed: Path below the folder to reason, for each file that the last run could not read.
    """

    def __init__(self, folder: str | Path, *, show_progress: bool = False) -> None:
        self.folder = Path(folder)
        self.show_progress = show_progress
        self.failed: dict[str, str] = {}

    def lazy_load(self) -> Iterator[Document]:
        """Read one file after the other; one that fails is a warning and stands in `failed`."""
        if not self.folder.is_dir():
            msg = f"There is no folder {self.folder}. Give the folder that holds the documents."
            raise NotADirectoryError(msg)
        self.failed = {}
        documents = 0
        files = self._readable_files()
        for path in tqdm(files, "Reading", unit=" files", disable=not self.show_progress):
            for document in self._read(path):
                documents += 1
                yield document
        if not documents:
            msg = (
                f"No text was found in {self.folder} ({len(self.failed)} files could not be read). "
                f"Put files of these types there: {', '.join(CONVERTERS)}."
            )
            raise ValueError(msg)

    def _readable_files(self) -> list[Path]:
        files = list(self._files())
        others = [path for path in files if path.suffix.lower() not in CONVERTERS]
        if others:
            named = ", ".join(map(self._source, others[:NAMED]))
            more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
            logger.warning("Left out, as files of these types are not read: %s%s", named, more)
        return [path for path in files if path.suffix.lower() in CONVERTERS]

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
        rows = csv.reader(file, delimiter=_delimiter(file))
        header = next(rows, [])
        for number, cells in enumerate(rows, start=1):
            yield _lines(zip_longest(header, cells, fillvalue="")), {"row": number}


def _delimiter(file: TextIO) -> str:
    """Tell what stands most often between the names of the first line, the comma in doubt."""
    header = re.sub('"[^"]*"', "", file.readline())
    file.seek(0)
    return max(DELIMITERS, key=header.count)


def _json_items(path: Path) -> Pieces:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _json_rows(path)  # JSON Lines by another name
        return
    if not isinstance(data, list):
        yield _json_text(data), {}
        return
    for index, item in enumerate(data):
        yield _json_text(item), {"pointer": f"/{index}"}


def _json_rows(path: Path) -> Pieces:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_text(_json_value(line, number)), {"row": number}


def _json_value(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        msg = f"{error.msg}: line {number} column {error.colno}"
        raise ValueError(msg) from error


def _json_text(item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict):
        return _lines((key, _json_text(value)) for key, value in item.items())
    return "" if item in (None, []) else json.dumps(item, ensure_ascii=False)


def _lines(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{name}: {value}" if name else value for name, value in pairs if value)


def _html_text(path: Path) -> Pieces:
    yield _markdown(path.read_bytes())


def _docx_text(path: Path) -> Pieces:
    try:
        with path.open("rb") as file:
            html = mammoth.convert_to_html(file).value
    except DOCX_ERRORS as error:
        msg = f"mammoth: {error}"
        raise ValueError(msg) from error
    yield _markdown(html)


def _markdown(html: str | bytes) -> tuple[str, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # XHTML is read as HTML on purpose
        soup = BeautifulSoup(html, "html.parser")
    title = " ".join(soup.title.extract().get_text().split()) if soup.title else ""
    for tag in soup(UNSEEN):
        tag.decompose()
    converter = MarkdownConverter(
        heading_style="ATX", strip=UNMARKED, escape_asterisks=False, escape_underscores=False
    )
    return converter.convert_soup(soup.body or soup).strip(), {"title": title} if title else {}


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
    ".jsonl": _json_rows,
    ".html": _html_text,
    ".htm": _html_text,
    ".docx": _docx_text,
    ".pdf": _pdf_pages,
}
