"""The tables of the command line in a terminal of 80 columns: no header and no figure is cut."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

from outrider.cli import bench, demo, models
from outrider.cli import eval as evaluation
from outrider.evaluation.comparison import Confidence, Difference, Evaluation, Row, SweepPoint
from outrider.evaluation.intervals import Estimate
from outrider.models.locations import LocalModel
from outrider.scheduling.calibration import Quality

NAME = "my-long-drafter-dspark-7"
WIDE = Estimate(12.34, 10.11, 14.56)


def printed(table: Table) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\u2026" not in text and max(map(len, text.splitlines())) <= 80
    for column in table.columns:
        for word in str(column.header).split():
            assert word in text, (word, text)
    return text


def test_bench() -> None:
    row = {
        "drafter": NAME, "prompts": "humaneval", "temperature": 0.7, "baseline_tokens_per_second": 1234.5,
        "tokens_per_second": 2345.6, "speedup": 12.34, "speedup_ci95": (10.11, 14.56), "acceptance_length": 4.56,
        "identical": 1.0, "repeated_8grams": 0.53,
    }  # fmt: skip
    text = printed(bench._table({"model": "m", "machine": {"cpu": "A CPU of 96 cores", "cores": 2}, "rows": [row]}))
    assert "1234.5" in text and "10.11-14.56" in text and "100%" in text


def test_eval() -> None:
    row = Row(NAME, 0.7, "humaneval", 9, 9, *[WIDE] * 7, [Estimate(1.0)] * 16, [Estimate(1.0)] * 16)  # type: ignore[arg-type, call-arg]
    quality = Quality(12345, 0.5, 0.5, 0.123, 0.1, 0.123, 0.9, 0.1)
    found = Evaluation(
        {},
        [row],
        [Difference(NAME, NAME + "-b", 0.7, "humaneval", WIDE)],
        [SweepPoint(NAME, 0.7, 0.25, *[WIDE] * 4)],
        [Confidence(NAME, 0.7, quality, [], [], [])],
    )
    for table in ("_acceptance", "_differences", "_sweep", "_confidences"):
        printed(getattr(evaluation, table)(found))
    first, second = map(printed, evaluation._positions(found))
    assert "9" in first and "16" in second and "100" in second


def test_models_and_demo() -> None:
    printed(models._embedded_table(models._embedded()))
    printed(models._catalogue_table({"drafter": {"eagle3": "the package some-package is not installed here " * 3}}))
    local = LocalModel("ollama:somebody/a-rather-long-name:latest", Path("/x"), 12 << 30, "llama", "Q4_K", NAME * 3)
    assert "12.0 GiB" in printed(models._local_table([local]))
    row = demo.Row("explanation", 1234.5, 2345.6, 1.9, 4.56, 0.534, True, True, 128)
    text = printed(demo._table([row], "smollm2", NAME, 1.0))
    assert all(word in text for word in ("explanation", "speculative", "8-grams", "ended by"))
