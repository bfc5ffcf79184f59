"""The README's example runs, and prints what the README says."""

import pathlib
import re

import jax
import optax

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_example_runs_and_prints_the_table(capsys):
    text = README.read_text()
    example = re.search(r"```python\n(.*?)```\n+```\n(.*?)```", text, re.DOTALL)
    namespace = {}
    exec(compile(example[1], "README.md", "exec"), namespace)
    assert capsys.readouterr().out == example[2]
    assert int(namespace["state"][1].count) == 100

    of_upgd, of_tickets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1:]
    exec(compile(of_upgd, "README.md", "exec"), namespace)
    assert set(namespace["both"].init(namespace["params"]).inner_state[0].utility) == set(namespace["params"])

    params = namespace["params"]
    exec(compile(of_tickets, "README.md", "exec"), namespace)
    kernels = lambda tree: [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]
    assert [int(leaf.sum()) for leaf in kernels(namespace["mask"])] == [1280 - 256, 4096 - 819, 640 - 64]
    updates, _ = namespace["tx"].update(params, namespace["tx"].init(params), params)
    after = optax.apply_updates(params, updates)
    assert [int((leaf != 0).sum()) for leaf in kernels(after)] == [1024, 3277, 576]
    ticket = namespace["ticket"]
    assert ticket.number == 5
    for rewound, first, living, control in zip(
        *map(kernels, (ticket.params, namespace["first"], ticket.mask, namespace["control"])), strict=True
    ):
        assert (rewound == first * living).all() and ((control != 0) == living).all()
    assert [leaf.shape for leaf in kernels(namespace["small"])] == [(20, 32), (32, 32), (32, 10)]


def test_commands_are_single_lines():
    text = README.read_text()
    for name in ("run", "tests"):
        block = re.search(rf"<!-- {name} -->\n```sh\n(.*?)```\n<!-- /{name} -->", text, re.DOTALL)
        assert block[1].count("\n") == 1 and block[1].startswith("python3 -m venv .venv && ")
