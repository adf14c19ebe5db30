"""Documentation that writes itself: the file tree of the README, and the pages of ``site/``.

    python docs/build.py           both
    python docs/build.py --tree    the README's tree alone

A file is described by the first sentence it says about itself, so the tree never tells another story than the code.
"""

from __future__ import annotations

import ast
import html
import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["README", "described", "main", "replace_tree", "tree"]

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TREE = re.compile(r"(?<=```text\n)outrider/\n.*?(?=```)", re.DOTALL)
PAGES = ("llm", "config", "types", "errors", "registry", "tokenizer", "engine")  # what users and authors of kinds hold
SHOWN = ("src/outrider", "native", "recipes", "benchmarks", "docs", "tests")
SOURCE = {".py", ".cpp", ".hpp"}
SAID_HERE = {  # what cannot speak for itself
    "Makefile": "Every command a developer needs; `make help` lists them.",
    "constraints.txt": "The exact versions that `make` installs.",
    "docs/architecture.md": "The shape of the whole, its floors and contracts, and why.",
    "docs/evaluation.md": "How drafters are compared, and how their confidences are calibrated.",
    "docs/log.md": "Decisions, failed tries and measured figures.",
    "docs/training.md": "How to train a drafter for your own model in one command, and what each stage does.",
    "src/outrider/embedded": "Target and draft model, held-out prompts, and their model card.",
    "tests/data": "The frozen command line.",
}


def described(path: Path) -> str:
    """The first sentence of a file: its docstring's or its opening comment's. Empty where it has none."""
    name = path.relative_to(ROOT).as_posix()
    if name in SAID_HERE:
        return SAID_HERE[name]
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if path.suffix == ".py":
        words = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix in SOURCE:
        comment = re.match(r"(?://.*\n)+", text)
        words = re.sub(r"^// ?", "", comment[0], flags=re.MULTILINE) if comment else ""
        header = path.with_suffix(".hpp")
        if not words and path != header and header.is_file():
            return f"The same, carried out: `{header.name}`."
    else:
        words = ""
    first = " ".join(words.split("\n\n")[0].split())
    sentence = re.match(r".*?[.?](?= |$)", first)
    return sentence[0] if sentence else first


def entries(folder: Path) -> Iterator[Path]:
    """What the tree shows of a folder: source files, folders with any, and whatever is described here."""
    for path in sorted(folder.iterdir(), key=lambda p: (p.is_dir(), p.name)):
        name = path.relative_to(ROOT).as_posix()
        if name in SAID_HERE:
            yield path
        elif path.is_dir() and path.name not in ("__pycache__",):
            if folder != ROOT and any(p.suffix in SOURCE for p in path.rglob("*")):
                yield path
        elif path.suffix in SOURCE and described(path):
            yield path


def tree() -> str:
    """The annotated tree, as the README shows it."""
    lines = ["outrider/"]

    def add(paths: list[Path], indent: str, label: str = "") -> None:
        for path in paths:
            last = path == paths[-1]
            name = path.relative_to(ROOT).as_posix() if not indent else path.name
            inside = list(entries(path)) if path.is_dir() and path.relative_to(ROOT).as_posix() not in SAID_HERE else []
            head = f"{indent}{'└──' if last else '├──'} {name}{'/' if path.is_dir() else ''}"
            lines.append(f"{head:<34}  {described(path)}".rstrip())
            add(inside, indent + ("    " if last else "│   "))

    add([ROOT / name for name in ("Makefile", "constraints.txt", *SHOWN) if (ROOT / name).exists()], "")
    return "\n".join(lines) + "\n"


def replace_tree(text: str) -> str:
    """The README's text with the tree as it is now."""
    return TREE.sub(lambda _: tree(), text)


# ------------------------------------------------------------------------------------------------ pages


def command_line() -> str:
    """Every command's own help, in Markdown."""
    import typer
    from typer.testing import CliRunner

    from outrider.cli import COMMANDS, app

    group: Any = typer.main.get_command(app)
    names = []
    for name in COMMANDS:
        names += [name, *(f"{name} {inner}" for inner in getattr(group.commands[name], "commands", ()))]
    parts = ["# Command line"]
    for name in names:
        shown = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "110", "TERM": "dumb"}).stdout
        parts.append(f"## outrider {name}\n\n```text\n{shown.strip()}\n```")
    return "\n\n".join(parts)


def library() -> str:
    """Signatures and docstrings of what ``PAGES`` export, in Markdown."""
    parts = ["# Library"]
    for name in PAGES:
        module = import_module(f"outrider.{name}")
        parts.append(f"## outrider.{name}\n\n{inspect.getdoc(module)}")
        for exported in module.__all__:
            value = getattr(module, exported)
            if inspect.isclass(value) or inspect.isfunction(value):
                parts.append(_entry(exported, value, "###"))
                members = vars(value).items() if inspect.isclass(value) else ()
                methods = [(n, m) for n, m in members if inspect.isfunction(m) and not n.startswith("_")]
                parts += [_entry(f"{exported}.{n}", m, "####") for n, m in methods if inspect.getdoc(m)]
    return "\n\n".join(parts)


def _entry(name: str, value: object, level: str) -> str:
    try:
        signature = str(inspect.signature(value))  # type: ignore[arg-type]
    except ValueError:  # an exception class has none
        signature = ""
    return f"{level} {name}\n\n```python\n{name}{signature}\n```\n\n{inspect.getdoc(value) or ''}"


def write_site(folder: Path) -> None:
    """README, guides and the generated references as plain HTML."""
    from markdown_it import MarkdownIt

    pages = {"index": README.read_text(encoding="utf-8")}
    pages |= {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
    pages |= {"command-line": command_line(), "library": library()}
    links = " · ".join(f'<a href="{name}.html">{name}</a>' for name in pages)
    style = "body{max-width:60em;margin:2em auto;font-family:sans-serif;line-height:1.5}pre{overflow:auto}"
    folder.mkdir(exist_ok=True)
    for name, text in pages.items():
        body = MarkdownIt("commonmark").enable("table").render(text)
        title = f"<meta charset='utf-8'><title>Outrider: {html.escape(name)}</title><style>{style}</style>"
        (folder / f"{name}.html").write_text(f"<!doctype html>{title}<nav>{links}</nav>{body}", encoding="utf-8")


def main() -> None:
    README.write_text(replace_tree(README.read_text(encoding="utf-8")), encoding="utf-8")
    if "--tree" not in sys.argv[1:]:
        write_site(ROOT / "site")
        print(f"wrote {ROOT / 'site' / 'index.html'}")


if __name__ == "__main__":
    main()
