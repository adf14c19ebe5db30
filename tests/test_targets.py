"""Every kind of target against Transformers' own code on small random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from outrider import checkpoints
from outrider.errors import CacheFull, CheckpointError, InvalidRequest, UnknownKind
from outrider.evaluation.conversion import convert
from outrider.models.huggingface import HuggingFaceTarget
from outrider.models.loading import load_layers, load_target, model_config
from outrider.models.toy import ToyTarget
from outrider.training.networks import training_of
from outrider.types import RaggedBatch, TargetModel

SMALL: dict[str, Any] = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=7,
    pad_token_id=None,
    initializer_range=0.3,
)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32}
NATIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
    "llama-untied-linear": ("Llama", dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})),
    "mistral": ("Mistral", dict(sliding_window=5)),
    "mistral-layers": ("Mistral", dict(sliding_window=5)),
    "mistral-multi-head": ("Mistral", dict(sliding_window=None, num_key_value_heads=4)),
    "qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(rope_parameters=YARN)),
    "qwen3-one-key-head": ("Qwen3", dict(num_key_value_heads=1, tie_word_embeddings=True, hidden_act="gelu")),
    "gemma3": ("Gemma3", dict(sliding_window=5, query_pre_attn_scalar=20, final_logit_softcapping=9.0)),
    "gemma4": (
        "Gemma4",
        dict(
            hidden_size_per_layer_input=0,
            sliding_window=5,
            global_head_dim=32,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        ),
    ),
}
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", dict(n_embd=48, n_layer=3, n_head=4, vocab_size=101, n_positions=128, initializer_range=0.3)),
    "gpt_neox": ("GPTNeoX", dict(SMALL, rotary_pct=0.5, tie_word_embeddings=True)),
    "mpt": ("Mpt", dict(d_model=48, n_layers=3, n_heads=4, vocab_size=101, max_seq_len=96, eos_token_id=7)),
    "gemma2": ("Gemma2", dict(SMALL, sliding_window=5, final_logit_softcapping=9.0, attn_logit_softcapping=20.0)),
}


def build(name: str) -> transformers.PreTrainedModel:
    """A random model whose norms and biases are not what they start as."""
    family, options = {**NATIVE, **ADAPTED}[name]
    if name in NATIVE:
        options = {**SMALL, **options}
    config_class = getattr(transformers, f"{family}{'Text' if family in ('Gemma3', 'Gemma4') else ''}Config")
    model_class = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")
    torch.manual_seed(11)
    model = model_class(config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for key, buffer in model.named_buffers():
            if key.endswith("layer_scalar"):
                buffer.fill_(0.75)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, transformers.PreTrainedModel]]:
    made = {}
    for name in (*NATIVE, *ADAPTED):
        model = build(name)
        directory = tmp_path_factory.mktemp(name)
        model.save_pretrained(directory)
        if name == "mistral-layers":  # Transformers reads such a file as Ministral
            config = json.loads((directory / "config.json").read_text())
            kinds = ["full_attention", "sliding_attention", "full_attention"]
            (directory / "config.json").write_text(json.dumps({**config, "layer_types": kinds}))
            model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
        made[name] = directory, model
    return made


def one_row(target: TargetModel, ids: list[int], **options: Any) -> tuple[Tensor, Tensor | None]:
    cache = target.new_cache(1, 64)
    output = target.forward(RaggedBatch.pack([ids], [0], [cache.open()]), cache, **options)
    return output.logits, output.features


IDS = [3, 99, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84]


@torch.no_grad()
@pytest.mark.parametrize("name", [*NATIVE, *ADAPTED])
def test_logits_and_features_equal_transformers(name: str, saved: Any) -> None:
    directory, model = saved[name]
    target = load_target(directory, backend="reference")
    assert isinstance(target, HuggingFaceTarget) == (name in ADAPTED)
    theirs = model(torch.tensor([IDS]), output_hidden_states=True)
    logits, features = one_row(target, IDS, aux_layers=(1, -1, 0))
    torch.testing.assert_close(logits, theirs.logits[0], atol=1e-4, rtol=1e-5)
    expected = torch.cat([theirs.hidden_states[aux_layer + 1][0] for aux_layer in (1, -1, 0)], -1)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma4", "qwen3", "gpt2", "gemma2"])
def test_cached_chunked_and_ragged_passes_equal_whole_ones(name: str, saved: Any) -> None:
    target = load_target(saved[name][0], dtype="float64", backend="reference")
    near = dict(atol=1e-5 if name == "gemma2" else 1e-9, rtol=0)  # Gemma 2's softmax is float32 in Transformers
    whole = one_row(target, IDS, aux_layers=(0,))
    other = one_row(target, IDS[::-1], aux_layers=(0,))
    cache = target.new_cache(3, 32)
    cache.open()
    a, b = cache.open(), cache.open()
    first = target.forward(RaggedBatch.pack([IDS[:9], IDS[:3:-1]], [0, 0], [b, a]), cache, aux_layers=(0,))
    second = target.forward(RaggedBatch.pack([IDS[3::-1], IDS[9:10]], [16, 9], [a, b]), cache, aux_layers=(0,))
    assert cache.lengths.tolist() == [0, 20, 10]
    for mine, theirs in zip(whole, (first.logits[:9], first.features[:9]), strict=True):
        torch.testing.assert_close(theirs, mine[:9], **near)
    for mine, theirs in zip(other, (second.logits[:4], second.features[:4]), strict=True):
        torch.testing.assert_close(theirs, mine[16:], **near)
    torch.testing.assert_close(second.logits[4], whole[0][9], **near)
    cache.rewind(torch.tensor([b]), torch.tensor([5]))
    rest = target.forward(RaggedBatch.pack([IDS[5:]], [5], [b]), cache, logits_at=torch.tensor([14, 0]))
    torch.testing.assert_close(rest.logits, whole[0][[19, 5]], **near)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "gpt2", "gemma2", "qwen2"])
def test_embed_and_unembed_are_those_of_the_pass(name: str, saved: Any) -> None:
    directory, model = saved[name]
    target = load_target(directory, backend="reference")
    hidden = model.base_model(torch.tensor([IDS])).last_hidden_state[0]
    torch.testing.assert_close(target.unembed(hidden), one_row(target, IDS)[0], atol=1e-4, rtol=1e-5)
    if name != "gpt2":  # its layers get learned positions besides
        torch.testing.assert_close(target.embed(torch.tensor(IDS)), one_row(target, IDS, aux_layers=(-1,))[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ADAPTED)
def test_adapted_models_in_bfloat16(name: str, saved: Any) -> None:
    """As near to float32 as Transformers' own bfloat16; logits float32, features and rewinding included."""
    directory, model = saved[name]
    target = load_target(directory, dtype="bfloat16")
    logits, features = one_row(target, IDS, aux_layers=(0,))
    assert logits.dtype is torch.float32 and features is not None and features.dtype is torch.bfloat16
    exact = model(torch.tensor([IDS])).logits[0]
    theirs = model.bfloat16()(torch.tensor([IDS])).logits[0].float()
    model.float()
    assert (logits - exact).norm() < 1.5 * (theirs - exact).norm() + 1e-3
    assert target.unembed(torch.ones(2, target.spec.hidden_size)).shape == (2, 101)


