"""The command line of the server: its options, what it refuses, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from calls import WAIT, alike, texts
from model_server import HOST, ModelServer, free_port

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.serve import command, main

if TYPE_CHECKING:
    from pathlib import Path

    from fastapi import FastAPI


class Started:
    """Takes the place of what runs the server, and keeps what it would run."""

    def __call__(self, embeddings: BGEM3Embeddings, app: FastAPI, place: dict[str, Any]) -> None:
        self.embeddings, self.place = embeddings, place
        self.limits = app.state.service.limits


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    started = Started()
    monkeypatch.setattr(command, "_run", started)
    return started


def test_every_setting_is_an_option(
    started: Started, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = {
        "model": str(tmp_path),
        "revision": "main",
        "token": "hf_secret",
        "cache_folder": "cache",
        "local_files_only": True,
        "device": "cuda:1",
        "dtype": "float16",
        "pooling": "mean",
        "normalize": False,
        "max_length": 512,
        "on_truncate": "raise",
        "query_instruction": "find: ",
        "document_instruction": "text: ",
        "batch_tokens": 4_096,
    }
    kept = {"base_url", "api_key", "show_progress"}
    assert settings.keys() == BGEM3Embeddings.model_fields.keys() - kept
    options = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        yes_or_no = [f"--{option}" if value else f"--no-{option}"]
        options += yes_or_no if isinstance(value, bool) else [f"--{option}", str(value)]
    main(options)
    assert started.embeddings == BGEM3Embeddings(**settings)
    main([])
    assert started.embeddings == BGEM3Embeddings()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for words in (
        "--model MODEL Hub id, or local folder of a checkpoint. [BAAI/bge-m3]",
        "--revision REVISION Branch, tag or commit on the hub. [none]",
        "--normalize, --no-normalize Scale vectors to unit length, computed in float32. [True]",
        "Longest text in tokens, by default as many as the checkpoint has positions for. [none]",
    ):
        assert words in told


def test_place_and_limits(started: Started) -> None:
    main([])
    assert started.place == {"host": "127.0.0.1", "port": 8000, "uds": None}
    assert started.limits["body"] == 32 * 2**20
    main(["--port", "9", "--max-texts", "64", "--max-body", "5", "--max-queue", "6"])
    assert started.place["port"] == 9
    assert started.limits == {"texts": 64, "colbert_texts": 1, "body": 5, "queue": 6}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])  # noqa: S104
def test_other_machines_need_a_key(
    started: Started,
    host: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BGE_M3_API_KEY", "")
    with pytest.raises(SystemExit, match="2"):
        main(["--host", host])
    assert f"{host} can be reached from other machines. Set BGE_M3_" in capsys.readouterr().err
    main(["--host", host, "--no-api-key"])
    main(["--host", host, "--api-key", "k"])
    monkeypatch.setenv("BGE_M3_API_KEY", "k")
    main(["--host", host])
    assert started.place["host"] == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_none(started: Started, host: str) -> None:
    main(["--host", host])
    assert started.place["host"] == host


@pytest.mark.parametrize(
    "options", [["--dtype", "fp16"], ["--max-length", "many"], ["--max-length", "2"], ["--nope"]]
)
def test_wrong_options_are_said(
    started: Started, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert "error: " in capsys.readouterr().err


def test_without_a_model_it_ends(tmp_path: Path) -> None:
    module = [sys.executable, "-m", "langchain_bge_dense.serve", "--port", str(free_port())]
    done = subprocess.run(
        [*module, "--model", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=3 * WAIT,
    )
    assert done.returncode == 1
    assert "The model cannot be loaded. FileNotFoundError: " in done.stderr
    assert str(tmp_path) in done.stderr


def until_told(log: Path, words: str) -> str:
    """Wait until a log has these words; gives what it has."""
    give_up = time.monotonic() + 3 * WAIT
    while words not in log.read_text():
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.05)
    return log.read_text()


def test_a_unix_socket_and_a_key_of_the_environment(
    tiny: BGEM3Embeddings, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BGE_M3_API_KEY", "sk-of-a-test")
    socket = tmp_path / "bge.sock"
    module = [sys.executable, "-m", "langchain_bge_dense.serve", "--uds", str(socket)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*module, "--model", str(tiny_checkpoint), "--dtype", "float32"], stderr=log
        )
    try:
        until_told(tmp_path / "log", f"on cpu in float32 at unix://{socket} (Ctrl-C ends it).\n")
        embeddings = BGEM3Embeddings(base_url=f"unix://{socket}", api_key="sk-of-a-test")
        assert embeddings.embed_query("free") == tiny.embed_query("free")
        with pytest.raises(PermissionError):
            BGEM3Embeddings(base_url=f"unix://{socket}").load()
    finally:
        process.terminate()
        process.wait(WAIT)
    assert "sk-of-a-test" not in (tmp_path / "log").read_text()


def test_sigterm_lets_what_runs_finish(
    tiny: BGEM3Embeddings, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    passages = texts(1_500)
    options = ("--model", str(tiny_checkpoint), "--dtype", "float32", "--device", "cpu")
    with ModelServer(tmp_path, *options) as server, ThreadPoolExecutor(1) as pool:
        told = until_told(server.log, "Serving tiny on cpu in float32 at " + server.base_url)
        assert "running" not in told
        assert told.index("Loading ") < told.index("Serving ")
        asked = {"texts": passages}
        reply = pool.submit(httpx.post, f"{server.base_url}/encode", json=asked, timeout=3 * WAIT)
        give_up = time.monotonic() + WAIT
        while "bge_m3_queue 1.0" not in httpx.get(f"{server.base_url}/metrics").text:
            assert time.monotonic() < give_up
        server.terminate()
        assert alike(reply.result(3 * WAIT).json()["dense"], tiny.embed_documents(passages))
        assert server.process.wait(WAIT) == -signal.SIGTERM
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{HOST}:{server.port}/health")
