"""Needs the extra demo: in a clone, pip install ".[demo]".

From a folder of text files to an answer, in a few lines to copy.

python examples/quickstart.py notes/ "What did we decide about the logo?"
python examples/quickstart.py notes/ "Who is in charge?" --llm ollama:llama3.1    # an answer, too

`--model "$(python examples/small_model.py)"` takes a small model.
"""

import argparse
from pathlib import Path

import needs  # noqa: F401 - says what is missing

from langchain.chat_models import init_chat_model
from langchain_core.documents import Document
from langchain_text_splitters import RecursiveCharacterTextSplitter

from langchain_bge_dense import BGEM3Embeddings, BGEM3Retriever
from langchain_bge_dense.chroma import index_documents, open_chroma

parser = argparse.ArgumentParser(description="Ask a folder of .md and .txt files.")
parser.add_argument("folder", type=Path)
parser.add_argument("question")
parser.add_argument("--model", default="BAAI/bge-m3", help="hub id or folder of a checkpoint")
parser.add_argument("--db", default="db", help="folder of the database (default: db)")
parser.add_argument("--llm", metavar="PROVIDER:MODEL", help="chat model that words an answer")
args = parser.parse_args()

# Load: any LangChain loader will do.
documents = []
for path in sorted(args.folder.rglob("*")):
    if path.suffix in {".md", ".txt"}:
        try:
            documents.append(Document(path.read_text("utf-8"), metadata={"source": str(path)}))
        except UnicodeDecodeError:
            print(f"{path} is left out: it is not UTF-8.\n")

# Split into passages that are measured in the model's own tokens.
embeddings = BGEM3Embeddings(model=args.model)
splitter = RecursiveCharacterTextSplitter(
    chunk_size=200, chunk_overlap=20, length_function=embeddings.count_tokens
)
passages = splitter.split_documents(documents)
if not passages:
    parser.error(f"{args.folder} has no .md or .txt file with text in it. Name another folder.")

# Index: what the collection holds already is not embedded again.
store = open_chroma(embeddings, "quickstart", persist_directory=args.db)
index_documents(store, passages, lexical=True, show_progress=True)

# Retrieve by meaning and by words.
found = BGEM3Retriever(vectorstore=store, k=3).invoke(args.question)
for passage in found:
    print(f"{passage.metadata['source']}\n{passage.page_content}\n")

# Ask.
if args.llm:
    context = "\n\n".join(passage.page_content for passage in found)
    prompt = f"Answer from these passages alone:\n\n{context}\n\nQuestion: {args.question}"
    print(init_chat_model(args.llm).invoke(prompt).text)
