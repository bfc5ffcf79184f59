"""The commands shown in the README and the documentation: the command line accepts them. Nothing is run."""

import argparse
import pathlib
import re
import shlex
import sys

import pytest

from cbp_jax import cli, cli_processes, cli_run

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ANY_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
# What the documentation calls the user's own module.
MODULE = """
import flax.linen as nn, optax
from cbp_jax.experiments import online_permuted as my_experiment


def my_factory(learning_rate=0.01):
    return optax.sgd(learning_rate)


class MyNet(nn.Module):
    num_outputs: int
    width: int = 8

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_outputs)(nn.relu(nn.Dense(self.width)(x.reshape(len(x), -1))))
"""


def commands(text):
    """Return the arguments of each command of a page: of blocks all, of code within sentences those with options."""
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    spans = (" ".join(span.split()) for span in INLINE.findall(ANY_FENCE.sub("", text)))
    lines += [span for span in spans if " --" in span and " ... " not in span]
    parts = [part for line in lines for part in re.split(r"&&|;|\|", line)]
    found = [shlex.split(part, comments=True) for part in parts if re.search(r"(^|[\s/])cbp-jax ", part)]
    starts = [[pathlib.Path(word).name for word in words].index("cbp-jax") + 1 for words in found]
    return [words[start:] for words, start in zip(found, starts, strict=True)]


class Parsed(Exception):
    """Raised in place of what a command would do."""


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Return a function that reads a command as `cbp-jax` does, checks its settings, and stops there."""
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    monkeypatch.setenv("CBP_JAX_TRACEBACK", "1")  # errors of users are raised
    monkeypatch.setattr(cli, "_use_all_cores", lambda: None)
    monkeypatch.setattr(cli_processes, "meet", lambda given: cli_processes.Share(0, 1))
    monkeypatch.delitem(sys.modules, "my_module", raising=False)

    def prepare(asked, before):
        asked.experiment.check(asked.settings)
        raise Parsed

    def parse_args(parser, *args, read=argparse.ArgumentParser.parse_args):
        read(parser, *args)
        raise Parsed

    monkeypatch.setattr(cli_run, "_prepare", prepare)

    def run(words):
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            try:
                assert cli.main(words) == 0
            except Parsed:
                pass

    yield run
    sys.modules.pop("my_module", None)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in PAGES if commands(path.read_text())],
)
def test_commands_of_the_pages(path, parse):
    for words in commands(path.read_text()):
        parse(words)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("cbp-jax run online_permuted --preset smoke --sede 3", SystemExit),
        ("cbp-jax run online_permuted --preset smoke --seeds three", SystemExit),
        ("cbp-jax run online_permuted --presets smoke", SystemExit),
        ("cbp-jax run online_permutted --preset smoke", ValueError),
        ("cbp-jax run online_permuted --preset large", ValueError),
        ("cbp-jax run online_permuted --methods cbp:rate=1", ValueError),
        ("cbp-jax run online_permuted --network my_module:OtherNet", ValueError),
        ("cbp-jax run online_permuted --processes 2", ValueError),
        ("cbp-jax bench --suites small", SystemExit),
        ("cbp-jax plot --out C", SystemExit),
        ("cbp-jax data prepare mnist", SystemExit),
        ("cbp-jax draw runs", SystemExit),
    ],
)
def test_a_wrong_command_is_found(command, error, parse, capsys):
    (words,) = commands(f"Text.\n\n```sh\npython3 -m venv .venv && .venv/bin/{command}  # a comment\n```\n")
    with pytest.raises(error):
        parse(words)


def test_commands_are_found():
    block = "```sh\ncd x && cbp-jax list \\\n  figures\n```\n"
    text = f"Run `cbp-jax\nrun a --b c`, not `cbp-jax run a` or `cbp-jax run ... --d`.\n\n{block}"
    assert commands(text) == [["list", "figures"], ["run", "a", "--b", "c"]]
    assert sum(len(commands(path.read_text())) for path in PAGES) > 40
