"""Needs the extras demo and serve: in a clone, pip install ".[demo,serve]".

A search page: several processes that answer, over one model server and one collection.

python -m langchain_bge_dense.serve                              # the one process with a model
python examples/web_app.py --server http://127.0.0.1:8000        # the page, at port 8080

This process indexes the folder; its workers search the collection, and ask the server for vectors.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import needs  # noqa: F401 - says what is missing

import uvicorn
from answered import NOTHING, seems_answered
from command_line import EXPECTED, check, exit_status, say, search_options
from display import location
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from folder_index import open_documents, open_folder
from hybrid_search import QUESTIONS
from jinja2 import Environment

from langchain_bge_dense import BGEM3Retriever
from langchain_bge_dense.matches import find_matches

PAGE = Path(__file__).with_name("web_page.html")
OPTIONS = "WEB_APP_OPTIONS"  # an environment variable, which new processes inherit


def create_app() -> FastAPI:
    """Make the application of one worker."""
    args = argparse.Namespace(**json.loads(os.environ[OPTIONS]))
    store, folder = open_folder(args)
    retriever = BGEM3Retriever(vectorstore=store, k=args.k, scores=True)
    template = Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8"))
    fixed = {"folder": folder.resolve().name, "questions": () if args.documents else QUESTIONS}
    app = FastAPI(openapi_url=None)

    @app.get("/")
    def search(q: str = "") -> HTMLResponse:
        page = {**fixed, "query": q, "process": os.getpid()}
        try:
            found = retriever.invoke(q) if q.strip() else []
            matches = find_matches(store.embeddings, q, found) if found else None
            answered = seems_answered(q, found, store.embeddings.fingerprint)
        except EXPECTED as error:
            return HTMLResponse(template.render(**page, error=error), 503)
        labels = [f"{rank}  {location(passage)}" for rank, passage in enumerate(found, start=1)]
        return HTMLResponse(
            template.render(
                **page, matches=matches, labels=labels, note="" if answered else NOTHING
            )
        )

    return app


def run(args: argparse.Namespace) -> None:
    """Index the folder, then serve the page until Ctrl-C."""
    check(args)
    open_documents(args, lexical=True).close()
    os.environ[OPTIONS] = json.dumps(vars(args), default=str)
    say(f"The page is at http://127.0.0.1:{args.port}")
    options = {"port": args.port, "workers": args.workers, "log_level": args.log_level}
    # Longer than a worker takes to import this file on a busy machine; it would be started anew.
    uvicorn.run("web_app:create_app", factory=True, timeout_worker_healthcheck=120, **options)


def main(arguments: list[str] | None = None) -> int:
    parser = search_options("Serve a search page from several processes.", k=5)
    parser.add_argument("--port", type=int, default=8080, help="of the page (default: 8080)")
    parser.add_argument("--workers", type=int, default=4, help="processes (default: 4)")
    return exit_status(run, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
