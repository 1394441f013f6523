"""Callers of two replicas on a local Ray Serve as a process of its own; one replica is killed.

    python replicas_process.py CHECKPOINT FOLDER

Leaves what came of it as JSON in the folder, and a file for each replica that loaded the model.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from calls import WAIT, alike, texts
from model_server import HOST, free_port
from ray import serve

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.serve import serve_deployment

CALLERS, SECONDS, KEY = 16, 6.0, "a key"
PASSAGES = texts(200, seed=11)


class Replica(BGEM3Embeddings):
    """Leaves its process id."""

    folder: Path

    def load(self):
        loaded = super().load()
        (self.folder / f"{os.getpid()}.replica").touch()
        return loaded


def replicas(folder: Path) -> list[int]:
    """Process ids of the replicas that have loaded the model, the first one first."""
    files = sorted(folder.glob("*.replica"), key=lambda file: file.stat().st_mtime_ns)
    return [int(file.stem) for file in files]


def call(embeddings: BGEM3Embeddings, vectors: list[list[float]], end: float) -> dict:
    """Ask until the time is over; give the number of answers, wrong ones and errors."""
    done = {"right": 0, "wrong": 0, "errors": []}
    while time.monotonic() < end:
        for first in range(0, len(PASSAGES), 20):
            part = slice(first, first + 20)
            try:
                right = alike(embeddings.embed_documents(PASSAGES[part]), vectors[part])
                done["right" if right else "wrong"] += 1
            except Exception as error:  # noqa: BLE001 - each is one too many
                done["errors"].append(repr(error))
    return done


def kill_one(folder: Path) -> list[int]:
    """Kill a replica under load; gives the ids of all replicas once another took its place."""
    time.sleep(SECONDS / 3)
    os.kill(replicas(folder)[0], signal.SIGKILL)
    until = time.monotonic() + 3 * WAIT
    while len(replicas(folder)) < 3 and time.monotonic() < until:
        time.sleep(0.1)
    return replicas(folder)


def main(checkpoint: str, folder: Path) -> None:
    fields = {"device": "cpu", "dtype": "float32"}
    vectors = BGEM3Embeddings(model=checkpoint, **fields).embed_documents(PASSAGES)
    ray.init(num_cpus=4, include_dashboard=False)
    serve.start(http_options={"host": HOST, "port": (port := free_port())})
    replica = Replica(model=checkpoint, folder=folder, **fields)
    serve.run(serve_deployment(replica, api_key=KEY, num_replicas=2))
    caller = BGEM3Embeddings(base_url=f"http://{HOST}:{port}", api_key=KEY)
    with ThreadPoolExecutor(CALLERS + 1) as pool:
        ids = pool.submit(kill_one, folder)
        end = time.monotonic() + SECONDS
        tasks = [pool.submit(call, caller, vectors, end) for _ in range(CALLERS)]
        called = [task.result() for task in tasks]
    result = {"replicas": ids.result(), "called": called}
    (folder / "result.json").write_text(json.dumps(result))
    serve.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
