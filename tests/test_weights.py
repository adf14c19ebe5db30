"""Reading model directories: what is found, what is refused, and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from outrider.errors import CheckpointError, InvalidRequest
from outrider.files import read_config, write_json
from outrider.models.loading import load_target
from outrider.models.locations import resolve_model
from outrider.models.weights import LazyWeights, TensorFiles, load_dtype, write_tensors

CONFIG: dict[str, Any] = dict(
    model_type="llama",
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=False,
)
SHAPES = {
    "lm_head.weight": (11, 8),
    "model.embed_tokens.weight": (11, 8),
    "model.norm.weight": (8,),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small complete Llama."""
    path = tmp_path / "model"
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    write_tensors(path / "model.safetensors", tensors)
    write_json(path / "config.json", CONFIG)
    return path


def change(directory: Path, **tensors: Tensor | None) -> None:
    file = directory / "model.safetensors"
    changed = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file)


def refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_target(directory, backend="reference")
    assert "\n" not in str(caught.value)


def test_the_small_llama_loads(directory: Path) -> None:
    assert load_target(directory, backend="reference").spec.num_layers == 1
    assert load_target(str(directory), backend="reference").spec.name == str(directory)


def test_directories_that_are_refused(tmp_path: Path, directory: Path) -> None:
    refused(tmp_path / "nowhere", "no such model directory")
    refused(directory / "config.json", "is a file, but no GGUF file; expected a GGUF file, or a model directory")
    refused(tmp_path, "config.json is missing")
    (directory / "config.json").write_text("{not json")
    refused(directory, "config.json is not readable as JSON")
    (directory / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(directory, "config.json is not readable as JSON")
    (directory / "config.json").write_text("[]")
    refused(directory, "holds a JSON list; expected an object")
    (directory / "config.json").write_text("{}")
    refused(directory, "names no model_type")
    write_json(directory / "config.json", CONFIG)
    (directory / "generation_config.json").write_text("nope")
    refused(directory, "generation_config.json is not readable")


def test_files_that_are_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        file.write_bytes(whole[:cut])
        refused(directory, "model.safetensors is not a complete safetensors file")
    file.write_bytes(b"\xff" * 8 + whole[8:])
    refused(directory, "is not a complete safetensors file")
    file.unlink()
    refused(directory, "holds no model.safetensors and no GGUF file$")
    (directory / "pytest_model.bin").write_bytes(b"\x80\x04.")
    refused(directory, "only pytest_model.bin: pickled weights can run code and are never read")


def test_shards_that_are_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.rename(directory / "a.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}}))
    refused(directory, "expected a weight_map from tensors' names to files' names")
    index.write_text(json.dumps({"weight_map": {"x": 1, "y": "a.safetensors"}}))
    refused(directory, "expected a weight_map")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "a.safetensors") | {"x": "b.safetensors"}}))
    refused(directory, "b.safetensors is missing")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "a.safetensors") | {"x": "a.safetensors"}}))
    refused(directory, "tensor 'x' is missing: model.safetensors.index.json says that it is in a.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(SHAPES, "../a.safetensors")}))  # never leaves the folder
    load_target(directory, backend="reference")


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_tensor_is_named(name: str, directory: Path) -> None:
    change(directory, **{name: None})
    refused(directory, f"tensor '{name}' is missing")


@pytest.mark.parametrize("name", SHAPES)
def test_a_wrong_shape_is_named(name: str, directory: Path) -> None:
    change(directory, **{name: torch.ones(3, 5)})
    refused(directory, rf"tensor '{name}' has shape \[3, 5\], but the config says")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_damaged_tensor_is_named(name: str, value: float, directory: Path) -> None:
    tensor = torch.ones(SHAPES[name])
    tensor.view(-1)[-1] = value
    change(directory, **{name: tensor})
    refused(directory, f"tensor '{name}' of .* holds values that are NaN or infinite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_plain_floats_are_refused(dtype: torch.dtype, directory: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(directory, **{name: torch.ones(SHAPES[name]).to(dtype)})
    refused(directory, f"tensor '{name}' is stored as .*, expected one of F64, F32, F16, BF16")


def test_other_tensors(directory: Path) -> None:
    change(directory, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    load_target(directory, backend="reference")
    write_json(directory / "config.json", {**CONFIG, "tie_word_embeddings": True})
    load_target(directory, backend="reference")  # lm_head is a duplicate then
    for name in ("model.layers.0.self_attn.sinks", "model.layers.0.mlp.extra.weight", "model.layers.1.scalar", "odd"):
        change(directory, **{name: torch.ones(2)})
        refused(directory, f"unexpected tensor '{name}'")
        change(directory, **{name: None})
    change(directory, **{"language_model.norm.weight": torch.ones(8)})
    refused(directory, "'language_model.norm.weight' and 'model.norm.weight' are the same weight")


def test_names_that_are_no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="'nobody/nothing' is no local directory or GGUF file, and .* failed"):
        resolve_model("nobody/nothing")
    with pytest.raises(CheckpointError, match="failed"):
        resolve_model("not a model id!")
    for name in ("./nothing", "~/nothing-here", "/nothing/here", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such model directory"):
            resolve_model(name)


def test_generation_config_travels_with_the_config(directory: Path) -> None:
    assert read_config(directory)["generation_config"] == {}
    write_json(directory / "generation_config.json", {"eos_token_id": 3})
    assert read_config(directory)["generation_config"] == {"eos_token_id": 3}


def test_dtypes() -> None:
    assert (load_dtype("bfloat16"), load_dtype("int8")) == (torch.bfloat16, torch.float32)
    with pytest.raises(InvalidRequest, match="unknown dtype 'flaot32'; did you mean 'float32'"):
        load_dtype("flaot32")
    with pytest.raises(InvalidRequest, match="'fp32'; expected one of: auto, bfloat16, file, float32.*int8$"):
        load_dtype("fp32")


def test_tensors_are_read_exactly_and_only_when_asked_for(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "half": torch.randn(5, 3, generator=generator, dtype=torch.bfloat16),
        "double": torch.randn(2, 3, 4, generator=generator, dtype=torch.float64),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "bad": torch.tensor([torch.nan]),
    }
    write_tensors(tmp_path / "model.safetensors", tensors)
    weights = LazyWeights(TensorFiles(tmp_path), lambda name: None if name == "one" else name.upper(), torch.float32)
    assert set(weights) == {"HALF", "DOUBLE", "NONE", "BAD"} and len(weights) == 4 and "one" not in weights
    assert weights.shapes["DOUBLE"] == (2, 3, 4)
    for name in ("half", "double", "none"):
        assert torch.equal(weights[name.upper()], tensors[name].float())
    assert torch.equal(TensorFiles(tmp_path).read("one", torch.float64), torch.tensor(2.5, dtype=torch.float64))
    with pytest.raises(CheckpointError, match="'bad'"):
        weights["BAD"]


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(100, 7)
    write_tensors(tmp_path / "model.safetensors", {"x": tensor})
    monkeypatch.setattr("outrider.models.weights.CHUNK", 9 * 28)
    assert torch.equal(TensorFiles(tmp_path).read("x", torch.float32), tensor)


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["value.json"]
    write_tensors(path.parent / "t.safetensors", {"x": torch.ones(4, 2).T}, {"made": "here"})
    assert torch.equal(load_file(path.parent / "t.safetensors")["x"], torch.ones(2, 4))


MEASURE = """
import re, sys, torch
import outrider.backends.reference, outrider.models.llama, safetensors
from outrider.models.loading import load_target
status = lambda key: int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = status("VmRSS")
target = load_target(sys.argv[1], backend="reference")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_needs_one_copy_of_the_weights(tmp_path: Path) -> None:
    """Peak memory of a bfloat16 file loaded as float32: the float32 weights, and not much besides."""
    config = {**CONFIG, "hidden_size": 512, "intermediate_size": 4096, "vocab_size": 8192, "num_hidden_layers": 3}
    sizes = {8: 512, 4: 256, 12: 4096, 11: 8192}
    tensors = {}
    for name, shape in SHAPES.items():
        for layer in range(3 if ".0." in name else 1):
            tensors[name.replace(".0.", f".{layer}.")] = torch.zeros([sizes[s] for s in shape], dtype=torch.bfloat16)
    write_tensors(tmp_path / "model.safetensors", tensors)
    write_json(tmp_path / "config.json", config)
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    weights = sum(tensor.numel() * 4 for tensor in tensors.values())
    assert int(run.stdout) < weights * 1.3 + (32 << 20), (
        f"{int(run.stdout) >> 20} MiB for {weights >> 20} MiB of weights"
    )


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("outrider.models.weights.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(4)})
    assert error.value.filename == str(tmp_path / "a.safetensors") and not list(tmp_path.iterdir())
