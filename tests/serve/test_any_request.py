"""Requests that the OpenAPI page allows, and such as it does not: none is answered with a 500."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode

from langchain_bge_dense.serve import create_app

if TYPE_CHECKING:
    import httpx

    from langchain_bge_dense import BGEM3Embeddings

EXAMPLES = 10  # of each kind, for each path

quick = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_fails(tiny: BGEM3Embeddings, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(tiny.load()))
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == len(schema.raw_schema["paths"])
    for operation in operations:
        if mode.is_negative and operation.method == "get":
            continue  # there is nothing in it that could be wrong

        @given(operation.as_strategy(generation_mode=mode))
        @quick
        def answered(case: schemathesis.Case) -> None:
            reply = case.call()
            assert reply.status_code < 500, (case.body, reply.text)

        answered()


HUGE = b"1" + b"0" * 30
BODIES = {
    "/encode": [
        b'{"texts": ["a"], "max_length": %b}' % HUGE,
        b'{"texts": ["a"], "first": %b}' % HUGE,
    ],
    "/tokens": [b'{"weights": {"%b": 1}}' % key for key in (b"-5", b"999999", HUGE, b"1.5")]
    + [b'{"weights": {"5": %b}}' % value for value in (b"NaN", b"Infinity", b"1e999", HUGE)],
    "/tokenize": [b'{"text": "\\ud800"}', b'{"text": "\\u0000"}'],
    "/v1/embeddings": [
        b'{"input": "a", "dimensions": %b}' % HUGE,
        b'{"input": "a", "dimensions": NaN}',
        b'{"input": "a\\ud800"}',
        b'{"input": "a", "model": "\\ud800"}',
        b'{"input": {"a": NaN}}',
        b'{"input": %b%b}' % (b"[" * 500, b"]" * 500),
        b'"\xff\xfe"',
        b"NaN",
        b"",
    ],
    "/rerank": [
        b'{"query": "a", "texts": ["a"], "top_n": %b}' % HUGE,
        b'{"query": "a", "documents": [{"text": "\\ud800"}]}',
        b'{"query": "", "texts": [""]}',
    ],
    "/similarity": [b'{"inputs": {"source_sentence": "", "sentences": ["", 5]}}'],
    "/api/embed": [
        b'{"input": "a", "options": {"num_ctx": %b}}' % HUGE,
        b'{"input": "a", "options": {"num_ctx": NaN}}',
        b'{"input": "a", "model": "/:"}',
    ],
}


@pytest.mark.parametrize(
    ("path", "body"), [(path, body) for path, bodies in BODIES.items() for body in bodies]
)
def test_what_a_generator_does_not_find(http: httpx.Client, path: str, body: bytes) -> None:
    reply = http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code < 500, reply.text
    assert reply.json()