def test_the_longest_text_by_other_names(saved: Any) -> None:
    """MPT calls it max_seq_len, GPT-2 n_positions: longer texts are refused and never reach the model."""
    assert [load_target(saved[name][0]).spec.max_positions for name in ("mpt", "gpt2", "gpt_neox")] == [96, 128, 128]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3-one-key-head", "gemma3"])
@pytest.mark.parametrize("case", ["different", "equal", "equal in another dtype", "head alone"])
def test_heads_in_files_of_tied_models(name: str, case: str, saved: Any, tmp_path: Path) -> None:
    """A head that differs from the embedding is kept, an equal one is the embedding, one alone is both."""
    directory = shutil.copytree(saved[name][0], tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].bfloat16().float()
    tensors["model.embed_tokens.weight"] = embedding
    generator = torch.Generator().manual_seed(1)
    tensors["lm_head.weight"] = (
        torch.randn(embedding.shape, generator=generator) if case == "different" else embedding.clone()
    )
    if case == "equal in another dtype":
        tensors["lm_head.weight"] = embedding.bfloat16()
    if case == "head alone":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    target = load_target(directory, backend="reference")
    assert (target.stack._head is target.stack._embedding) == (case != "different")
    theirs = type(saved[name][1]).from_pretrained(directory)
    torch.testing.assert_close(one_row(target, IDS)[0], theirs(torch.tensor([IDS])).logits[0], atol=1e-4, rtol=1e-5)
    layers = load_layers(directory)
    assert layers is not None and ("head.weight" in layers[1]) == (case == "different")


