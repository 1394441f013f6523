"""A hub on loopback: as much of the Hugging Face hub's protocol as downloading a model needs.

Small files come from `/resolve/` itself, large ones by a redirect to another host, as the hub's do.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

_LARGE = (".safetensors", ".bin", ".pt", ".onnx", "tokenizer.json", ".jpg")
_PAGE = 7  # files on a page of the listing


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    path: str
    token: str | None
    span: str | None


@dataclass
class Repository:
    """Commits of one model, what branches and tags stand for, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False


class Hub:
    """The server.

    >>> with Hub() as hub:
    ...     commit = hub.publish("org/model", folder)
    ...     hub.url, hub.requests

    Attributes:
        token: The one that opens private and gated repositories.
        stranger: One that is valid and opens none of them.
        requests: All that was asked for, in order.
        status: Answer everything with this HTTP error; 0: with what was asked for.
        faults: By file name, after how many bytes the connection breaks, once; with a minus it is
            reset in place of closed.
    """

    token = "hf_of_a_friend"  # noqa: S105
    stranger = "hf_of_a_stranger"

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.status = 0
        self.faults: dict[str, int] = {}
        self.repositories: dict[str, Repository] = {}
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def files(self) -> set[str]:
        """Names of the files that were sent."""
        return {
            parse_qs(urlsplit(path).query)["filename"][0]
            if path.startswith("/cdn/")
            else path.partition("/resolve/")[2].partition("/")[2]
            for method, path, *_ in self.requests
            if method == "GET" and not path.startswith("/api/")
        }

    def start(self) -> None:
        """Start it, on the same port as before."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), partial(_Handler, self))
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections until it is started again."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def publish(
        self,
        model: str,
        files: dict[str, bytes],
        *,
        ref: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Commit files to a branch or tag.

        Returns:
            The commit.
        """
        repository = self.repositories.setdefault(model, Repository())
        repository.private, repository.gated = private, gated
        commit = hashlib.sha1(repr((model, sorted(files.items()))).encode()).hexdigest()  # noqa: S324
        repository.commits[commit] = files
        repository.refs[ref] = commit
        return commit


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder in the form that `publish` takes."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        request = Request(self.command, self.path, token, self.headers.get("Range"))
        self.hub.requests.append(request)
        path = urlsplit(self.path).path
        if self.hub.status:
            self._send(self.hub.status)
        elif path.startswith("/cdn/"):
            self._send_large(path.removeprefix("/cdn/"))
        elif token not in {None, self.hub.token, self.hub.stranger}:
            reason = "Invalid credentials in Authorization header"
            self._send(401, {"X-Error-Message": reason})
        else:
            self._route(path, token)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _route(self, path: str, token: str | None) -> None:
        about = path.startswith("/api/models/")
        parts = [unquote(part) for part in path.removeprefix("/api/models/").strip("/").split("/")]
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None or (repository.private and token != self.hub.token):
            self._send(404 if token else 401, {"X-Error-Code": "RepoNotFound"})
            return
        kind, ref = ([*parts[2:4], "", ""])[:2]
        commit = repository.refs.get(ref or "main", ref)
        if commit not in repository.commits:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif not about and repository.gated and token != self.hub.token:
            self._send(403 if token else 401, {"X-Error-Code": "GatedRepo"})
        elif not about:
            self._send_file(repository.commits[commit], "/".join(parts[4:]), commit)
        elif kind == "tree":
            self._send_tree(repository.commits[commit])
        else:
            self._send_json({"id": "/".join(parts[:2]), "sha": commit, "siblings": []})

    def _send_tree(self, files: dict[str, bytes]) -> None:
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        entries = [_entry(name, data) for name, data in sorted(files.items())]
        more = {}
        if start + _PAGE < len(entries):
            path = urlsplit(self.path).path
            following = f"{self.hub.url}{path}?recursive=true&cursor={start + _PAGE}"
            more = {"Link": f'<{following}>; rel="next"'}
        self._send_json(entries[start : start + _PAGE], more)

    def _send_file(self, files: dict[str, bytes], name: str, commit: str) -> None:
        if name not in files:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        data, about = files[name], {"X-Repo-Commit": commit}
        if not name.endswith(_LARGE):
            self._send_data(name, data, about | {"ETag": f'"{_git_id(data)}"'})
            return
        digest = hashlib.sha256(data).hexdigest()
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        about["Location"] = f"{elsewhere}/cdn/{digest}?filename={quote(name)}"
        about |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"'}
        self._send(302, about)

    def _send_large(self, digest: str) -> None:
        name = parse_qs(urlsplit(self.path).query)["filename"][0]
        for repository in self.hub.repositories.values():
            for files in repository.commits.values():
                data = files.get(name, b"")
                if hashlib.sha256(data).hexdigest() == digest:
                    self._send_data(name, data, {"ETag": f'"{digest}"'})
                    return
        self._send(404)

    def _send_data(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers["Content-Length"] = str(len(data) - start)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, headers)
        if self.command == "HEAD":
            return
        broken_after = self.hub.faults.pop(name, None)
        if broken_after is None:
            self.wfile.write(data[start:])
            return
        self.wfile.write(data[start : start + abs(broken_after)])
        if broken_after < 0:
            at_once = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            self.rfile.close()
            self.connection.close()

    def _send_json(self, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        length = {"Content-Length": str(len(data)), "Content-Type": "application/json"}
        self._send(200, length | (headers or {}))
        self.wfile.write(data)

    def _send(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(data), "oid": _git_id(data)}
    if name.endswith(_LARGE):
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return entry


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324
