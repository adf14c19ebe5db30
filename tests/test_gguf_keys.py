"""What the keys of a GGUF file mean to the config that is read from it, one at a time, and values that are checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written_gguf import LLAMA3, build, rope_divisors, write_model

from outrider.errors import CheckpointError
from outrider.models.gguf import GGUFFile, main_type, read_config, read_model
from outrider.models.gguf.gguf_config import _Keys

THETA = {"rope_theta": 5e5}
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GGUFFile]:
    """By architecture: three layers, four heads of width 32, states of width 64, 101 tokens, a context of 128."""
    folder = tmp_path_factory.mktemp("gguf")
    return {name: GGUFFile(write_model(folder / name, build(name), name)) for name in ("llama", "qwen2", "gemma3")}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.causal", False),
        ("llama.attention.clamp_kqv", 30.0),
        ("llama.attention.max_alibi_bias", 8.0),
        ("llama.attention.scale", 0.25),
        ("llama.attention.temperature_scale", 0.1),
        ("llama.attn_logit_softcapping", 50.0),
        ("llama.embedding_scale", 12.0),
        ("llama.logit_scale", 0.5),
        ("llama.pooling_type", 1),
        ("llama.residual_scale", 0.5),
        ("llama.rope.scaling.yarn_ext_factor", 0.5),
        ("llama.rope.scaling.yarn_log_multiplier", 0.1),
        ("llama.use_parallel_residual", True),
        ("llama.attention.value_length", 16),
        ("llama.attention.head_count_kv", np.array([2, 1, 2])),
        ("llama.attention.head_count_kv", 0),
        ("llama.attention.layer_norm_rms_epsilon", 1.5),
        ("llama.block_count", 0),
        ("tokenizer.ggml.bos_token_id", 101),
        ("qwen2.attention.sliding_window", 5),
        ("gemma3.attention.sliding_window_pattern", 0),
        ("gemma3.attention.sliding_window_pattern", np.array([True, False])),
    ],
)
def test_values_that_no_model_here_computes_with_are_refused(
    key: str, value: Any, files: dict[str, GGUFFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = files.get(key.split(".")[0], files["llama"])
    monkeypatch.setattr(file, "keys", {**file.keys, key: value})
    name = key.removesuffix("_token_id").rpartition(".")[2].replace("_", ".")  # a message may say it with spaces
    with pytest.raises(CheckpointError, match=name) as error:
        read_config(file)
    assert str(file.path) in str(error.value)
    if key.endswith("epsilon"):
        assert "is 1.5, expected a number of at least 0 and below 1" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", True),
        ("attention.clamp_kqv", 0.0),
        ("attention.scale", 0.0),
        ("attention.scale", float(np.float32(32**-0.5))),
        ("attention.sliding_window", 128),
        ("embedding_scale", 1.0),
        ("expert_count", 0),
        ("logit_scale", 0.0),
        ("residual_scale", 1.0),
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.yarn_ext_factor", -1.0),
        ("rope.scaling.factor", 1.0),
    ],
)
def test_values_that_change_nothing(
    key: str, value: Any, files: dict[str, GGUFFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = files["llama"]
    expected = read_config(file)
    monkeypatch.setattr(file, "keys", {**file.keys, f"llama.{key}": value})
    assert read_config(file) == expected


YARN = {"rope_type": "yarn", **THETA, "factor": 4.0, "original_max_position_embeddings": 128}
USUAL = 1 + 0.1 * math.log(4)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"llama.attention.sliding_window": 127}, {"model_type": "mistral", "sliding_window": 127}),
        ({"llama.rope.scale_linear": 4.0}, {"rope_parameters": {"rope_type": "linear", **THETA, "factor": 4.0}}),
        (
            {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
            {"rope_parameters": {"rope_type": "default", **THETA}},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.attn_factor": 1.5,
            },
            {"rope_parameters": {**YARN, "attention_factor": pytest.approx(1.5 * USUAL)}},
        ),
        ({"gemma3.attention.sliding_window": 0}, {"layer_types": [FULL] * 3, "sliding_window": 128}),
        ({"gemma3.attention.sliding_window_pattern": 2}, {"layer_types": [SLIDING, FULL, SLIDING]}),
        ({"tokenizer.ggml.bos_token_id": 0xFFFFFFFF}, {"bos_token_id": None}),
        ({"tokenizer.ggml.eom_token_id": 9}, {"eos_token_id": [7, 9]}),
        ({"general.sampling.top_k": 5, "general.sampling.temp": 0.0}, {"generation_config": {}}),
    ],
)
def test_what_keys_say(
    keys: dict[str, Any], expected: dict[str, Any], files: dict[str, GGUFFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = files.get(next(iter(keys)).split(".")[0], files["llama"])
    monkeypatch.setattr(file, "keys", {**file.keys, **keys})
    config = read_config(file)
    assert {name: config[name] for name in expected} == expected


def test_gemma3s_two_thetas_and_the_scale_of_its_27b_model(
    files: dict[str, GGUFFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, own = files["gemma3"], {"gemma3.rope.global.freq_base": 3e6, "gemma3.rope.freq_base_swa": 3e4}
    keys = {name: value for name, value in file.keys.items() if name != "gemma3.rope.freq_base"}
    config = read_config(file)
    assert config["query_pre_attn_scalar"] == 32
    assert _Keys(file).gemma3({**config, "num_hidden_layers": 62})["query_pre_attn_scalar"] == 64 // 4
    for added, thetas in ((own, (3e6, 3e4)), ({}, (1e6, 1e4))):
        monkeypatch.setattr(file, "keys", {**keys, **added})
        rope = read_config(file)["rope_parameters"]
        assert (rope[FULL]["rope_theta"], rope[SLIDING]["rope_theta"]) == thetas


# ------------------------------------------------------------------------------------------------ values


def with_tensor(name: str, values: np.ndarray, *more: Callable[[Any], None]) -> Callable[[Any], None]:
    def change(writer: Any) -> None:
        writer.add_tensor(name, values)
        for one in more:
            one(writer)

    return change


def test_llama3s_scaling_is_found_again_whatever_its_original_context(tmp_path: Path) -> None:
    """As a key says, 8192, the context, or the context by the largest divisor."""
    key = "llama.rope.scaling.original_context_length"
    for original, keys in ((4096, {key: 4096}), (128, {}), (16, {})):
        rope = {**LLAMA3, "original_max_position_embeddings": original}
        change = with_tensor("rope_freqs.weight", rope_divisors(rope, 32))
        file = GGUFFile(write_model(tmp_path / "model.gguf", build("llama"), "llama", change=change))
        file.keys |= keys
        assert read_config(file)["rope_parameters"] == rope


def test_rope_divisors_that_are_refused(tmp_path: Path) -> None:
    linear = [lambda writer: writer.add_float32("llama.rope.scaling.factor", 2.0)]
    for values, more, message in (
        (np.ones(8, np.float32), [], r"has shape \[8\], expected \[16\]"),
        (np.linspace(0, 1, 16, dtype=np.float32), [], "no positive numbers"),
        (np.ones(16, np.float32), linear, "both rope scaling 'linear' and 'rope_freqs.weight'"),
    ):
        change = with_tensor("rope_freqs.weight", values, *more)
        file = GGUFFile(write_model(tmp_path / "model.gguf", build("llama"), "llama", change=change))
        with pytest.raises(CheckpointError, match=message):
            read_config(file)


def overwritten(path: Path, name: str, at: int, value: bytes) -> Path:
    """A file with other bytes at ``at`` of a tensor, in the part that holds it. -> the part"""
    file = GGUFFile(path)
    info = file.tensors[name]
    part = file.paths[info.part]
    raw = bytearray(part.read_bytes())
    raw[info.begin + at : info.begin + at + len(value)] = value
    part.unlink()  # the open file keeps its map
    part.write_bytes(raw)
    return part


def test_a_minimum_that_is_not_finite(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", build("llama"), "llama", "Q4_1")
    overwritten(path, "blk.0.ffn_up.weight", 2, b"\x00\x7c")  # infinity in float16
    with pytest.raises(CheckpointError, match=r"'blk.0.ffn_up.weight' of .* NaN or infinite"):
        read_model(GGUFFile(path))[1].blocks("layers.0.up.weight")


def test_large_values_whose_sum_is_infinite_are_no_damage(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", build("llama"), "llama")
    overwritten(path, "blk.0.ffn_up.weight", 0, np.full(4, 3e38, np.float32).tobytes())
    assert (read_model(GGUFFile(path))[1]["layers.0.up.weight"][0, :4] == np.float32(3e38)).all()


def test_a_damaged_part_is_named_and_changes_the_identity(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", build("llama"), "llama", split_max_tensors=10)
    first = min(tmp_path.iterdir())
    before, name = GGUFFile(first).identity, "blk.2.ffn_up.weight"
    part = overwritten(first, name, 0, b"\xff" * 4)
    assert part != first and GGUFFile(first).identity != before
    with pytest.raises(CheckpointError, match=f"'{name}' of .*{part.name} holds values that are NaN"):
        read_model(GGUFFile(first))[1]["layers.2.up.weight"]


def test_the_main_type_is_that_of_matrices(tmp_path: Path) -> None:
    change = with_tensor("mm.position", np.ones(100_000, np.float32))
    path = write_model(tmp_path / "model.gguf", build("llama"), "llama", "Q8_0", change=change)
    assert main_type(GGUFFile(path)) == "Q8_0"
    assert read_model(GGUFFile(path))[1].kinds["layers.0.q.weight"] == "Q8_0"
