"""Settings of a server: which source wins, and keys, origins and values of another kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.errors import InvalidRequest
from outrider.serving.settings import ServerSettings, read_settings


def test_flags_win_over_variables_and_those_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nmax_rows = 2\nhost = "::1"\ncors_origins = ["http://a"]\n')
    environment = {
        "OUTRIDER_SERVE_PORT": "3",
        "OUTRIDER_SERVE_MAX_ROWS": "4",
        "OUTRIDER_SERVE_CORS_ORIGINS": "http://b, *",
    }
    found = read_settings({"port": 5, "model": None}, environment, file)
    assert (found.port, found.max_rows, found.host, found.cors_origins) == (5, 4, "::1", ["http://b", "*"])
    with pytest.raises(InvalidRequest, match="OUTRIDER_SERVE_MAX_ROW: unknown .*did you mean 'max_rows'"):
        read_settings({}, {"OUTRIDER_SERVE_MAX_ROW": "4"}, None)
    with pytest.raises(InvalidRequest, match="OUTRIDER_SERVE_PORT: port: .* valid integer.*, got 'abc'"):
        read_settings({}, {"OUTRIDER_SERVE_PORT": "abc", "OUTRIDER_SERVE_MAX_ROWS": "4"}, None)
    with pytest.raises(InvalidRequest, match="the command line: port"):
        read_settings({"port": -1}, {}, None)
    assert read_settings({"kv_memory": "1.5G"}, {}, None).kv_memory == 3 << 29
    assert read_settings({}, {"OUTRIDER_SERVE_KV_MEMORY": "4096"}, None).kv_memory == 4096
    with pytest.raises(InvalidRequest, match="kv_memory must be a size like .*, got 'much'"):
        read_settings({"kv_memory": "much"}, {}, None)
    with pytest.raises(InvalidRequest, match="the command line: prefill_chunk"):
        read_settings({"prefill_chunk": 0}, {}, None)
    with pytest.raises(InvalidRequest, match="TOML"):
        file.write_text("port")
        read_settings({}, {}, file)


@pytest.mark.parametrize("text", ["\ufefffirst\n", "  # comment\n first \n\n"])
def test_a_file_of_keys_as_editors_write_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text, encoding="utf-8")
    assert ServerSettings(api_key_file=str(tmp_path / "keys")).api_keys() == (b"first",)


@pytest.mark.parametrize("line", ["first # alice", "Bearer first", "schl\u00fcssel"])
def test_a_key_that_no_client_can_send_is_refused_and_not_shown(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys").write_text(f"# keys\n{line}\n", encoding="utf-8")
    with pytest.raises(InvalidRequest, match="line 2: expected a key") as refused:
        ServerSettings(api_key_file=str(tmp_path / "keys")).api_keys()
    assert line not in str(refused.value)


@pytest.mark.parametrize("origin", ["localhost:3000", "http://a/", "http://A", "http://a/b", "https://*.a", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(InvalidRequest, match="cors_origins: expected SCHEME://HOST"):
        read_settings({"cors_origins": [origin]}, {}, None)


def test_origins_of_every_kind_are_taken() -> None:
    origins = [
        "*",
        "null",
        "http://localhost:3000",
        "https://page.example",
        "http://[::1]:80",
        "chrome-extension://abc",
        "app://local",
    ]
    assert read_settings({"cors_origins": origins}, {}, None).cors_origins == origins


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port = true", "port: expected no truth value"),
        ("kv_memory = true", "kv_memory: expected no truth value"),
        ("body_seconds = false", "body_seconds: expected no truth value"),
        ('log_level = "loud"', "log_level: Input should be 'debug', 'info', 'warning' or 'error', got 'loud'"),
    ],
)
def test_a_setting_of_another_kind_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(InvalidRequest, match=said):
        read_settings({}, {}, tmp_path / "serve.toml")


def test_a_file_of_settings_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text("\ufeffport = 9\nguard = false", encoding="utf-8")
    found = read_settings({}, {}, tmp_path / "serve.toml")
    assert (found.port, found.guard) == (9, False)


def test_a_file_that_the_environment_names_is_named_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="OUTRIDER_SERVE_CONFIG .*none.toml cannot be read"):
        read_settings({}, {"OUTRIDER_SERVE_CONFIG": str(tmp_path / "none.toml")}, None)
