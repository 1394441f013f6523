"""Keywords of other libraries, and the field of `BGEM3Embeddings` that does the same."""

from __future__ import annotations

# Of HuggingFaceEmbeddings and FlagEmbedding; None where nothing does it here.
_ELSEWHERE = {
    "model_kwargs": "device, dtype, revision, token, local_files_only",
    "encode_kwargs": "normalize, batch_tokens, document_instruction",
    "query_encode_kwargs": "normalize, batch_tokens, query_instruction",
    "model_name_or_path": "model",
    "cache_dir": "cache_folder",
    "use_auth_token": "token",
    "devices": "device",
    "use_fp16": 'dtype="float16"',
    "use_bf16": 'dtype="bfloat16"',
    "torch_dtype": "dtype",
    "pooling_method": "pooling",
    "normalize_embeddings": "normalize",
    "query_instruction_for_retrieval": "query_instruction",
    "passage_instruction_for_retrieval": "document_instruction",
    "query_instruction_format": "query_instruction, which is put in front as it is",
    "passage_instruction_format": "document_instruction, which is put in front as it is",
    "embed_instruction": "document_instruction",
    "query_max_length": "max_length",
    "passage_max_length": "max_length",
    "batch_size": "batch_tokens, which counts tokens and may be left out",
    "show_progress_bar": "show_progress",
    "return_dense": "encode(texts, dense=True)",
    "return_sparse": "encode(texts, lexical=True)",
    "return_colbert_vecs": "encode(texts, colbert=True)",
    "multi_process": "langchain_bge_dense.serve or langchain_bge_dense.ray",
    "colbert_dim": None,
    "truncate_dim": None,
    "trust_remote_code": None,
}


def check_keywords(fields: object) -> None:
    """Reject keywords of other libraries by the name of the field that does the same."""
    if found := [name for name in _ELSEWHERE if isinstance(fields, dict) and name in fields]:
        here = (
            f"Instead of {name} use {field}."
            if (field := _ELSEWHERE[name])
            else f"Leave {name} out."
            for name in found
        )
        msg = f"BGEM3Embeddings has no field {', '.join(found)}. {' '.join(here)}"
        raise ValueError(msg)
