"""From a hub id or a path to the files, over a real hub on loopback.

The hub's library reads its environment at import, so the client runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hub_server import Hub, Request, read_folder
from safetensors.torch import load_file

from langchain_bge_dense._engine.hub import HubSource, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from langchain_bge_dense import BGEM3Embeddings

ROOT = Path(__file__).parents[2]
NEEDED = {
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "colbert_linear.pt",
    "sparse_linear.pt",
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    "modules.json",
}
NOT_NEEDED = (
    ".gitattributes",
    "README.md",
    "flax_model.msgpack",
    "imgs/bge.jpg",
    "long.jpg",
    "model.fp16.safetensors",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/tokenizer.json",
    "training_args.bin",
)
PROMPTS = "config_sentence_transformers.json"
SAFE, PICKLED = "org/both-formats", "org/only-pickled"

# Older PyTorch leaves a folder to the garbage collector.
PYTORCH = ("-W", "ignore:Implicitly cleaning up:ResourceWarning")
CLIENT = """
import json, sys
from langchain_bge_dense._engine.hub import HubSource, resolve
for line in sys.stdin:
    try:
        answer = dict(folder=str(resolve(HubSource(**json.loads(line)))))
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
        exact = type(error).__name__ == kinds[0]
        answer = dict(error=kinds[0], exact=exact, text=str(error))
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that resolves one source after another."""

    def __init__(self, hub: Hub, home: Path, code: str = CLIENT, **environment: str) -> None:
        self._log = (home / "client.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(hub, home) | environment,
            text=True,
        )

    def find(self, model: str, cache: Path, **settings: Any) -> dict[str, Any]:
        request = {"model": model, "cache_folder": str(cache), **settings}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def folder(self, model: str, cache: Path, **settings: Any) -> Path:
        answer = self.find(model, cache, **settings)
        assert "folder" in answer, answer
        return Path(answer["folder"])

    def error(self, model: str, cache: Path, **settings: Any) -> tuple[str, str]:
        answer = self.find(model, cache, **settings)
        assert "error" in answer, answer
        assert answer["exact"], answer
        return answer["error"], answer["text"]

    @property
    def printed(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        with self._process, self._log:
            pass


def _environment(hub: Hub, home: Path) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return inherited | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": path}


@pytest.fixture(scope="module")
def files(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tiny checkpoint in the hub's layout, with all that nobody here needs."""
    pickled = tmp_path_factory.mktemp("pickled") / "pytorch_model.bin"
    torch.save(load_file(tiny_checkpoint / "model.safetensors"), pickled)
    others = dict.fromkeys(NOT_NEEDED, b"not needed")
    return read_folder(tiny_checkpoint) | others | {"pytorch_model.bin": pickled.read_bytes()}


