"""See what BGE-M3 makes of one passage: a dense vector and lexical weights, of one forward pass.

python examples/dense_and_sparse.py                    # BAAI/bge-m3, a Chinese passage
python examples/dense_and_sparse.py --model ./bge-m3   # a checkpoint folder
python examples/dense_and_sparse.py --small            # a small English model, no download
"""

from __future__ import annotations

import argparse
import logging
import sys
from itertools import islice

from langchain_bge_dense import BGEM3Embeddings

CHINESE = (
    "稠密向量把整段文字的意思压缩成一串数字，意思相近的段落在空间里彼此靠近；"
    "稀疏权重则给每个词元一个分数，分数越高，这个词元对检索越重要。"
)
ENGLISH = (
    "A dense vector squeezes the meaning of a whole passage into a row of numbers, so that similar "
    "passages lie close together; lexical weights give each token a score for how much it matters."
)


def show(embeddings: BGEM3Embeddings, passage: str) -> None:
    """Print the dense vector and the lexical weights of a passage."""
    encoding = embeddings.encode([passage], dense=True, lexical=True)
    [vector], [weights] = encoding.dense, encoding.lexical
    print(f"Passage: {passage}\n")
    print(f"Dense vector: {len(vector)} dimensions, the first ten:")
    print(" ".join(f"{value:.4f}" for value in vector[:10]) + "\n")
    print(f"Lexical weights: {len(weights)}, the ten largest:")
    for token, weight in islice(embeddings.tokens(weights).items(), 10):
        print(f"{weight:.4f}  {token}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Show the dense and lexical sides of a passage.")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default="BAAI/bge-m3", help="hub id or folder of a checkpoint")
    model.add_argument("--small", action="store_true", help="a small model, English only")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning"])
    return parser.parse_args(arguments)


def choose(args: argparse.Namespace) -> tuple[str, str]:
    """Give the checkpoint and a passage in a language that it understands."""
    if not args.small:
        return args.model, CHINESE
    from small_model import build

    return str(build()), ENGLISH


def main(arguments: list[str] | None = None) -> int:
    """Run the example and give the exit status."""
    args = parse(arguments)
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s: %(message)s")
    try:
        model, passage = choose(args)
        show(BGEM3Embeddings(model=model), passage)
    except (ImportError, OSError, ValueError) as error:
        hint = [] if args.small else ["Or try --small, which needs no download."]
        print("Error:", *str(error).split(), *hint, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
