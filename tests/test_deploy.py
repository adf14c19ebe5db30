"""The files to run a server with: their settings exist, and the dashboard asks for metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from outrider.engine.llm import LLM
from outrider.serving.launch import make_service
from outrider.serving.settings import ServerSettings, read_settings

DEPLOY = Path(__file__).parents[1] / "deploy"


def test_the_settings_file_is_read() -> None:
    found = read_settings({}, {}, DEPLOY / "serve.toml")
    assert found.model == "smollm2" and found.max_new_tokens == 4096
    commented = re.findall(r"^# (\w+) = ", (DEPLOY / "serve.toml").read_text(), re.M)
    assert commented and set(commented) <= set(ServerSettings.model_fields)


@pytest.mark.parametrize("file", ["Dockerfile", "outrider.service", "kubernetes.yaml"])
def test_variables_are_settings(file: str) -> None:
    names = re.findall(r"OUTRIDER_SERVE_([A-Z_]+)\b", (DEPLOY / file).read_text())
    assert names and {name.lower() for name in names} <= set(ServerSettings.model_fields)


def test_the_dashboard_shows_metrics_that_exist() -> None:
    service = make_service(LLM("embedded", "suffix"), ServerSettings())
    shown = service.metrics.text().decode()
    known = set(re.findall(r"^# TYPE (\S+) ", shown, re.M)) | set(re.findall(r"^(\w+)[ {]", shown, re.M))
    known |= {f"{name}_bucket" for name in re.findall(r"^# TYPE (\S+) histogram", shown, re.M)}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expr in asked for name in re.findall(r"\b(?:outrider|spec_decode)_\w+", expr)}
    assert len(names) > 12 and names <= known, names - known
