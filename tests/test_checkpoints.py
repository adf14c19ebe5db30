"""Drafters' files: what is read, what is written, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from trained import DECODER, DESIGNS, GEMMA4, LAYERS, VOCABULARY, WIDTH, make_checkpoint, make_target
from transformers import CONFIG_MAPPING

from outrider import LLM, checkpoints
from outrider.checkpoints import DraftCheckpoint, TargetFacts, deepspec, speculators
from outrider.checkpoints.stack_format import LLAMA_LIKE, decoder_stack, known_keys, named_biases
from outrider.errors import CheckpointError

DEEPSPEC = ("vanilla", "gated", "rnn", "dflash", "eagle3")


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit(folder: Path, **changes: Any) -> None:
    config = config_of(folder)
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.update({name.replace("__", "."): tensor for name, tensor in changes.items() if tensor is not None})
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name.replace("__", ".")]
    save_file(tensors, folder / "model.safetensors")


def complete(name: str, decoder: dict[str, Any] = DECODER, **options: Any) -> DraftCheckpoint:
    """With embedding and head, as DeepSpec's files have them."""
    checkpoint = make_checkpoint(DESIGNS[name], target=make_target(), decoder=decoder, **options)
    extras = {"dtype": "float32", "transformers_version": "5.10.2", "num_anchors": 8}
    return replace(checkpoint, extras=extras if "eagle3" not in name else {**extras, "step_loss_decay": 0.7})