@pytest.mark.parametrize(
    ("given", "read"), [("7", (7,)), (7.0, (7,)), ([7, "9", 7], (7, 9)), (-1, ()), (None, ()), ([], ()), ([0], (0,))]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ids_that_end_a_text(name: str, given: Any, read: tuple[int, ...], saved: Any, tmp_path: Path) -> None:
    directory = shutil.copytree(saved[name][0], tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    assert load_target(directory, backend="reference").spec.eos_token_ids == read


@pytest.mark.parametrize("given", ["</s>", True, 7.5, [7, "x"], {"id": 7}, [[7]], -3])
def test_ids_that_end_no_text(given: Any, saved: Any, tmp_path: Path) -> None:
    directory = shutil.copytree(saved["llama"][0], tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(CheckpointError, match="eos_token_id must be a token id or a list of them, got"):
        load_target(directory, backend="reference")


def test_spec_comes_from_the_files(saved: Any, tmp_path: Path) -> None:
    directory = shutil.copytree(saved["qwen2"][0], tmp_path / "model")
    spec = load_target(directory, backend="reference").spec
    assert (spec.architecture, spec.vocab_size, spec.hidden_size, spec.num_layers) == ("qwen2", 101, 48, 3)
    assert (spec.max_positions, spec.eos_token_ids, spec.defaults) == (128, (7,), {})
    generation = {"eos_token_id": [5, 6], "do_sample": True, "temperature": 0.6, "top_k": 20}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    spec = load_target(directory, backend="reference").spec
    assert spec.eos_token_ids == (5, 6) and spec.defaults == {"temperature": 0.6, "top_k": 20}


def test_old_configs_read_as_new_ones(saved: Any, tmp_path: Path) -> None:
    for name, old in {
        "qwen3": {
            "rope_theta": 1e4,
            "rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if "rope" not in k}},
        },
        "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6, "layer_types": None},
    }.items():
        directory = shutil.copytree(saved[name][0], tmp_path / name)
        config = json.loads((directory / "config.json").read_text())
        del config["rope_parameters"]
        (directory / "config.json").write_text(json.dumps({**config, **old}))
        mine, theirs = (one_row(load_target(d, backend="reference"), IDS)[0] for d in (directory, saved[name][0]))
        assert torch.equal(mine, theirs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gemma3-old"])
def test_a_scaling_added_by_hand_holds(name: str, saved: Any, tmp_path: Path) -> None:
    """Cards advise to add ``rope_scaling`` to a config that may have ``rope_parameters`` already. Gemma 3 has it in its
    published configs, and means the full layers only."""
    name, _, old = name.partition("-")
    directory = shutil.copytree(saved[name][0], tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    if old:
        config |= {"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    if name == "gemma3":
        config["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    added = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
    if name == "gemma3":
        added = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    (directory / "config.json").write_text(json.dumps({**config, **added}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()(torch.tensor([IDS])).logits[0]
    mine = one_row(load_target(directory, backend="reference"), IDS)[0]
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(mine, one_row(load_target(saved[name][0], backend="reference"), IDS)[0], atol=1e-2)


def test_text_part_of_a_multimodal_checkpoint(saved: Any, tmp_path: Path) -> None:
    """Both namings of the text model, with a vision tower that stays in the file."""
    tensors = load_file(saved["gemma3"][0] / "model.safetensors")
    config = json.loads((saved["gemma3"][0] / "config.json").read_text())
    expected = one_row(load_target(saved["gemma3"][0], backend="reference"), IDS)[0]
    for prefix in ("language_model.model.", "model.language_model."):
        directory = tmp_path / prefix
        directory.mkdir()
        renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
        save_file({**renamed, "vision_tower.patch.weight": torch.ones(2)}, directory / "model.safetensors")
        outer = {"model_type": "gemma3", "text_config": config, "eos_token_id": [1, 106]}
        (directory / "config.json").write_text(json.dumps(outer))
        target = load_target(directory, backend="reference")
        assert torch.equal(one_row(target, IDS)[0], expected) and target.spec.eos_token_ids == (1, 106)


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "gpt_neox"])
def test_a_converted_drafter_copies_the_embedding_as_its_layers_see_it(name: str, saved: Any, tmp_path: Path) -> None:
    """Gemma scales its embedding, which DeepSpec's drafters do not."""
    folder = saved[name][0]
    target = load_target(folder, backend="reference")
    options = {"target_layers": [0, 1], "markov_rank": 4, "mask_token_id": 1}
    drafter = training_of("dspark", options).start(target, model_config(folder), {})
    checkpoints.save(drafter.snapshot(), tmp_path / "drafter", "outrider", {})
    if name == "gpt_neox":  # its tensors have names of their own
        with pytest.raises(CheckpointError, match="has no tensor named like 'embed_tokens.weight', which DeepSpec"):
            convert(tmp_path / "drafter", tmp_path / "copy", "deepspec", target_folder=folder)
        return
    convert(tmp_path / "drafter", tmp_path / "copy", "deepspec", target_folder=folder)
    copied = checkpoints.load(tmp_path / "copy").tensors
    torch.testing.assert_close(copied["embed.weight"], target.embed(torch.arange(101)))
    states = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)) * 1e-3  # far below any cap
    torch.testing.assert_close(states @ copied["head.weight"].T, target.unembed(states), rtol=1e-3, atol=1e-6)


def test_shards_load_like_one_file(saved: Any, tmp_path: Path) -> None:
    directory, model = saved["qwen3"]
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    mine, theirs = (one_row(load_target(d, backend="reference"), IDS)[0] for d in (tmp_path, directory))
    assert torch.equal(mine, theirs)


def test_bfloat16_stays_near_float32(saved: Any) -> None:
    exact = one_row(load_target(saved["qwen3"][0], backend="reference"), IDS)[0]
    rounded, features = one_row(
        load_target(saved["qwen3"][0], dtype="bfloat16", backend="reference"), IDS, aux_layers=(0,)
    )
    theirs = saved["qwen3"][1].bfloat16()(torch.tensor([IDS])).logits[0].float()
    saved["qwen3"][1].float()
    assert rounded.dtype is torch.float32 and features is not None and features.dtype is torch.bfloat16
    assert (rounded - exact).norm() < 1.5 * (theirs - exact).norm()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_auxiliary_layers_that_are_refused(name: str, saved: Any) -> None:
    target = load_target(saved[name][0], backend="reference")
    with pytest.raises(InvalidRequest, match="layer 2 is the last one"):
        one_row(target, IDS, aux_layers=(2,))
    with pytest.raises(InvalidRequest, match="auxiliary layer 3 is no layer"):
        one_row(target, IDS, aux_layers=(3,))
    with pytest.raises(InvalidRequest, match="auxiliary layer -2 is no layer"):
        one_row(target, IDS, aux_layers=(-2,))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_sequence_past_its_slot(name: str, saved: Any) -> None:
    target = load_target(saved[name][0], backend="reference")
    cache = target.new_cache(1, 8)
    slot = cache.open()
    with pytest.raises(CacheFull, match="all 1 slots are in use"):
        cache.open()
    with pytest.raises(CacheFull, match="9 tokens does not fit a slot of 8"):
        target.forward(RaggedBatch.pack([IDS[:9]], [0], [slot]), cache)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "yran"}}, "did you mean 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "needs numbers that the config lacks: 'factor'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 0.0}},
            "'factor' must be a number above 0, got 0",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": "2"}},
            "'factor' must be a number above 0, got '2'",
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 0}}, "'factor' must be a number above 0, got 0"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}},
            "'rope_theta' must be a number above",
        ),
        ("llama", {"rope_parameters": {"rope_theta": float("nan")}}, "'rope_parameters.rope_theta' is nan; expected"),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "high_freq_factor": -1.0}},
            "'high_freq_factor' must be a number above 0",
        ),
        ("llama", {"rms_norm_eps": float("nan")}, "config.json: 'rms_norm_eps' is nan; expected a finite number"),
        ("gpt2", {"layer_norm_epsilon": float("inf")}, "config.json: 'layer_norm_epsilon' is inf"),
        ("llama", {"num_key_value_heads": 0}, "'num_key_value_heads' must be a whole number of at least 1, got 0"),
        ("llama", {"head_dim": 0}, "'head_dim' must be a whole number of at least 1, got 0"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' must be a number above 0, got 0"),
        (
            "gemma3",
            {"final_logit_softcapping": -9.0},
            "the logits' soft cap must be a finite number of at least 0, got -9",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised .gptq."),
        ("llama", {"rope_parameters": "yarn"}, "rope parameters must be an object, got 'yarn'"),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            "for each kind of layer .full_attention., and this model has one rotation for all layers",
        ),
        ("gemma4", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "none for sliding_attention"),
        ("llama", {"is_causal": False}, "no causal language model"),
        ("gemma3", {"is_causal": False}, "no causal language model"),
        ("llama", {"hidden_size": None}, "no 'hidden_size'"),
        ("llama", {"hidden_size": "48"}, "'hidden_size' must be a whole number of at least 1, got '48'"),
        ("llama", {"num_key_value_heads": 3}, "4 heads, which 3 key/value heads cannot share evenly"),
        ("llama", {"head_dim": 15}, "head_dim of layer 0 must be even"),
        ("llama", {"attention_bias": False}, "q_proj.bias' is in the files, but not in the model that config.json"),
        ("qwen3", {"attention_bias": True}, "q_proj.bias' is missing, but in the model"),
        ("llama", {"rms_norm_eps": "small"}, "epsilon must be a small number, got 'small'"),
        ("qwen2", {"sliding_window": -4}, "'sliding_window' must be a whole number of at least 1"),
        ("qwen2", {"layer_types": ["full_attention"]}, "'layer_types' must hold 3 of sliding_attention or full_att"),
        ("llama", {"hidden_size": 64}, "shape .101, 48., but the config says .any, 64."),
        ("llama", {"vocab_size": 100}, "serves as the head too, but the config's vocabulary has 100 tokens"),
        ("llama", {"num_hidden_layers": 2}, "unexpected tensor 'model.layers.2"),
        ("llama", {"num_hidden_layers": 4}, "'model.layers.3.self_attn.q_proj.weight' is missing"),
        ("llama", {"model_type": None}, "names no model_type"),
        ("llama", {"model_type": "llama7"}, "'llama7' is not known"),
        ("llama", {"model_type": "x", "auto_map": {"AutoModel": "x.X"}}, "bring code, which is never run"),
        ("llama", {"hidden_act": ["silu"]}, r"activation \['silu'\] is not supported"),
        ("llama", {"text_config": "x"}, "config.json holds a value of another kind than is expected there .TypeError"),
        ("llama", {"num_hidden_layers": 3_000_000_000}, "'num_hidden_layers' must be at most 10000, got 3000000000"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 0}, "'sliding_window_pattern' must be a whole"),
        ("gemma3", {"head_dim": "16"}, "'head_dim' must be a whole number of at least 1, got '16'"),
        ("gemma3", {"vocab_size": []}, "'vocab_size' must be a whole number of at least 1"),
        ("gemma3", {"rope_parameters": [1]}, "'rope_parameters' must be an object"),
        ("gemma3", {"quantization_config": ["x"]}, "quantised .unknown."),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping to 50.0"),
        ("gemma4", {"enable_moe_block": True}, "enable_moe_block"),
        ("gemma4", {"hidden_size_per_layer_input": 16}, "hidden_size_per_layer_input"),
        ("gemma4", {"num_kv_shared_layers": 1}, "num_kv_shared_layers"),
    ],
)
def test_configs_that_are_refused(name: str, changes: dict[str, Any], message: str, saved: Any, tmp_path: Path) -> None:
    directory = shutil.copytree(saved[name][0], tmp_path / "model")
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(CheckpointError, match=message):
        load_target(directory, backend="reference")