@pytest.fixture(scope="module")
def served(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub() as hub:
        hub.publish(SAFE, files | {"README.md": b"before"}, ref="v1")
        hub.publish(SAFE, files)
        hub.publish(PICKLED, _without(files, "model.safetensors"))
        hub.publish("org/private", files, private=True)
        hub.publish("org/gated", files, gated=True)
        yield hub


@pytest.fixture
def hub(served: Hub) -> Iterator[Hub]:
    served.requests.clear()
    yield served
    served.status = 0
    served.faults.clear()


@pytest.fixture(scope="module")
def client(served: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(served, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


def _without(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in names}


class TestDownload:
    def test_fetches_what_is_needed_and_nothing_else(
        self, hub: Hub, client: Client, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        folder = client.folder(SAFE, tmp_path)
        assert hub.files == NEEDED | {"model.safetensors"}
        assert read_folder(folder) == {name: files[name] for name in hub.files}
        assert folder.is_relative_to(tmp_path)
        asked = {re.sub(r"[0-9a-f]{40}|\?.*", "", path) for _, path, *_ in hub.requests}
        resolved = {f"/{SAFE}/resolve//{name}" for name in hub.files}
        listing = {f"/api/models/{SAFE}/revision/main", f"/api/models/{SAFE}/tree/"}
        sent = {path for path in asked if path.startswith("/cdn/")}
        assert asked == resolved | listing | sent

    def test_takes_pickled_weights_where_there_are_no_others(
        self, hub: Hub, client: Client, tmp_path: Path
    ) -> None:
        folder = client.folder(PICKLED, tmp_path)
        assert hub.files == NEEDED | {"pytorch_model.bin"}
        assert (folder / "pytorch_model.bin").exists()

    def test_takes_all_shards(
        self, hub: Hub, client: Client, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        shards = {f"model-0000{n}-of-00002.safetensors": b"%d" % n for n in (1, 2)}
        shards["model.safetensors.index.json"] = b"{}"
        hub.publish("org/sharded", _without(files, "model.safetensors") | shards)
        client.folder("org/sharded", tmp_path)
        assert hub.files == NEEDED | set(shards)

    @pytest.mark.parametrize("name", [SAFE, PICKLED])
    def test_asks_once_when_all_is_cached_and_never_for_a_commit(
        self, hub: Hub, client: Client, tmp_path: Path, name: str
    ) -> None:
        folder = client.folder(name, tmp_path)
        hub.requests.clear()
        assert client.folder(name, tmp_path) == folder
        assert hub.requests == [Request("GET", f"/api/models/{name}/revision/main", None, None)]
        hub.requests.clear()
        assert client.folder(name, tmp_path, revision=folder.name) == folder
        assert client.folder(name, tmp_path, local_files_only=True) == folder
        assert not hub.requests

    def test_shows_the_hubs_bar_for_weights_and_none_without_a_download(
        self, hub: Hub, client: Client, tmp_path: Path
    ) -> None:
        before = len(client.printed)
        folder = client.folder(PICKLED, tmp_path)
        bars = client.printed[before:]
        assert "Fetching 1 files" in bars
        assert "Fetching 9 files" not in bars
        (folder / "config.json").unlink()
        client.folder(PICKLED, tmp_path)
        client.folder(PICKLED, tmp_path, local_files_only=True)
        assert client.printed[before:] == bars

    def test_takes_the_revision_that_it_is_told(
        self, hub: Hub, client: Client, tmp_path: Path
    ) -> None:
        refs = hub.repositories[SAFE].refs
        assert refs["v1"] != refs["main"]
        assert client.folder(SAFE, tmp_path, revision="v1").name == refs["v1"]
        assert client.folder(SAFE, tmp_path).name == refs["main"]
        assert client.folder(SAFE, tmp_path, revision=refs["v1"]).name == refs["v1"]

    def test_follows_a_branch_that_moves(
        self, hub: Hub, client: Client, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        hub.publish("org/moving", files)
        old = client.folder("org/moving", tmp_path)
        hub.publish("org/moving", files | {"config.json": b"{}"})
        hub.requests.clear()
        new = client.folder("org/moving", tmp_path)
        assert (new / "config.json").read_bytes() == b"{}" != (old / "config.json").read_bytes()
        assert hub.files == {"config.json"}


class TestModules:
    """Files of sentence-transformers, in folders of their own."""

    def test_are_fetched_with_the_model(
        self, hub: Hub, client: Client, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        parts = {"0_Transformer": "", "1_Pooling": "", "2_Dense": ""}
        modules = [
            {"path": path, "type": f"sentence_transformers.models.{path[2:]}"} for path in parts
        ]
        own = {name for name in files if "/" not in name and name not in {"modules.json", PROMPTS}}
        moved = {f"0_Transformer/{name}": files[name] for name in own}
        others = {
            "modules.json": json.dumps(modules).encode(),
            PROMPTS: b"{} ",
            "1_Pooling/config.json": b"{}  ",
            "2_Dense/config.json": b"{}   ",
            "2_Dense/model.safetensors": b"dense",
            "2_Dense/pytorch_model.bin": b"the same",
            "3_Other/config.json": b"{}",
        }
        hub.publish("org/parts", moved | others)
        folder = client.folder("org/parts", tmp_path)
        wanted = {name for name in NEEDED if "/" not in name} - {"modules.json", PROMPTS}
        wanted = {f"0_Transformer/{name}" for name in (*wanted, "model.safetensors")}
        wanted |= {name for name in others if not name.startswith("3_") and ".bin" not in name}
        assert hub.files == wanted
        hub.requests.clear()
        assert client.folder("org/parts", tmp_path, local_files_only=True) == folder
        (folder / "2_Dense" / "model.safetensors").unlink()
        assert client.folder("org/parts", tmp_path) == folder
        assert (folder / "2_Dense" / "model.safetensors").exists()

    def test_have_to_be_known_in_a_cache_that_others_filled(
        self, hub: Hub, client: Client, tmp_path: Path
    ) -> None:
        fill(hub, tmp_path, SAFE, ["config.json", "tokenizer.json", "model.safetensors"])
        offline = {"local_files_only": True}
        kind, text = client.error(SAFE, tmp_path, needs_modules=True, **offline)
        assert kind == "FileNotFoundError"
        assert re.search(r"lacks modules\.json, if the model has one.*or pass pooling=", text)
        folder = client.folder(SAFE, tmp_path, **offline)
        assert not (folder / "modules.json").exists()
        assert client.folder(SAFE, tmp_path, needs_modules=True) == folder
        assert client.folder(SAFE, tmp_path, needs_modules=True, **offline) == folder
        assert (folder / "modules.json").exists()

    def test_that_the_hub_does_not_have_are_known(
        self, hub: Hub, client: Client, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        hub.publish("org/plain", _without(files, "modules.json"))
        fill(hub, tmp_path, "org/plain", ["config.json", "modules.json"])
        known = {"needs_modules": True, "local_files_only": True}
        assert client.folder("org/plain", tmp_path, **known)


def fill(hub: Hub, cache: Path, model: str, names: list[str]) -> None:
    """Fetch files one by one, as `AutoModel` does."""
    code = """
import sys
from contextlib import suppress
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
cache, model, *names = sys.argv[1:]
for name in names:
    with suppress(EntryNotFoundError):
        hf_hub_download(model, name, cache_dir=cache)
"""
    subprocess.run(
        [sys.executable, "-c", code, str(cache), model, *names],
        env=_environment(hub, cache),
        capture_output=True,
        check=True,
    )


class TestAccess:
    @pytest.mark.parametrize("token", [None, Hub.stranger])
    def test_a_private_model_needs_the_token(
        self, hub: Hub, client: Client, tmp_path: Path, token: str | None
    ) -> None:
        kind, text = client.error("org/private", tmp_path, token=token)
        assert kind == "FileNotFoundError"
        assert "'org/private'" in text
        assert "`token`" in text
        hub.requests.clear()
        assert client.folder("org/private", tmp_path, token=hub.token)
        tokens = {request.path.startswith("/cdn/"): request.token for request in hub.requests}
        assert tokens == {False: hub.token, True: None}

    @pytest.mark.parametrize("token", [None, Hub.stranger])
    def test_a_gated_model_is_refused_in_so_many_words(
        self, hub: Hub, client: Client, tmp_path: Path, token: str | None
    ) -> None:
        kind, text = client.error("org/gated", tmp_path, token=token)
        assert kind == "PermissionError"
        assert "'org/gated'" in text
        assert "Ask for access" in text
        assert client.folder("org/gated", tmp_path, token=hub.token)

    def test_a_wrong_token_is_refused_and_not_shown(
        self, hub: Hub, client: Client, tmp_path: Path
    ) -> None:
        kind, text = client.error(SAFE, tmp_path, token="hf_misspelt")  # noqa: S106
        assert kind == "PermissionError"
        assert "401" in text
        assert "`token`" in text
        assert "hf_misspelt" not in text


class TestWithoutTheHub:
    def test_the_cache_is_enough(self, hub: Hub, client: Client, tmp_path: Path) -> None:
        folder = client.folder(PICKLED, tmp_path)
        hub.stop()
        try:
            assert client.folder(PICKLED, tmp_path) == folder
        finally:
            hub.start()
        hub.status = 500
        assert client.folder(PICKLED, tmp_path) == folder

    def test_the_environment_variable_for_it_works(
        self, hub: Hub, client: Client, tmp_path: Path
    ) -> None:
        folder = client.folder(SAFE, tmp_path)
        hub.requests.clear()
        offline = Client(hub, tmp_path, HF_HUB_OFFLINE="1")
        assert offline.folder(SAFE, tmp_path) == folder
        kind, text = offline.error(PICKLED, tmp_path)
        assert (kind, "not asked, because of HF_HUB_OFFLINE" in text) == ("FileNotFoundError", True)
        offline.close()
        assert not hub.requests

    def test_a_proxy_that_cannot_be_used_does_not_matter_offline(
        self, hub: Hub, client: Client, tmp_path: Path
    ) -> None:
        folder = client.folder(SAFE, tmp_path)
        offline = Client(hub, tmp_path, HF_HUB_OFFLINE="1", ALL_PROXY="socks://127.0.0.1:9")
        assert offline.folder(SAFE, tmp_path) == folder
        offline.close()

    def test_an_environment_that_was_emptied_does_not_matter(
        self, hub: Hub, tmp_path: Path
    ) -> None:
        code = CLIENT.replace(
            "import json, sys\n", "import json, os, sys, huggingface_hub.constants\n"
        ).replace("for line in sys.stdin:", "os.environ.clear()\nfor line in sys.stdin:")
        emptied = Client(hub, tmp_path, code)
        assert emptied.folder(SAFE, tmp_path)
        emptied.close()

    @pytest.mark.parametrize("state", ["stopped", "broken", "forbidden"])
    def test_nothing_cached_says_what_was_looked_for_where_and_the_ways_out(
        self, hub: Hub, client: Client, tmp_path: Path, state: str
    ) -> None:
        if state == "stopped":
            hub.stop()
        hub.status = 500 if state == "broken" else 0
        try:
            kind, text = client.error(SAFE, tmp_path, local_files_only=state == "forbidden")
        finally:
            if state == "stopped":
                hub.start()
        assert kind == "FileNotFoundError"
        for part in (repr(SAFE), str(tmp_path), f"hf download {SAFE}"):
            assert part in text
        assert {"stopped": "refused", "broken": "500", "forbidden": "disabled"}[state] in text
        asked = {f"{hub.url} does not provide it", "HF_ENDPOINT"}
        not_asked = {"the hub was not asked, because of local_files_only=True. Leave that out"}
        said, unsaid = (not_asked, asked) if state == "forbidden" else (asked, not_asked)
        assert [part in text for part in (*said, *unsaid)] == [True] * len(said) + [False] * len(
            unsaid
        )

    @pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
    def test_a_hole_in_the_cache_is_named(
        self, hub: Hub, client: Client, tmp_path: Path, missing: str
    ) -> None:
        (client.folder(SAFE, tmp_path) / missing).unlink()
        kind, text = client.error(SAFE, tmp_path, local_files_only=True)
        assert kind == "FileNotFoundError"
        assert missing in text
        assert (client.folder(SAFE, tmp_path) / missing).exists()


class TestMistakes:
    def test_a_misspelt_model(self, hub: Hub, client: Client, tmp_path: Path) -> None:
        kind, text = client.error("org/both-fromats", tmp_path)
        assert kind == "FileNotFoundError"
        assert "'org/both-fromats'" in text
        assert "RepositoryNotFoundError" in text

    @pytest.mark.parametrize("offline", [True, False])
    def test_a_name_without_an_owner(
        self, hub: Hub, client: Client, tmp_path: Path, *, offline: bool
    ) -> None:
        kind, text = client.error("bge-m3", tmp_path, local_files_only=offline)
        assert kind == "FileNotFoundError"
        assert "There is no folder 'bge-m3' here either" in text
        assert "such as BAAI/bge-m3" in text
        assert "hf download" not in text

    def test_a_misspelt_revision(self, hub: Hub, client: Client, tmp_path: Path) -> None:
        kind, text = client.error(SAFE, tmp_path, revision="v2")
        assert kind == "FileNotFoundError"
        assert f"{SAFE!r} at revision 'v2'" in text
        assert "RevisionNotFoundError" in text

    def test_a_file_that_the_hub_lists_outside_of_the_folder_stays_away(
        self, hub: Hub, client: Client, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        hub.publish("org/outside", files | {"../../config.json": b"{}", "/config.json": b"{}"})
        client.folder("org/outside", tmp_path)
        assert hub.files == NEEDED | {"model.safetensors"}

    @pytest.mark.parametrize("model", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "a b"])
    def test_a_path_that_leads_nowhere_is_not_asked_of_the_hub(self, model: str) -> None:
        with pytest.raises(FileNotFoundError, match=re.escape(repr(model))):
            resolve(HubSource(model))


class TestBrokenDownload:
    def test_a_cache_that_cannot_be_written_is_named(
        self, hub: Hub, client: Client, tmp_path: Path
    ) -> None:
        file = tmp_path / "not a folder"
        file.write_text("")
        kind, text = client.error(SAFE, file)
        assert kind == "NotADirectoryError"
        assert str(file) in text

    def test_is_taken_up_where_it_ended(
        self, hub: Hub, client: Client, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        chunk = 10 << 20  # the hub's library writes so much at a time
        weights = os.urandom(chunk + 1000)
        hub.publish("org/large", files | {"model.safetensors": weights})
        hub.faults["model.safetensors"] = chunk + 10
        folder = client.folder("org/large", tmp_path)
        assert (folder / "model.safetensors").read_bytes() == weights
        assert [r.span for r in hub.requests if r.span] == [f"bytes={chunk}-"]

    def test_is_an_error_and_what_is_complete_stays(
        self, hub: Hub, client: Client, tmp_path: Path
    ) -> None:
        hub.faults["model.safetensors"] = -1000
        kind, text = client.error(SAFE, tmp_path)
        assert kind == "ConnectionError"
        assert repr(SAFE) in text
        assert "Try again" in text
        hub.requests.clear()
        client.folder(SAFE, tmp_path)
        assert "model.safetensors" in hub.files
        assert "config.json" not in hub.files


LOAD = """
import json, sys
from pathlib import Path
import huggingface_hub.constants  # before this package could turn its telemetry off
from langchain_bge_dense import BGEM3Embeddings
folder, settings, text = json.loads(sys.argv[1])
vectors = [BGEM3Embeddings(**settings, model=folder).embed_query(text)]
embeddings = BGEM3Embeddings(**settings, model="org/secret")
vectors.append(embeddings.embed_query(text))
report = [vectors, repr(embeddings), huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY]
Path(sys.argv[2]).write_text(json.dumps(report))
"""


def test_loading_says_nothing_and_asks_the_hub_for_nothing_else(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, tiny: BGEM3Embeddings
) -> None:
    hub.publish("org/secret", _without(files, "model.safetensors"), private=True)
    settings = {"token": hub.token, "cache_folder": str(tmp_path / "cache")}
    settings |= {"device": "cpu", "dtype": "float32"}
    result = tmp_path / "result.json"
    request = json.dumps([tiny.model, settings, "a dense vector"])
    done = subprocess.run(
        [sys.executable, "-W", "default", *PYTORCH, "-c", LOAD, request, str(result)],
        env=_environment(hub, tmp_path) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    vectors, shown, telemetry_disabled = json.loads(result.read_text())
    assert telemetry_disabled
    for vector in vectors:
        assert vector == pytest.approx(tiny.embed_query("a dense vector"), abs=1e-6)
    assert hub.token not in shown
    assert hub.files == NEEDED | {"pytorch_model.bin"}
    assert not [r for r in hub.requests if not re.match("/cdn/|(/api/models)?/org/secret/", r.path)]
    assert len([r for r in hub.requests if r.path.endswith("/revision/main")]) == 1


def test_a_source_does_not_show_its_token() -> None:
    assert "hf_secret" not in repr(HubSource("org/model", token="hf_secret"))  # noqa: S106
