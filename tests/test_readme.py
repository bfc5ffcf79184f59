"""The README's example runs and prints the shown output."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_example_runs_and_prints_the_table(capsys):
    text = README.read_text()
    example = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", text, re.DOTALL)
    assert text.count("```python") == 1
    namespace = {}
    exec(compile(example[1], "README.md", "exec"), namespace)
    assert capsys.readouterr().out == example[2]
    assert int(namespace["state"].count) == 1


def test_commands_are_single_lines():
    text = README.read_text()
    for name in ("run", "tests"):
        block = re.search(rf"<!-- {name} -->\n```sh\n(.*?)```\n<!-- /{name} -->", text, re.DOTALL)
        assert block[1].count("\n") == 1 and block[1].startswith("python3 -m venv .venv && ")