@pytest.mark.parametrize("window", ["left out", None])
def test_windows_of_qwen_that_have_no_size(window: str | None, saved: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(saved["qwen2"][0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["sliding_window"], config["layer_types"]
    config |= {} if window else {"sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(folder)
    read = load_layers(folder)
    assert read is not None
    found = [layer.window for layer in read[0].layers]
    assert found == [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
    assert found == [None, *[4096 if window else None] * 2]


def test_a_text_config_and_sizes_that_are_null(saved: Any, tmp_path: Path) -> None:
    directory = shutil.copytree(saved["gemma3"][0], tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "text_config": None}))
    load_target(directory, backend="reference")
    (directory / "config.json").write_text(json.dumps({**config, "head_dim": None}))
    with pytest.raises(CheckpointError, match="config.json has no 'head_dim'"):
        load_target(directory, backend="reference")


def test_generation_defaults_that_are_no_numbers(saved: Any, tmp_path: Path) -> None:
    directory = shutil.copytree(saved["llama"][0], tmp_path / "model")
    for given, message in {
        "NaN": "generation_config.json: 'temperature' is nan",
        '"hot"': "'temperature' must be a number",
    }.items():
        (directory / "generation_config.json").write_text(f'{{"do_sample": true, "temperature": {given}}}')
        with pytest.raises(CheckpointError, match=message):
            load_target(directory, backend="reference")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}}, "logits .* NaN or infinite"),
        ({"vocab_size": "101"}, "Transformers could not load .*vocab_size"),
        ({"eos_token_id": 7.5}, "Transformers could not load .*eos_token_id"),
        ({"model_type": "llava"}, "model_type 'llava' is no causal language model of Transformers"),
        ({"intermediate_size": 72}, r"tensor '.*mlp.+' of .* has shape \[48, 80\], but the config says \[48, 72\]"),
    ],
)
def test_configs_of_adapted_models_that_are_refused(
    changes: dict[str, Any], message: str, saved: Any, tmp_path: Path
) -> None:
    directory = shutil.copytree(saved["gpt_neox"][0], tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_target(directory, backend="reference")


def test_a_model_that_cannot_be_rewound(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be rewound"):
        load_target(tmp_path)


@torch.no_grad()
def test_a_hybrid_family_without_state_space_layers(tmp_path: Path) -> None:
    """Granite 4.0 Micro: the family's class counts as stateful, this member's layers do not."""
    options = dict(SMALL, layer_types=["attention"] * 3, num_local_experts=0, shared_intermediate_size=64)
    config = transformers.GraniteMoeHybridConfig(**options, mamba_n_heads=4, mamba_d_head=24, mamba_d_state=8)
    model = transformers.GraniteMoeHybridForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    target = load_target(tmp_path)
    torch.testing.assert_close(one_row(target, IDS)[0], model(torch.tensor([IDS])).logits[0], atol=1e-4, rtol=1e-5)
    config.layer_types = ["linear_attention", "full_attention", "full_attention"]
    transformers.GraniteMoeHybridForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be rewound"):
        load_target(tmp_path)


def test_a_model_that_sees_later_tokens(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    config.initializer_range = 0.4
    torch.manual_seed(1)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no causal language model"):
        load_target(tmp_path)


def test_a_rotation_that_changes_with_the_length_ends_the_context(tmp_path: Path) -> None:
    """Phi-3's longrope: beyond some length all keys would have to be rotated anew."""
    factors = [1.0] * 4, [8.0, 9.0, 10.0, 12.0]
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 32}
    rope |= dict(zip(("short_factor", "long_factor"), factors, strict=True))
    options = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=61)
    config = transformers.Phi3Config(
        **options,
        pad_token_id=0,
        rope_parameters=rope,
        max_position_embeddings=256,
        original_max_position_embeddings=32,
    )
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    assert load_target(tmp_path).spec.max_positions == 32


def test_a_choice_of_keys_that_depends_on_the_pass_ends_the_context(tmp_path: Path) -> None:
    """Doge: beyond a length each layer attends to some keys only, and keys of equal tokens are equally good."""
    config = transformers.DogeConfig(**{**SMALL, "pad_token_id": 0}, keep_window_size=32)
    transformers.DogeForCausalLM(config).save_pretrained(tmp_path)
    assert load_target(tmp_path).spec.max_positions == 32


def test_a_model_that_transformers_cannot_run(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *given: Any, **options: Any) -> None:
        raise TypeError("no number of heads")

    monkeypatch.setattr(transformers.GPTNeoXForCausalLM, "forward", broken)
    with pytest.raises(CheckpointError, match="cannot run it .TypeError: no number of heads"):
        load_target(saved["gpt_neox"][0])


def test_options_that_are_refused(saved: Any) -> None:
    directory = saved["llama"][0]
    with pytest.raises(InvalidRequest, match="did you mean 'float32'"):
        load_target(directory, dtype="float23")
    with pytest.raises(InvalidRequest, match="the reference backend has no dtype 'int8'"):
        load_target(directory, dtype="int8", backend="reference")
    with pytest.raises(UnknownKind, match="did you mean 'reference'"):
        load_target(directory, backend="refrence")
    with pytest.raises(InvalidRequest, match="gpt2 runs through Transformers; give float32, bfloat16 or float64"):
        load_target(saved["gpt2"][0], dtype="int4", backend="reference")
    with pytest.raises(InvalidRequest, match="'file' needs an architecture that the native core runs"):
        load_target(saved["gpt2"][0], dtype="file", backend="reference")


def test_toy_reads_its_table_and_its_cache() -> None:
    table = torch.randn(4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    toy = ToyTarget(table, eos_token_ids=(3,))
    assert isinstance(toy, TargetModel) and toy.spec.vocab_size == 4 and toy.spec.eos_token_ids == (3,)
    cache = toy.new_cache(2, 8)
    a, b = cache.open(), cache.open()
    output = toy.forward(RaggedBatch.pack([[2, 1, 3], [1]], [0, 0], [b, a]), cache, aux_layers=(0,))
    assert torch.equal(output.logits, torch.stack([table[0, 2], table[2, 1], table[1, 3], table[0, 1]]))
    assert output.features is not None and output.features.argmax(-1).tolist() == [2, 1, 3, 1]
    cache.rewind(torch.tensor([b]), torch.tensor([2]))
    again = toy.forward(RaggedBatch.pack([[0, 2]], [2], [b]), cache, logits_at=torch.tensor([1]))
    assert torch.equal(again.logits, table[0, 2][None])
    assert torch.equal(toy.unembed(toy.embed(torch.tensor([2]))), table[0, 2][None])
