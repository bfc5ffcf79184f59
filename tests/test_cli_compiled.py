import os
import pathlib
import subprocess
import sys

import jax
import pytest

from cbp_jax.cli_compiled import keep_compiled, user_cache

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "platform", "linux")
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_folder_is_printed_once(home):
    made = keep_compiled()
    assert made.is_dir() and made.parent == home / "cache" / "cbp_jax" / "compiled"
    assert jax.config.jax_compilation_cache_dir == str(made)
    jax.config.update("jax_compilation_cache_dir", None)
    assert keep_compiled() is None and jax.config.jax_compilation_cache_dir == str(made)


@pytest.mark.parametrize("how", ["environment", "configured", "off", "a file in the way"])
def test_the_users_own_setting_is_kept(home, how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "own"))
    if how == "configured":
        jax.config.update("jax_compilation_cache_dir", str(home / "own"))
    if how == "off":
        monkeypatch.setattr(type(jax.config), "jax_enable_compilation_cache", False, raising=False)
    if how == "a file in the way":
        (home / "cache").write_text("")
    before = jax.config.jax_compilation_cache_dir
    assert keep_compiled() is None
    assert jax.config.jax_compilation_cache_dir == before
    assert how == "a file in the way" or not list(home.iterdir())


@pytest.mark.parametrize(
    ("name", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": ""}, ".cache"),
        ("darwin", {}, "Library/Caches"),
        ("win32", {"LOCALAPPDATA": ""}, "AppData/Local"),
    ],
)
def test_folders_by_platform(monkeypatch, tmp_path, name, variables, expected):
    monkeypatch.setattr(sys, "platform", name)
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert user_cache() == tmp_path / expected


@pytest.mark.slow
def test_a_second_run_compiles_nothing(tmp_path):
    words = ["run", "online_permuted", "--preset", "smoke", "--methods", "bp", "--tasks", "1", "--quiet"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HOME": str(tmp_path),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # cache every program, also on a fast machine

    def run(*more):
        command = [sys.executable, "-m", "cbp_jax", *words, *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        return done.stderr

    count = lambda: len([path for path in (tmp_path / "cache").rglob("*-cache")])
    assert "compiled programs are cached" not in run("--no-compilation-cache", "--out", str(tmp_path / "0"))
    assert not (tmp_path / "cache" / "cbp_jax").exists()
    assert f"compiled programs are cached in {tmp_path / 'cache'}" in run("--out", str(tmp_path / "1"))
    kept = count()
    assert kept > 0 and "compiled programs" not in run("--out", str(tmp_path / "2")) and count() == kept
