"""The command line: `python -m langchain_bge_dense.serve --help`."""

from __future__ import annotations

import argparse
import contextlib
import copy
import ipaddress
import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import uvicorn

from langchain_bge_dense._options import add_settings
from langchain_bge_dense.embeddings import BGEM3Embeddings
from langchain_bge_dense.serve.app import BODY, QUEUE, TEXTS, create_app

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastapi import FastAPI

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_SHUTDOWN_SECONDS = 60
_KEEP_SECONDS = 75  # longer than the client's, which then need not find a connection closed
_KEY_VARIABLE = "BGE_M3_API_KEY"
_NOT_OF_A_SERVER = ("base_url", "api_key", "show_progress")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve a model until SIGTERM or Ctrl-C, which let what runs finish.

    Args:
        argv: Options of the command line, which `--help` lists, by default those of this process.
    """
    parser = _parser()
    arguments = vars(parser.parse_args(argv))
    address = {name: arguments.pop(name) for name in ("host", "port", "uds")}
    options = {
        name: arguments.pop(name) for name in ("aliases", "max_texts", "max_body", "max_queue")
    }
    key = arguments.pop("api_key") or os.environ.get(_KEY_VARIABLE) or None
    open_to_all = arguments.pop("no_api_key")
    if not (key or open_to_all or address["uds"] or _is_loopback(address["host"])):
        parser.error(
            f"{address['host']} can be reached from other machines. Set {_KEY_VARIABLE} to an API "
            "key, or let anyone in with --no-api-key."
        )
    try:
        embeddings = BGEM3Embeddings(**arguments)
    except ValueError as error:
        parser.error(str(error))
    _run(embeddings, create_app(embeddings, api_key=key, **options), address)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m langchain_bge_dense.serve", description="Serve one BGE-M3 to many processes."
    )
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen at [%(default)s]")
    server.add_argument("--port", type=int, default=8000, help="[%(default)s]")
    server.add_argument("--uds", help="a Unix socket to listen at instead")
    server.add_argument("--api-key", help=f"that callers must send; better in {_KEY_VARIABLE}")
    server.add_argument("--no-api-key", action="store_true", help="let other machines in without")
    server.add_argument(
        "--alias",
        action="append",
        default=[],
        dest="aliases",
        metavar="NAME",
        help="of a model that clients may ask for, too; can be given again",
    )
    for name, default, counted in (
        ("texts", TEXTS, "texts of a request"),
        ("body", BODY, "bytes of a request"),
        ("queue", QUEUE, "requests that wait or run"),
    ):
        server.add_argument(
            f"--max-{name}", type=int, default=default, help=f"{counted} [{default}]"
        )
    model = parser.add_argument_group("model", "the settings of BGEM3Embeddings")
    add_settings(model, without=_NOT_OF_A_SERVER)
    return parser


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _log_config() -> dict[str, Any]:
    """Make Uvicorn's configuration, with its own notice of the start off and our log on."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["loggers"]["uvicorn"]["level"] = "WARNING"
    config["loggers"]["uvicorn.error"]["level"] = "WARNING"
    config["loggers"]["langchain_bge_dense"] = {"handlers": ["default"], "level": "INFO"}
    return config


def _url(address: dict[str, Any]) -> str:
    """Write the `base_url` of clients on this machine."""
    if address["uds"]:
        return f"unix://{address['uds']}"
    host = f"[{address['host']}]" if ":" in address["host"] else address["host"]
    return f"http://{host}:{address['port']}"


def _run(embeddings: BGEM3Embeddings, app: FastAPI, address: dict[str, Any]) -> None:
    """Listen at once, load the model meanwhile, and end if it cannot be loaded."""
    config = uvicorn.Config(
        app,
        **address,
        access_log=False,
        ws="none",
        log_config=_log_config(),
        timeout_keep_alive=_KEEP_SECONDS,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    server = uvicorn.Server(config)
    failed: list[BaseException] = []

    def load() -> None:
        try:
            logger.info("Loading %s.", embeddings.model)
            engine: Any = embeddings.load().engine()
            while not server.started:
                time.sleep(_POLL_SECONDS)
            served = (engine.checkpoint.name, engine.device, engine.dtype, _url(address))
            logger.info("Serving %s on %s in %s at %s (Ctrl-C ends it).", *served)
        except BaseException as error:  # noqa: BLE001 - the main thread tells it
            failed.append(error)
            server.should_exit = True

    threading.Thread(target=load, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if failed:
        sys.exit(f"The model cannot be loaded. {type(failed[0]).__name__}: {failed[0]}")
