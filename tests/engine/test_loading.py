"""Devices and dtypes: what is chosen, and what a load leaves as it was."""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import pytest
import torch
from reference import flag_model
from safetensors.torch import save_file
from tiny_m3 import write_heads
from transformers import MPNetConfig, MPNetModel
from transformers.utils import logging

from langchain_bge_dense import BGEM3Embeddings
from langchain_bge_dense._engine import loading
from langchain_bge_dense._engine.checkpoint import Checkpoint, read_checkpoint
from langchain_bge_dense._engine.layers import PackedEncoder, PaddedEncoder
from langchain_bge_dense._engine.linear import cpu_is_fast_in_bf16
from langchain_bge_dense._engine.loading import resolve

DTYPES = ["float32", "bfloat16", "float16", "int8"]  # the last one for packed types alone


LOAD = """
import sys
from langchain_bge_dense import BGEM3Embeddings
BGEM3Embeddings(model=sys.argv[1], device="cpu").load()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has another OpenMP there")
@pytest.mark.parametrize(
    ("own", "rounds"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, "0"),
    ],
)
def test_threads_wait_busily_for_short_unless_a_user_says_how_long(
    tiny_checkpoint: Path, own: dict[str, str], rounds: str
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", LOAD, str(tiny_checkpoint)]
    ended = subprocess.run(
        command,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
        env=environment | {"OMP_DISPLAY_ENV": "verbose"} | own,
    )
    assert f"GOMP_SPINCOUNT = '{rounds}'" in ended.stderr


def test_loading_gives_transformers_its_voice_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    state = logging.get_verbosity(), logging.is_progress_bar_enabled()
    BGEM3Embeddings(model=tiny_checkpoint, device="cpu", pooling="mean").load()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == state
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        BGEM3Embeddings(model=broken, device="cpu").load()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == state


def test_loads_change_transformers_settings_one_after_the_other(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = logging.get_verbosity(), logging.is_progress_bar_enabled()
    checkpoint = read_checkpoint(tiny_checkpoint, "tiny")
    entered: SimpleQueue[str] = SimpleQueue()
    go_on = Event()

    def check(_checkpoint: Checkpoint) -> None:
        entered.put(f"{logging.get_verbosity()} {logging.is_progress_bar_enabled()}")
        go_on.wait()

    monkeypatch.setattr(loading, "check_weights", check)
    with ThreadPoolExecutor() as pool:
        loads = [pool.submit(loading._load_flag_model, checkpoint) for _ in range(2)]
        quiet = entered.get()
        time.sleep(0.2)  # the other one waits, as when Ctrl-C has left the first to itself
        together = not entered.empty()
        go_on.set()
        assert [load.result().pooling_method for load in loads] == ["cls", "cls"]
    assert not together
    assert entered.get() == quiet == f"{logging.ERROR} False"
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == state


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with these devices; tensors are made on the CPU all the same."""

    def make(*, cuda: bool = False, mps: bool = False, bf16: bool = False) -> None:
        empty = torch.empty
        kinds = {"cpu": True, "cuda": cuda, "mps": mps}

        def on(*shape: int, device: str) -> object:
            if not kinds.get(torch.device(device).type):
                msg = "no such device"
                raise RuntimeError(msg)
            tensor = type("Tensor", (), {"device": torch.device(device)})
            return tensor if shape == (0,) else empty(*shape)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch, "empty", on)
        monkeypatch.setattr(loading, "cpu_is_fast_in_bf16", lambda: bf16)

    return make


@pytest.mark.parametrize(
    ("device", "cuda", "mps", "chosen"),
    [
        ("auto", False, False, "cpu"),
        ("auto", True, False, "cuda"),
        ("auto", False, True, "mps"),
        ("auto", True, True, "cuda"),
        ("cpu", True, True, "cpu"),
        ("cpu:0", True, False, "cpu"),
        ("cuda:1", True, False, "cuda:1"),
        ("mps", False, True, "mps"),
    ],
)
def test_device(machine, device: str, chosen: str, *, cuda: bool, mps: bool) -> None:
    machine(cuda=cuda, mps=mps)
    assert resolve(device, "float32") == (chosen, "float32")


@pytest.mark.parametrize(
    ("dtype", "device", "bf16", "chosen"),
    [
        ("auto", "cpu", True, "bfloat16"),
        ("auto", "cpu", False, "float32"),
        ("auto", "cuda", False, "float16"),
        ("auto", "cuda:1", True, "float16"),
        ("auto", "mps", False, "float16"),
        ("int8", "cpu", False, "int8"),
        ("bfloat16", "cpu", False, "bfloat16"),
        ("float16", "cpu", True, "float16"),
        ("float32", "cuda", True, "float32"),
    ],
)
def test_dtype(machine, dtype: str, device: str, chosen: str, *, bf16: bool) -> None:
    machine(cuda=True, mps=True, bf16=bf16)
    assert resolve(device, dtype)[1] == chosen


@pytest.mark.parametrize("device", ["cuda", "auto", "mps"])
def test_int8_is_for_a_cpu(machine, device: str) -> None:
    machine(cuda=True, mps=True)
    with pytest.raises(ValueError, match='dtype="int8" runs on a CPU alone, not on device'):
        resolve(device, "int8")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "", "hpu"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=f"does not find device '{device}'"):
        resolve(device, "auto")


