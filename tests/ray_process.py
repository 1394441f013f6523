"""Embeds a dataset with a local Ray as a process of its own, in which an actor is killed.

    python ray_process.py CHECKPOINT FOLDER

Leaves the rows as JSON in the folder, and what each actor embedded as a log.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import ray

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense.ray import embed_dataset

FATAL = "passage 333"  # kills the first actor that embeds it
BAD = [3, None, "lone \ud800", "long " * 30]
TEXTS = [f"passage {n}" for n in range(600)]
TEXTS[100:100], TEXTS[500:500] = BAD[:2], BAD[2:]
BLOCKS = 12
SETTINGS = {"device": "cpu", "dtype": "float32"}


class Mortal(BGEM3Embeddings):
    """Logs which process embeds what, and dies of the fatal text, once, with its block done."""

    folder: Path

    def encode(self, texts, **options):
        encoding = super().encode(texts, **options)
        with (self.folder / f"{os.getpid()}.log").open("a") as log:
            log.writelines(f"{text}\n" for text in texts)
        died = self.folder / "died"
        if FATAL in texts and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return encoding


def main(checkpoint: str, folder: Path) -> None:
    ray.init(num_cpus=4, include_dashboard=False)
    strict = {"max_length": 64, "on_truncate": "raise"}
    mortal = Mortal(model=checkpoint, folder=folder, **strict, **SETTINGS)
    rows = [{"body": text, "number": number} for number, text in enumerate(TEXTS)]
    dataset = ray.data.from_items(rows, override_num_blocks=BLOCKS)
    names = {"text_column": "body", "lexical_column": "weights", "error_column": "reason"}
    codes = {"colbert_column": "codes", "colbert": "2bit"}
    done = embed_dataset(dataset, mortal, **names, **codes, concurrency=2)
    (folder / "rows.json").write_text(json.dumps(done.take_all(), default=bytes.hex))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
