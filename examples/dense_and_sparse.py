"""Needs the extra demo: in a clone, pip install ".[demo]".

See what BGE-M3 makes of one passage: a dense vector and lexical weights, of one forward pass.

python examples/dense_and_sparse.py                    # BAAI/bge-m3, a Chinese passage
python examples/dense_and_sparse.py --model ./bge-m3   # a checkpoint folder
python examples/dense_and_sparse.py --small            # a small model
"""

import sys
from itertools import islice

import needs  # noqa: F401 - says what is missing

from command_line import exit_status, find_model, model_options
from display import console, quoted, write

from langchain_bge_dense import BGEM3Embeddings

PASSAGE = (
    "稠密向量把整段文字的意思压缩成一串数字，意思相近的段落在空间里彼此靠近；"
    "稀疏权重则给每个词元一个分数，分数越高，这个词元对检索越重要。"
)


def show(embeddings: BGEM3Embeddings, passage: str) -> None:
    """Print the dense vector and the lexical weights of a passage."""
    encoding = embeddings.encode([passage], dense=True, lexical=True)
    [vector], [weights] = encoding.dense, encoding.lexical
    out = console()
    write(out, f"Passage: {passage}")
    write(out, f"\nDense vector: {len(vector)} dimensions, the first ten:")
    write(out, " ".join(f"{value:.4f}" for value in vector[:10]))
    write(out, f"\nLexical weights: {len(weights)}, the ten largest:")
    for token, weight in islice(embeddings.tokens(weights).items(), 10):
        write(out, f"{weight:.4f}  {quoted(token)}")


def main(arguments: list[str] | None = None) -> int:
    args = model_options("Show what a passage becomes.").parse_args(arguments)
    return exit_status(lambda args: show(find_model(args), PASSAGE), args)


if __name__ == "__main__":
    sys.exit(main())
