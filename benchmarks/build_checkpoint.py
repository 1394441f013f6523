"""Write a checkpoint of BGE-M3's exact size with random weights.

It is right for speed and memory, and meaningless for quality: its vectors say nothing about a text.

    python benchmarks/build_checkpoint.py /tmp/bge-m3-random
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny_m3 import build

BGE_M3 = {"layers": 24, "hidden": 1024, "heads": 16, "intermediate": 4096, "positions": 8194}
VOCABULARY = 250_002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write 2.3 GB; made when missing")
    folder = build(parser.parse_args().folder, **BGE_M3, vocab=VOCABULARY)
    print(f"{folder}: random weights, right for speed, meaningless for quality")


if __name__ == "__main__":
    main()
