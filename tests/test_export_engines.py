"""``outrider export``: what other engines load, read back by their formats' readers, and what they cannot load."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_llama
from safetensors import safe_open
from trained import DECODER, GEMMA4, LAYERS, make_checkpoint, make_target, save_target
from typer.testing import CliRunner

from outrider import checkpoints
from outrider.cli import app
from outrider.drafters.dspark_design import BlockDesign
from outrider.drafters.eagle3_design import Eagle3Design
from outrider.drafters.mtp_design import MTPDesign
from outrider.errors import CheckpointError, InvalidRequest, UnknownKind
from outrider.models.locations import resolve_model
from outrider.scheduling.calibration import Calibration, Scaling
from outrider.training.handover import Handover, hand_over

DSPARK = BlockDesign(4, 3, markov_rank=4, confidence=True, confidence_with_markov=True)
DFLASH = BlockDesign(4, 3, sample_from_anchor=False)
SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}
LLAMA = {**{k: v for k, v in DECODER.items() if k != "layer_types"}, "model_type": "llama"}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_target(tmp_path_factory.mktemp("t") / "target", make_target()))


def saved(folder: Path, checkpoint: Any) -> str:
    return str(checkpoints.save(checkpoint, folder / "d", "outrider", {}))


def config_of(made: Handover) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(made.command[made.command.index("--speculative-config") + 1])
    assert config == made.speculative_config
    return config


def test_vllm_gets_speculators_files_and_a_reduced_head_made_of_the_targets_rows(tmp_path: Path, target: str) -> None:
    checkpoint = make_checkpoint(DSPARK, drafted=20)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "head.weight"}
    calibration = Calibration({("rejection", 0.0): Scaling((2.0,), (0.5,))})
    drafter = saved(tmp_path, replace(checkpoint, tensors=tensors, calibration=calibration))
    made = hand_over(drafter, "vllm", tmp_path / "out", target)
    copy = checkpoints.load(tmp_path / "out" / "drafter")
    assert (copy.format, copy.design, copy.target_layers) == ("speculators", DSPARK, checkpoint.target_layers)
    ids = tensors["d2t"] + torch.arange(20)
    head = make_target().tensors["head.weight"]  # type: ignore[attr-defined]
    assert torch.allclose(copy.tensors["head.weight"], head[ids], atol=1e-5)
    assert all(torch.equal(copy.tensors[name], tensor) for name, tensor in tensors.items())
    config = config_of(made)
    assert (config["method"], config["num_speculative_tokens"]) == ("dspark", 4)
    assert config["enable_adaptive_verification"] is True
    assert any("0.269" in line for line in made.advice), "sigmoid(-0.5 * 2): where the calibrated one is a half"
    launch = (tmp_path / "out" / "launch.sh").read_text()
    assert shlex.split(launch.splitlines()[-1]) == ["exec", *made.command, "$@"] and "not started" in launch
    assert json.loads((tmp_path / "out" / "speculative_config.json").read_text()) == config


def test_vllm_gets_an_eagle3_with_its_embedding_and_head(tmp_path: Path, target: str) -> None:
    made = hand_over(saved(tmp_path, make_checkpoint(Eagle3Design(depth=5))), "vllm", tmp_path / "out", target)
    copy = checkpoints.load(tmp_path / "out" / "drafter")
    assert {"embed.weight", "head.weight"} <= set(copy.tensors) and config_of(made)["num_speculative_tokens"] == 5


@pytest.mark.parametrize("anchor", [True, False])
def test_vllm_gets_a_block_without_heads_as_the_kind_that_drafts_so(anchor: bool, tmp_path: Path, target: str) -> None:
    """In its DFlash only masks predict, and the key of causal sliding windows makes every layer causal."""
    checkpoint = make_checkpoint(replace(DFLASH, sample_from_anchor=anchor))
    made = hand_over(saved(tmp_path, checkpoint), "vllm", tmp_path / "out", target)
    config = config_of(made)
    assert config["method"] == ("dspark" if anchor else "dflash")
    assert config["num_speculative_tokens"] == (4 if anchor else 3)
    written = json.loads((tmp_path / "out" / "drafter" / "config.json").read_text())
    assert written["speculators_model_type"] == config["method"]
    assert anchor or written["sliding_window_non_causal"] is True
    copy = checkpoints.load(tmp_path / "out" / "drafter")
    assert copy.design == replace(checkpoint.design, markov_rank=int(anchor)), "its loader fails at a rank of 0"
    assert not anchor or not any(copy.tensors[f"markov.{name}.weight"].any() for name in ("w1", "w2"))
    assert all(torch.equal(copy.tensors[name], tensor) for name, tensor in checkpoint.tensors.items())


def test_sglang_gets_specforges_eagle3(tmp_path: Path, target: str) -> None:
    checkpoint = make_checkpoint(Eagle3Design(), decoder=LLAMA)
    made = hand_over(saved(tmp_path, checkpoint), "sglang", tmp_path / "out", target)
    copy = checkpoints.load(tmp_path / "out" / "drafter")
    assert (copy.format, copy.target_layers) == ("specforge", checkpoint.target_layers)
    assert all(torch.equal(copy.tensors[name], tensor) for name, tensor in checkpoint.tensors.items())
    assert "head.weight" in copy.tensors and "embed.weight" not in copy.tensors
    at = made.command.index("--speculative-num-draft-tokens")
    assert made.command[at + 1] == "8" and "EAGLE3" in made.command


def sglang_parameters(folder: Path) -> dict[str, tuple[int, ...]]:
    """What sglang 0.5.23 declares for a checkpoint's config.json, by the names that its files use before q, k, v and
    gate, up are joined: ``LlamaForCausalLMEagle3``, ``DFlashDraftModel`` and ``DSparkDraftModel`` of ``srt/models``,
    written down from their code. What a loader does not find in its file keeps its random start; what it finds there
    and does not know it leaves out."""
    config = json.loads((folder / "config.json").read_text())
    (kind,) = config["architectures"]
    width, heads, kv, dim = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    eagle, block = kind == "LlamaForCausalLMEagle3", config.get("dflash_config", config)
    layers = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] if eagle else block["target_layer_ids"]
    assert all(0 <= layer < LAYERS - 1 for layer in layers), "each captured as the input of the next one"
    shapes = {"fc.weight": (width, len(layers) * config.get("target_hidden_size", width)), "norm.weight": (width,)}
    for i in range(config["num_hidden_layers"]):
        layer = "midlayer" if eagle and i == 0 else f"layers.{i}"
        inputs = 2 * width if eagle and i == 0 else width
        shapes |= {f"{layer}.self_attn.q_proj.weight": (heads * dim, inputs)}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (kv * dim, inputs) for name in "kv"}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (width, heads * dim)}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (config["intermediate_size"], width) for n in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (width, config["intermediate_size"])}
        norms = ("input_layernorm", "post_attention_layernorm", *(("hidden_norm",) if eagle else ()))
        shapes |= {f"{layer}.{norm}.weight": (width,) for norm in norms}
        if not eagle:
            shapes |= {f"{layer}.self_attn.{norm}.weight": (dim,) for norm in ("q_norm", "k_norm")}
    if eagle:
        assert not config["tie_word_embeddings"]
        shapes["lm_head.weight"] = (config["draft_vocab_size"], width)
        if config.get("fc_norm"):
            shapes |= {f"fc_norm.{i}.weight": (width,) for i in range(len(layers))}
        return shapes
    shapes["hidden_norm.weight"] = (width,)
    assert config["num_target_layers"] == LAYERS and 0 <= block["mask_token_id"] < config["vocab_size"]
    assert set(config.get("layer_types") or ["full_attention"]) == {"full_attention"}, "others would be causal"
    if kind == "DFlashDraftModel":
        return shapes
    rank = config["markov_rank"]
    shapes |= {f"markov_head.markov_w{i}.weight": (config["vocab_size"], rank) for i in (1, 2)}
    if config["markov_head_type"] == "gated":
        shapes |= {"markov_head.gate_proj.weight": (rank, width + rank), "markov_head.gate_proj.bias": (rank,)}
    if config["markov_head_type"] == "rnn":
        joint = "markov_head.joint_proj"
        shapes |= {f"{joint}.weight": (3 * rank, 2 * rank + width), f"{joint}.bias": (3 * rank,)}
    if config["enable_confidence_head"]:
        read = width + rank * config["confidence_head_with_markov"]
        shapes |= {"confidence_head.proj.weight": (1, read), "confidence_head.proj.bias": (1,)}
    return shapes


SKIPPED = {"DSparkDraftModel": ("embed_tokens.", "lm_head."), "LlamaForCausalLMEagle3": ("d2t", "t2d")}


@pytest.mark.parametrize(
    "checkpoint",
    [
        make_checkpoint(DSPARK),
        make_checkpoint(replace(DSPARK, markov_head="gated")),
        make_checkpoint(replace(DSPARK, markov_head="rnn", confidence_with_markov=False)),
        make_checkpoint(replace(DSPARK, confidence=False, confidence_with_markov=False)),
        make_checkpoint(DFLASH),
        make_checkpoint(Eagle3Design(), decoder=LLAMA),
        make_checkpoint(Eagle3Design(norm_each_before_fc=True), decoder=LLAMA, drafted=20),
    ],
    ids=["dspark", "gated", "rnn", "no confidence", "dflash", "eagle3", "eagle3 reduced"],
)
def test_sglangs_loaders_know_every_tensor_and_miss_none(checkpoint: Any, tmp_path: Path, target: str) -> None:
    checkpoint = replace(checkpoint, target=replace(checkpoint.target, num_layers=LAYERS))
    hand_over(saved(tmp_path, checkpoint), "sglang", tmp_path / "out", target)
    folder = tmp_path / "out" / "drafter"
    (kind,) = json.loads((folder / "config.json").read_text())["architectures"]
    kind = kind.replace("Qwen3DSparkModel", "DSparkDraftModel")
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    read = {name: shape for name, shape in shapes.items() if not name.startswith(SKIPPED.get(kind, ("none",)))}
    assert read == sglang_parameters(folder)
    if kind == "LlamaForCausalLMEagle3":
        layers = json.loads((folder / "config.json").read_text())["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        assert layers == list(checkpoint.target_layers), "SGLang adds the one that vLLM wants in the file"


def test_sglang_wants_a_draft_model_with_the_targets_vocabulary(tmp_path: Path, target: str) -> None:
    made = hand_over(str(save_target(tmp_path / "small", make_target())), "sglang", tmp_path / "out", target)
    assert "STANDALONE" in made.command and (tmp_path / "out" / "drafter" / "config.json").is_file()
    file = tmp_path / "small" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 65}))
    with pytest.raises(CheckpointError, match="65 tokens and a target of 64"):
        hand_over(str(tmp_path / "small"), "sglang", tmp_path / "other", target)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp"])
def test_a_draft_model_of_another_tokenizer_is_handed_to_nobody(engine: str, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "target")
    with pytest.raises(CheckpointError, match=r"another vocabulary \(4,096 tokens\) than the target"):
        hand_over(str(resolve_model("embedded").parent / "draft"), engine, tmp_path / "out", str(other))
    assert not (tmp_path / "out").exists()


def test_a_plan_does_not_shorten_a_block_in_sglang(tmp_path: Path, target: str) -> None:
    checkpoint = make_checkpoint(DFLASH)
    checkpoint = replace(checkpoint, target=replace(checkpoint.target, num_layers=LAYERS))
    plan = {"advised": {"drafts": 1}, "by_rows": []}
    made = hand_over(saved(tmp_path, checkpoint), "sglang", tmp_path / "out", target, plan=plan)
    assert made.command[made.command.index("--speculative-dflash-block-size") + 1] == str(DFLASH.block_size)


def test_sglang_gets_zlabs_dflash_and_deepspecs_dspark(tmp_path: Path, target: str) -> None:
    flash, spark = make_checkpoint(DFLASH), make_checkpoint(DSPARK)
    for name, checkpoint, form in (("f", flash, "zlab"), ("s", spark, "deepspec")):
        checkpoint = replace(checkpoint, target=replace(checkpoint.target, num_layers=LAYERS))
        (tmp_path / name).mkdir()
        made = hand_over(saved(tmp_path / name, checkpoint), "sglang", tmp_path / name / "out", target)
        copy = checkpoints.load(tmp_path / name / "out" / "drafter")
        assert (copy.format, copy.design, copy.target_layers) == (form, checkpoint.design, checkpoint.target_layers)
        assert all(torch.equal(copy.tensors[n], tensor) for n, tensor in checkpoint.tensors.items())
        assert made.command[made.command.index("--speculative-algorithm") + 1] == {"f": "DFLASH", "s": "DSPARK"}[name]


def test_llama_cpp_gets_a_gguf_as_it_is_or_what_its_converter_reads(tmp_path: Path, target: str) -> None:
    small = tmp_path / "small.gguf"
    small.write_bytes(b"GGUF and the rest")
    made = hand_over(str(small), "llama.cpp", tmp_path / "model", target)
    assert (tmp_path / "model" / "drafter.gguf").read_bytes() == small.read_bytes()
    (conversion,) = made.prepare  # of the target: the server reads GGUF files alone
    assert conversion[2:] == [target, "--outtype", "bf16", "--outfile", made.command[2]]
    made = hand_over("draft_model", "llama.cpp", tmp_path / "both", "embedded")
    assert [words[-1] for words in made.prepare] == [made.command[2], "drafter.gguf"]
    made = hand_over(saved(tmp_path, make_checkpoint(DSPARK)), "llama.cpp", tmp_path / "out", target)
    assert made.prepare[0][2:] == [target, "--outtype", "bf16", "--outfile", made.command[2]]
    assert made.prepare[1][-2:] == ["--target-model-dir", target]
    assert "draft-dspark" in made.command and made.command[-2:] == ["--spec-draft-n-max", "4"]
    assert checkpoints.load(tmp_path / "out" / "drafter").format == "speculators"
    made = hand_over(str(tmp_path / "d"), "llama.cpp", tmp_path / "hub", "smollm2")
    assert [words[0] for words in made.prepare] == ["hf", "python"], "the package has the target's GGUF file"
    assert made.prepare[1][-2:] == ["--target-model-dir", "target"] and Path(made.command[2]).is_file()


@pytest.mark.parametrize(
    ("engine", "checkpoint", "reason"),
    [
        ("sglang", make_checkpoint(BlockDesign(4, 3)), "anchor"),
        ("sglang", make_checkpoint(DFLASH, drafted=20), "reduced vocabulary"),
        ("sglang", make_checkpoint(Eagle3Design()), "norms of queries"),
        ("sglang", make_checkpoint(Eagle3Design(norm_output=True), decoder=LLAMA), "fed back"),
        ("sglang", make_checkpoint(MTPDesign()), "own checkpoint"),
        ("sglang", make_checkpoint(DFLASH, decoder=LLAMA), "Qwen3's layers"),
        ("sglang", make_checkpoint(DSPARK, decoder=GEMMA4), "Qwen3's layers"),
        ("sglang", make_checkpoint(replace(DSPARK, markov_rank=0, confidence_with_markov=False)), "Markov head"),
        ("sglang", make_checkpoint(DFLASH, decoder={**DECODER, **SLIDING}), "sliding window"),
        ("sglang", replace(make_checkpoint(Eagle3Design(), decoder=LLAMA), frozen_embedding=False), "its own"),
        ("vllm", make_checkpoint(MTPDesign()), "own checkpoint"),
        ("vllm", make_checkpoint(replace(DSPARK, markov_head="rnn")), "vanilla"),
        ("vllm", make_checkpoint(DFLASH, decoder=LLAMA), "Qwen3's layers"),
        ("llama.cpp", make_checkpoint(MTPDesign()), "own GGUF"),
        ("llama.cpp", make_checkpoint(Eagle3Design()), "one Llama layer"),
        ("llama.cpp", make_checkpoint(Eagle3Design(norm_output=True), decoder=LLAMA), "fed back"),
        ("llama.cpp", make_checkpoint(DFLASH, decoder=LLAMA), "norms of queries"),
        ("llama.cpp", make_checkpoint(replace(DSPARK, markov_head="gated")), "vanilla"),
        ("sglang", replace(make_checkpoint(DSPARK), target_layers=(0, 2, LAYERS - 1)), "last layer"),
    ],
)
def test_what_an_engine_cannot_load_is_refused_with_the_reason(
    engine: str, checkpoint: Any, reason: str, tmp_path: Path, target: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        hand_over(saved(tmp_path, checkpoint), engine, tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_a_plan_decides_on_drafts_and_load(tmp_path: Path, target: str) -> None:
    drafter = saved(tmp_path, make_checkpoint(Eagle3Design()))
    plan = {"advised": {"drafts": 3}, "by_rows": [[1, {"drafts": 3}], [32, {"drafts": 0}], [64, {"drafts": 0}]]}
    made = hand_over(drafter, "vllm", tmp_path / "a", target, plan=plan | {"target": "qwen3-8b", "machine": "h100"})
    assert "# Planned for: qwen3-8b, h100." in (tmp_path / "a" / "launch.sh").read_text()
    assert config_of(made)["num_speculative_tokens"] == 3
    assert made.command[made.command.index("--max-num-seqs") + 1] == "32"
    for wrong in ({}, {"advised": {"drafts": 0}, "by_rows": []}):
        with pytest.raises(InvalidRequest, match="--plan"):
            hand_over(drafter, "vllm", tmp_path / "b", target, plan=wrong)
    with pytest.raises(UnknownKind):
        hand_over(drafter, "vlm", tmp_path / "b", target)


def test_the_target_is_named_so_that_the_engine_finds_it(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command runs in the folder of the files, whatever the user's own directory was."""
    monkeypatch.chdir(Path(target).parent)
    drafter = saved(tmp_path, make_checkpoint(DSPARK))
    assert hand_over(drafter, "vllm", tmp_path / "a", "target").command[2] == target
    assert hand_over(drafter, "vllm", tmp_path / "b", "an/id").command[2] == "an/id"
    assert hand_over(drafter, "vllm", tmp_path / "c", "smollm2").command[2] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_command_writes_everything(tmp_path: Path, target: str) -> None:
    drafter = saved(tmp_path, make_checkpoint(DSPARK))
    result = CliRunner().invoke(
        app, ["export", drafter, str(tmp_path / "out"), "--to", "vllm", "--target", target, "--json", "-"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["engine"] == "vllm"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "drafter", "launch.sh", "speculative_config.json", "handover.json"
    }  # fmt: skip


def test_the_cluster_examples_hold_what_is_exported(tmp_path: Path, target: str) -> None:
    """The keys of their speculative configs are those of an exported DSpark."""
    yaml = pytest.importorskip("yaml")
    folder = Path(__file__).parents[1] / "examples" / "deploy"
    workers, service = yaml.safe_load_all((folder / "leaderworkerset.yaml").read_text())
    container = workers["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]["containers"][0]
    (argument,) = [one for one in container["args"] if one.startswith("--speculative-config=")]
    kubernetes = json.loads(argument.partition("=")[2])
    (application,) = yaml.safe_load((folder / "ray_serve.yaml").read_text())["applications"]
    ray = application["args"]["llm_configs"][0]["engine_kwargs"]["speculative_config"]
    exported = config_of(hand_over(saved(tmp_path, make_checkpoint(DSPARK)), "vllm", tmp_path / "out", target))
    assert kubernetes == ray and kubernetes.keys() == exported.keys()
    assert (
        service["spec"]["selector"] == workers["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["metadata"]["labels"]
    )


@pytest.mark.parametrize("drafter, owner", [("suffix", "embedded"), ("dspark", "some/model")])
def test_a_kind_without_a_checkpoint_is_refused_as_one(drafter: str, owner: str, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"'{drafter}' is a kind .* and none comes with {owner}; .* dspark for embedded"
    ):
        hand_over(drafter, "vllm", tmp_path / "out", owner)