def same(a: DraftCheckpoint, b: DraftCheckpoint) -> None:
    assert a.design == b.design and a.target_layers == b.target_layers and dict(a.decoder) == dict(b.decoder)
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        assert tensor.dtype == b.tensors[name].dtype and torch.equal(tensor, b.tensors[name]), name


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("name", DEEPSPEC)
@pytest.mark.parametrize("decoder", [DECODER, GEMMA4], ids=["qwen3", "gemma4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deepspec_to_speculators_and_back(tmp_path: Path, name: str, decoder: dict, dtype: torch.dtype) -> None:
    """Tensors bit for bit, configs key for key."""
    checkpoint = complete(name, decoder)
    checkpoint = replace(checkpoint, tensors={n: t.to(dtype) for n, t in checkpoint.tensors.items()})
    first = checkpoints.save(checkpoint, tmp_path / "a", "deepspec", {"made": "by a test"})
    second = checkpoints.save(checkpoints.load(first), tmp_path / "b", "speculators", {})
    third = checkpoints.save(checkpoints.load(second), tmp_path / "c", "deepspec", {})
    assert config_of(first) == config_of(third)
    a, c = load_file(first / "model.safetensors"), load_file(third / "model.safetensors")
    assert a.keys() == c.keys() and all(torch.equal(a[n], c[n]) and a[n].dtype == dtype for n in a)
    same(checkpoint, checkpoints.load(second))
    assert checkpoints.load(second).format == "speculators" and checkpoints.load(first).format == "deepspec"


def _golden() -> list[Any]:
    from test_golden_drafters import _folders

    found = [f for f in _folders() if deepspec.matches(config_of(f))]
    return [pytest.param(f, id=f.name) for f in found] or [
        pytest.param(None, marks=pytest.mark.skipif(True, reason="absent"))
    ]


@pytest.mark.parametrize("folder", _golden())
def test_the_peers_own_files_survive_the_round_trip(tmp_path: Path, folder: Path) -> None:
    second = checkpoints.save(checkpoints.load(folder), tmp_path / "b", "speculators", {})
    third = checkpoints.save(checkpoints.load(second), tmp_path / "c", "deepspec", {})
    assert config_of(third) == config_of(folder)
    a, c = load_file(folder / "model.safetensors"), load_file(third / "model.safetensors")
    assert a.keys() == c.keys() and all(torch.equal(a[n], c[n]) and a[n].dtype == c[n].dtype for n in a)


@pytest.mark.parametrize("name", DESIGNS)
def test_speculators_hold_every_design(tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(DESIGNS[name], drafted=VOCABULARY if name == "mtp" else 20)
    folder = checkpoints.save(checkpoint, tmp_path / "x", "speculators", {})
    back = checkpoints.load(folder)
    same(checkpoint, back)
    assert (back.kind, back.draft_vocab_size) == (checkpoint.kind, checkpoint.draft_vocab_size)


def test_what_a_file_says_of_its_target_comes_back() -> None:
    """A drafter that reads states of another width has its own embedding, which its training may change."""
    eagle3 = make_checkpoint(DESIGNS["eagle3"])
    target = TargetFacts(2 * WIDTH, LAYERS, "some/target", "LlamaForCausalLM")
    config = speculators.write(replace(eagle3, target=target, frozen_embedding=False))
    assert (config["target_hidden_size"], config["tie_word_embeddings"]) == (2 * WIDTH, False)
    back = checkpoints.read_header(config)
    assert (back.target, back.frozen_embedding) == (target, False)
    narrow = speculators.write(eagle3)  # of the drafter's width: not named
    assert narrow["target_hidden_size"] is None
    back = checkpoints.read_header(narrow)
    assert (back.target, back.frozen_embedding) == (eagle3.target, True)

    for name, decoder, family in (
        ("vanilla", DECODER, "Qwen3"),
        ("eagle3", DECODER, "Qwen3"),
        ("vanilla", GEMMA4, "Gemma4"),
    ):
        written = complete(name, decoder)
        config = deepspec.write(replace(written, target=replace(written.target, name="some/target")))
        assert config["architectures"][0].startswith(family)
        known = "some/target" if name == "eagle3" else None  # DeepSpec's other configs have no key for it
        assert checkpoints.read_header(config).target == TargetFacts(WIDTH, LAYERS, known, f"{family}ForCausalLM")

    assert checkpoints.read_header(dflash_config()).target == TargetFacts(WIDTH, LAYERS)
    own = {**dflash_config(projector_type="dflash"), "architectures": ["DFlashDraftModel"]}
    assert checkpoints.read_header(own).format == "specforge"
    assert checkpoints.read_header(own).target == TargetFacts(WIDTH, LAYERS)
    chain = {**eagle3.decoder, "model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}
    assert checkpoints.read_header({**chain, "target_hidden_size": 64}).target == TargetFacts(64)
    assert checkpoints.read_header({**chain, "target_hidden_size": None}).target == TargetFacts(WIDTH)
    assert checkpoints.read_header({**chain, "draft_vocab_size": 20}).draft_vocab_size == 20


def test_layers_are_counted_as_each_format_counts_them() -> None:
    checkpoint = complete("vanilla")
    assert deepspec.write(checkpoint)["target_layer_ids"] == [0, 2, 3]
    config = speculators.write(checkpoint)
    assert config["aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert checkpoints.read_header(config).target_layers == (0, 2, 3)
    embedding = replace(checkpoint, target_layers=(-1, 2, 3))
    assert speculators.write(embedding)["aux_hidden_state_layer_ids"] == [0, 3, 4]


def test_anchor_layout_is_never_guessed() -> None:
    masks = speculators.write(make_checkpoint(DESIGNS["masks-only"]))
    assert masks["speculators_model_type"] == "dflash" and masks["sample_from_anchor"] is False
    assert masks["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    anchored = speculators.write(make_checkpoint(DESIGNS["dflash"]))
    assert (
        anchored["speculators_model_type"] == "dspark" and anchored["markov_rank"] == 0
    )  # vLLM's dflash has no anchor
    assert anchored["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
    for kind, default in (("dflash", False), ("dspark", True)):
        config = {**(masks if kind == "dflash" else anchored)}
        del config["sample_from_anchor"]
        assert checkpoints.read_header(config).design.sample_from_anchor is default
    with pytest.raises(CheckpointError, match="anchor's slot"):
        deepspec.write(replace(complete("dflash"), design=DESIGNS["masks-only"]))


# ------------------------------------------------------------------------------------------------ other formats


def dflash_config(**own: Any) -> dict[str, Any]:
    return {
        **DECODER,
        "architectures": ["DFlashDraftModel"],
        "block_size": 5,
        "num_target_layers": LAYERS,
        "dflash_config": {"mask_token_id": 63, "target_layer_ids": [0, 2, 3], **own},
    }


def test_zlab_files(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(DESIGNS["masks-only"])
    names = checkpoints.tensor_names(checkpoint)
    folder = write(tmp_path / "z", dflash_config(), {names[n]: t for n, t in checkpoint.tensors.items()})
    back = checkpoints.load(folder)
    same(checkpoint, back)
    assert (back.format, back.kind) == ("zlab", "dflash")
    nested = dflash_config(block_size=5)  # as in files since June 2026
    nested.pop("block_size")
    assert checkpoints.read_header(nested).design == checkpoint.design
    sliding = {**dflash_config(), "layer_types": ["sliding_attention"] * 2, "sliding_window": 8}
    with pytest.raises(CheckpointError, match=r"causal inside the block .* is_causal = false \(got None"):
        checkpoints.read_header(sliding)
    assert checkpoints.read_header({**sliding, "is_causal": False}).design == checkpoint.design
    config = dflash_config()
    del config["dflash_config"]["target_layer_ids"]
    config |= {"num_target_layers": 36, "layer_types": None}
    assert checkpoints.read_header({**config, "num_hidden_layers": 5}).target_layers == (1, 9, 17, 25, 33)
    assert checkpoints.read_header({**config, "num_hidden_layers": 1}).target_layers == (18,)


def test_specforge_files(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(DESIGNS["rnn"])
    names = checkpoints.tensor_names(checkpoint)
    own = {"projector_type": "dspark", "attention_mode": "gqa", "markov_rank": 6, "markov_head_type": "rnn"}
    own |= {"enable_confidence_head": True, "confidence_head_with_markov": True}
    config = {**dflash_config(**own), "architectures": ["DSparkDraftModel"]}
    tensors = {names[n]: t for n, t in checkpoint.tensors.items()}
    nested = {f"logit_head.{n}" if n.startswith(("markov", "confidence")) else n: t for n, t in tensors.items()}
    for i, files in enumerate((tensors, nested)):  # early files nest the heads
        back = checkpoints.load(write(tmp_path / str(i), config, files))
        same(checkpoint, back)
        assert back.format == "specforge" and back.design.sample_from_anchor
    with pytest.raises(CheckpointError, match="projector_type 'domino'"):
        checkpoints.read_header({**config, "dflash_config": {**config["dflash_config"], "projector_type": "domino"}})

    eagle3 = make_checkpoint(DESIGNS["eagle3"], drafted=20, decoder={**DECODER, "model_type": "llama"})
    names = checkpoints.tensor_names(eagle3)
    files = {names[n].replace("layers.0.", "midlayer."): t for n, t in eagle3.tensors.items()}
    config = {**eagle3.decoder, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 20}
    back = checkpoints.load(write(tmp_path / "chain", config, files))
    same(replace(eagle3, target_layers=None, design=back.design), back)
    spec = replace(make_target().spec, num_layers=36)
    assert back.layers_for(spec) == (1, 17, 32)  # SpecForge's convention where no file says
    layers, switch = "eagle_aux_hidden_state_layer_ids", "use_aux_hidden_state"
    for section, read in (({layers: [0, 2, 3], switch: True}, (0, 2, 3)), ({layers: []}, None), ({}, None)):
        assert checkpoints.read_header({**config, "eagle_config": section}).target_layers == read
    for section, message in (({switch: False}, "use_aux_hidden_state = False"), ({"depth": 2}, "unknown key 'depth'")):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.read_header({**config, "eagle_config": section})


def test_a_drafter_that_names_no_architectures_is_told_what_is_missing(tmp_path: Path) -> None:
    folder = checkpoints.save(complete("vanilla"), tmp_path / "x", "deepspec", {})
    edit(folder, architectures=...)
    with pytest.raises(CheckpointError, match=r"architectures None, .* told by its architectures"):
        LLM("embedded", drafter=str(folder))


def test_detection_reads_the_config_and_not_the_path(tmp_path: Path) -> None:
    folder = checkpoints.save(complete("vanilla"), tmp_path / "my-eagle3-dflash-zlab", "speculators", {})
    assert checkpoints.load(folder).kind == "dspark"
    with pytest.raises(CheckpointError, match=r"\['LlamaForCausalLM'\], which is no drafter"):
        checkpoints.read_header({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    assert checkpoints.recognise({}) is None


# ------------------------------------------------------------------------------------------------ writing


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outrider.checkpoints import directory

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(directory, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(complete("vanilla"), tmp_path / "out", "deepspec", {})
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_has_its_provenance_and_overwrites_nothing(tmp_path: Path) -> None:
    folder = checkpoints.save(complete("vanilla"), tmp_path / "deep" / "out", "deepspec", {"from": "here"})
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "provenance.json"]
    assert json.loads((folder / "provenance.json").read_text()) == {"from": "here"}
    assert folder.stat().st_mode & 0o777 == 0o755
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoints.save(complete("vanilla"), folder, "deepspec", {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vanilla", {"drafted": 20}, "no reduced draft vocabulary"),
        ("eagle3-residual", {}, "none of this drafter's norm options"),
        ("mtp", {}, "cannot hold a drafter of kind .mtp.; it can be written as: speculators, outrider"),
    ],
)
def test_deepspec_refuses_what_it_cannot_say(name: str, options: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        deepspec.write(complete(name, **options))
    with pytest.raises(CheckpointError, match="name the target"):
        deepspec.write(make_checkpoint(DESIGNS["vanilla"]))
    with pytest.raises(CheckpointError, match="no reduced draft vocabulary"):  # which no target would change
        deepspec.write(make_checkpoint(DESIGNS["vanilla"], drafted=20))


def test_only_written_formats_are_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write format 'zlab'; expected one of: deepspec, outrider, spec"):
        checkpoints.save(complete("vanilla"), tmp_path / "x", "zlab", {})


@pytest.mark.parametrize("model_type", [*LLAMA_LIKE, "gemma4_text"])
def test_what_transformers_writes_is_known(model_type: str) -> None:
    written = set(CONFIG_MAPPING[model_type]().to_dict())
    assert written <= known_keys(model_type)


def test_a_packaged_drafter_starts_without_transformers() -> None:
    """Its import takes seconds, of which a server has three to be ready."""
    code = (
        "import sys; from outrider import LLM; LLM('embedded', 'dspark', policy='fixed', guard=False); "
        "print(sorted({'transformers', 'scipy', 'matplotlib', 'torch._dynamo'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------ bad input

BAD: dict[str, tuple[Any, str]] = {
    "missing tensor": (lambda f: edit_tensors(f, fc__weight=None), "'fc.weight' is missing"),
    "unknown tensor": (
        lambda f: edit_tensors(f, fc__wieght=torch.ones(2)),
        "unexpected tensor 'fc.wieght'; did you mean 'fc.weight'",
    ),
    "wrong shape": (lambda f: edit_tensors(f, norm__weight=torch.ones(3)), r"'norm.weight' has shape \[3\]"),
    "NaN": (
        lambda f: edit_tensors(f, markov_head__markov_w2__weight=torch.full((VOCABULARY, 6), torch.nan)),
        f"'markov_head.markov_w2.weight' holds {VOCABULARY * 6} values that are NaN",
    ),
    "infinity": (lambda f: edit_tensors(f, norm__weight=torch.full((WIDTH,), torch.inf)), "NaN or infinite"),
    "other vocabulary": (lambda f: edit(f, vocab_size=99), r"config says \[99"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "not a complete safetensors file",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pickled weights can run code",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    "unknown key": (lambda f: edit(f, markov_rnak=6), "unknown key 'markov_rnak'; did you mean 'markov_rank'"),
    "missing key": (lambda f: edit(f, block_size=...), "no 'block_size'"),
    "wrong type": (lambda f: edit(f, block_size="seven"), "block_size must be int, got 'seven'"),
    "block of nothing": (lambda f: edit(f, block_size=0), "block_size must be at least 1, got 0"),
    "unknown head": (
        lambda f: edit(f, markov_head_type="gatde"),
        "unknown markov_head_type 'gatde'; did you mean 'gated'",
    ),
    "mask token": (
        lambda f: edit(f, mask_token_id=VOCABULARY),
        f"mask_token_id must be a token id .* got {VOCABULARY}",
    ),
    "no layers": (lambda f: edit(f, target_layer_ids=[]), "list of layer numbers"),
    "model type": (lambda f: edit(f, model_type="mamba"), "model_type 'mamba' is not supported"),
    "heads": (lambda f: edit(f, num_key_value_heads=3), "cannot share 3 key/value heads"),
    "confidence without Markov": (lambda f: edit(f, markov_rank=0), "needs a markov_rank above 0"),
    "rope": (lambda f: edit(f, rope_parameters={"rope_type": "spiral"}), "rope type 'spiral'"),
    "8-bit floats": (
        lambda f: edit_tensors(
            f, norm__weight=torch.ones(WIDTH).to(torch.float8_e4m3fn), norm__weight_scale=torch.ones(1)
        ),
        "'norm.weight' is stored as F8_E4M3; expected one of F64",
    ),
    "whole numbers": (
        lambda f: edit_tensors(f, norm__weight=torch.ones(WIDTH, dtype=torch.int64)),
        "'norm.weight' is stored as I64",
    ),
    "a scale of nothing": (
        lambda f: edit_tensors(f, norm__weight_scale=torch.ones(WIDTH)),
        "unexpected tensor 'norm.weight_scale'",
    ),
    "two names of one weight": (
        lambda f: edit_tensors(f, model__norm__weight=torch.ones(WIDTH)),
        "tensors '(model.)?norm.weight' and '(model.)?norm.weight' are the same weight",
    ),
    "biases that are not there": (
        lambda f: edit(f, attention_bias=True),
        "'layers.0.self_attn.q_proj.bias' is missing",
    ),
    "unknown layer type": (
        lambda f: edit(f, layer_types=["chunked_attention"] * 2),
        "layer_types must hold 2 of full_attention or sliding_attention",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_get_one_clear_error(tmp_path: Path, name: str) -> None:
    folder = checkpoints.save(complete("vanilla"), tmp_path / "x", "deepspec", {})
    damage, message = BAD[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(folder)


def test_biases_that_a_config_names_must_be_there() -> None:
    for changes, parts in (
        ({"model_type": "qwen2"}, "q k v"),
        ({"attention_bias": True}, "q k v o"),
        ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, "q k v o gate up down"),
        ({"model_type": "llama", "mlp_bias": True}, "gate up down"),
        ({"model_type": "mistral", "attention_bias": True}, ""),
        ({}, ""),
    ):
        expected = [f"layers.{i}.{part}.bias" for i in range(2) for part in parts.split()]
        assert named_biases({**DECODER, **changes}) == expected


def test_a_stack_is_what_its_config_says() -> None:
    stack = decoder_stack({**DECODER, "rms_norm_eps": 1e-5, "head_dim": 6, "max_position_embeddings": 96}, vocab_size=0)
    assert (stack.norm_eps, stack.layers[0].head_dim, stack.max_positions) == (1e-5, 6, 96)
    assert (stack.embedding_scale, stack.logit_softcap, stack.activation) == (1.0, 0.0, "silu")
    left = ("rms_norm_eps", "head_dim", "max_position_embeddings", "num_key_value_heads")
    stack = decoder_stack({key: value for key, value in DECODER.items() if key not in left}, vocab_size=0)
    layer = stack.layers[0]
    assert (stack.norm_eps, layer.head_dim, layer.num_kv_heads, stack.max_positions) == (1e-6, WIDTH // 4, 4, 2048)
    stack = decoder_stack(GEMMA4, vocab_size=0)
    assert (stack.embedding_scale, stack.logit_softcap, stack.activation) == (WIDTH**0.5, 30.0, "gelu_tanh")
    layer = stack.layers[0]
    assert (layer.head_dim, layer.num_kv_heads, layer.attention_scale) == (16, 1, 1.0)
    assert layer.qk_norm and layer.v_norm and layer.value_is_key


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, [None, 8]),
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}, [None, None]),
        ({"model_type": "mistral", "sliding_window": 8}, [8, 8]),
        ({"model_type": "mistral", "sliding_window": None}, [None, None]),
    ],
)
def test_windows_that_layer_types_do_not_name(changes: dict[str, Any], windows: list[int | None]) -> None:
    decoder = {**DECODER, "layer_types": None, **changes}
    assert [layer.window for layer in decoder_stack(decoder, vocab_size=0).layers] == windows


def test_a_reduced_vocabulary_must_add_up(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(DESIGNS["vanilla"], drafted=20)
    ids = checkpoint.tensors["d2t"] + torch.arange(20)
    damaged = {
        "must hold offsets": {"d2t": ids},  # ids where offsets belong
        "two draft ids to one": {"d2t": -torch.arange(20)},
        "disagree": {"t2d": ~checkpoint.tensors["t2d"]},
    }
    for i, (message, tensors) in enumerate(damaged.items()):
        broken = replace(checkpoint, tensors={**checkpoint.tensors, **tensors})
        folder = checkpoints.save(broken, tmp_path / str(i), "speculators", {})
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(folder)


def test_keys_that_would_change_the_computation_are_refused() -> None:
    eagle3 = {**DECODER, "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "layer_types": None}
    with pytest.raises(CheckpointError, match="norm_output"):
        checkpoints.read_header({**eagle3, "norm_output": False})
    sliding = speculators.write(make_checkpoint(DESIGNS["dflash"]))
    sliding["transformer_layer_config"] |= {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}
    sliding["sliding_window_non_causal"] = False
    with pytest.raises(CheckpointError, match="causal inside the block"):
        checkpoints.read_header(sliding)
    nameless = speculators.write(make_checkpoint(DESIGNS["dflash"]))
    del nameless["aux_hidden_state_layer_ids"]
    with pytest.raises(CheckpointError, match="has no 'aux_hidden_state_layer_ids'"):
        checkpoints.read_header(nameless)
    module = speculators.write(make_checkpoint(DESIGNS["mtp"]))
    del module["aux_hidden_state_layer_ids"]
    with pytest.raises(CheckpointError, match="last hidden state"):
        checkpoints.read_header(module)
    with pytest.raises(CheckpointError, match="speculators_model_type 'peagle'"):
        checkpoints.read_header(
            {**speculators.write(make_checkpoint(DESIGNS["dflash"])), "speculators_model_type": "peagle"}
        )


# ------------------------------------------------------------------------------------------------ Outrider's own format


@pytest.mark.parametrize("name", DESIGNS)
def test_outriders_format_holds_every_design(tmp_path: Path, name: str) -> None:
    """Design, decoder, target, layers and tensors, bit for bit; also a drafter whose file names no layers."""
    checkpoint = make_checkpoint(DESIGNS[name], drafted=VOCABULARY if name == "mtp" else 20)
    checkpoint = replace(checkpoint, extras={"dtype": "float32"}, frozen_embedding=False)
    back = checkpoints.load(checkpoints.save(checkpoint, tmp_path / "x", "outrider", {}))
    same(checkpoint, back)
    assert replace(back, tensors={}, format="") == replace(checkpoint, tensors={}, format="")
    silent = replace(checkpoint, target_layers=None)
    if name.startswith("eagle3"):
        same(silent, checkpoints.load(checkpoints.save(silent, tmp_path / "y", "outrider", {})))


def test_every_design_of_the_catalogue_names_its_kind() -> None:
    from outrider import registry

    assert {design.kind for design in DESIGNS.values()} == {"dspark", "dflash", "eagle3", "mtp"}
    for design in DESIGNS.values():
        assert registry.find("design", design.kind) is type(design)
        assert registry.find("drafter", design.kind).kinds[0] == design.kind


OWN_FORMAT: dict[str, tuple[dict[str, Any], str]] = {
    "unknown kind": ({"outrider_drafter": "dsprak"}, "'dsprak' is not installed here; did you mean 'dspark'"),
    "unknown key": ({"layers": 1}, "unknown key 'layers'"),
    "unknown field": (
        {"design": {"block_size": 5, "mask_token_id": 63, "markov_rnak": 1}},
        "did you mean 'markov_rank'",
    ),
    "missing field": ({"design": {"block_size": 5}}, "design has no 'mask_token_id'"),
    "wrong type": ({"design": {"block_size": "5", "mask_token_id": 63}}, "design.block_size: .*integer.*, got '5'"),
    "bad value": ({"design": {"block_size": 0, "mask_token_id": 63}}, "block_size must be at least 1, got 0"),
    "no target": ({"target": {}}, "target has no 'hidden_size'"),
    "layers": ({"target_layers": [1, "2"]}, "target_layers must be a list of layer numbers or null"),
    "decoder key": ({"decoder": {**DECODER, "hiden_size": 1}}, "decoder has an unknown key 'hiden_size'"),
}


@pytest.mark.parametrize("name", OWN_FORMAT)
def test_outriders_format_refuses_damaged_files(tmp_path: Path, name: str) -> None:
    folder = checkpoints.save(make_checkpoint(DESIGNS["vanilla"]), tmp_path / "x", "outrider", {})
    changes, message = OWN_FORMAT[name]
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(folder)


# ------------------------------------------------------------------------------------------------ 8 bits


def test_matrices_in_8_bits_come_back_within_half_a_step(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(DESIGNS["vanilla"])
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    zeroed = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[zeroed][0] = 0  # a row without any scale
    checkpoint = replace(checkpoint, tensors=tensors)
    folder = checkpoints.save(checkpoint, tmp_path / "a", "outrider", {}, int8=True)
    read = checkpoints.load(folder)
    assert read.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.is_floating_point():
            step = tensor.float().abs().amax(1, keepdim=True) / 127
            assert ((read.tensors[name] - tensor.float()).abs() <= 0.501 * step).all(), name
        else:
            assert torch.equal(read.tensors[name], tensor), name
    again = checkpoints.save(read, tmp_path / "b", "outrider", {}, int8=True)
    first, second = (load_file(path / "model.safetensors") for path in (folder, again))
    for name, tensor in first.items():  # rounding once more changes no value
        assert tensor.dtype != torch.int8 or torch.equal(tensor, second[name]), name
    matrices = sum(t.numel() for t in tensors.values() if t.ndim == 2 and t.is_floating_point())
    assert (folder / "model.safetensors").stat().st_size < 1.5 * matrices + 20_000


def test_8_bit_files_are_checked(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(DESIGNS["vanilla"])
    with pytest.raises(CheckpointError, match="'speculators' has no 8-bit matrices"):
        checkpoints.save(checkpoint, tmp_path / "no", "speculators", {}, int8=True)
    assert not (tmp_path / "no").exists()
    folder = checkpoints.save(checkpoint, tmp_path / "a", "outrider", {}, int8=True)
    name = next(n for n, tensor in load_file(folder / "model.safetensors").items() if tensor.dtype == torch.int8)
    edit_tensors(folder, **{f"{name}_scale".replace(".", "__"): torch.ones(3)})
    with pytest.raises(CheckpointError, match=rf"{name}' is int8 and needs .*_scale', float32 .* shape \[3\]"):
        checkpoints.load(folder)
    edit_tensors(folder, **{f"{name}_scale".replace(".", "__"): None})
    with pytest.raises(CheckpointError, match="there is none"):
        checkpoints.load(folder)