@pytest.mark.parametrize(
    ("units", "fast"),
    [
        ({"avx2", "sse4a"}, False),
        ({"avx2", "avx512_vnni"}, False),
        ({"avx512_bf16", "sse4a"}, True),  # AMD
        ({"avx512_bf16", "avx512_fp16", "sse4a"}, True),
        ({"avx512_bf16"}, True),  # Cooper Lake
        ({"avx512_bf16", "avx512_fp16"}, False),  # Sapphire Rapids, of which AMX is hidden
        ({"avx512_bf16", "avx512_fp16", "amx_bf16"}, True),
        ({"bf16"}, True),  # Arm
    ],
)
def test_cpus_that_are_fast_in_bf16(
    units: set[str], monkeypatch: pytest.MonkeyPatch, *, fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(units, True), False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert cpu_is_fast_in_bf16() == fast


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists() or "ONEDNN_MAX_CPU_ISA" in os.environ,
    reason="there is no /proc/cpuinfo, or oneDNN is told to use less than it says",
)
def test_bf16_is_found_where_the_kernel_finds_it() -> None:
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    slow = "avx512_fp16" in flags and "sse4a" not in flags
    units = {"x86_64": {"amx_bf16"} if slow else {"amx_bf16", "avx512_bf16"}, "aarch64": {"bf16"}}
    assert cpu_is_fast_in_bf16() == bool(flags & units[platform.machine()])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variable is for x86")
def test_bf16_is_not_used_where_onednn_may_not() -> None:
    code = "from langchain_bge_dense._engine.loading import resolve; print(resolve('cpu', 'auto'))"
    limited = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.run([sys.executable, "-c", code], env=limited, stdout=-1, check=True)
    assert b"float32" in found.stdout


@pytest.fixture(scope="module")
def mpnet(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a type that is not packed."""
    folder = tmp_path_factory.mktemp("checkpoints") / "mpnet"
    shutil.copytree(tiny_checkpoint, folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = MPNetConfig(
        vocab_size=rows,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        pad_token_id=1,
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty_like(weight).normal_(std=0.1, generator=generator)
        for name, weight in MPNetModel(config).named_parameters()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_heads(folder, 32, generator)
    return folder


def test_another_type_runs_by_its_own_module(mpnet: Path) -> None:

    texts = ["free and equal", "", "<pad> rights"]
    embeddings = BGEM3Embeddings(model=mpnet, device="cpu", dtype="float32")
    assert isinstance(embeddings.load()._engine.encoder._layers, PaddedEncoder)
    found = embeddings.encode(texts, lexical=True, colbert=True)
    flag = flag_model(mpnet)
    # Text by text: FlagEmbedding's padding would be attended to where a text spells it out.
    for index, text in enumerate(texts):
        expected = flag.encode([text], return_sparse=True, return_colbert_vecs=True)
        assert found.dense[index] @ expected["dense_vecs"][0] > 0.999999
        assert found.lexical[index] == pytest.approx(
            {int(key): value for key, value in expected["lexical_weights"][0].items()}, abs=1e-5
        )
        assert found.colbert[index].shape == expected["colbert_vecs"][0].shape


def test_another_type_runs_in_bfloat16_and_not_in_int8(mpnet: Path) -> None:
    exact, half = (
        BGEM3Embeddings(model=mpnet, device="cpu", dtype=dtype).encode(["free and equal"])
        for dtype in ("float32", "bfloat16")
    )
    assert exact.dense[0] @ half.dense[0] > 0.999
    with pytest.raises(ValueError, match='dtype="int8" cannot run an encoder of type \'mpnet'):
        BGEM3Embeddings(model=mpnet, device="cpu", dtype="int8").load()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc/self/maps")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*(("packed", dtype) for dtype in DTYPES), *(("padded", dtype) for dtype in DTYPES[:3])],
)
def test_a_loaded_model_has_let_go_of_its_file(
    kind: str, dtype: str, tiny_checkpoint: Path, mpnet: Path, tmp_path: Path
) -> None:
    """A file that is rewritten, or cut short, must not reach a model that is at work."""
    folder = shutil.copytree(tiny_checkpoint if kind == "packed" else mpnet, tmp_path / "own")
    embeddings = BGEM3Embeddings(model=folder, device="cpu", dtype=dtype)
    before = embeddings.load().embed_query("free")
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    weights = folder / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.write(bytes(weights.stat().st_size))
    assert embeddings.embed_query("free") == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_type_of_the_list_is_packed_in_every_dtype(tiny_checkpoint: Path, dtype: str) -> None:
    embeddings = BGEM3Embeddings(model=tiny_checkpoint, device="cpu", dtype=dtype).load()
    assert isinstance(embeddings._engine.encoder._layers, PackedEncoder)


def test_loading_leaves_no_second_copy_of_the_weights(tiny_checkpoint: Path) -> None:
    before = transformers_layers()  # of other tests' models
    embeddings = BGEM3Embeddings(model=tiny_checkpoint, device="cpu", dtype="bfloat16").load()
    assert transformers_layers() == before
    embeddings.close()


def transformers_layers() -> int:
    gc.collect()
    return sum(type(item).__name__ == "XLMRobertaLayer" for item in gc.get_objects())
