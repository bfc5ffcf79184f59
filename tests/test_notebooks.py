"""Every notebook runs from top to bottom, at a tiny size, in a kernel of the running Python."""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import nbclient
import nbformat
import numpy as np
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


class Case(NamedTuple):
    """The test of a notebook."""

    sizes: dict[str, Any]  # replace those in the cell tagged "parameters"
    read_back: dict[str, str]  # expressions to evaluate after the last cell
    check: Callable[[dict[str, Any], pathlib.Path], None]  # gets their values, and the folder in which the notebook ran
    slow: bool = False


def check_continual_backprop(found, folder):
    assert found["groups"] == ["params/Dense_0", "params/Dense_1", "params/Dense_2"]
    assert found["steps"] == 3 * 300

    # About 8 units x 0.002 x 900 steps. Only mature units are replaced, and all of a unit is reset in the same step.
    assert 5 <= found["replaced"] <= 14
    assert found["safe"] > 20
    assert found["newborn"] == 0
    outgoing_before, outgoing_after, incoming_before, incoming_after = found["reborn"]
    assert outgoing_before > 0 and outgoing_after == 0
    assert incoming_before != incoming_after

    # Only with the first two placements nothing of the old unit remains, neither outgoing weights nor moments.
    assert [any(values) for values in found["left"].values()] == [False, False, True, True]
    assert found["same"]

    none, some, many = found["counted"]
    assert none == 0 < some < many
    assert found["differ"]
    assert found["loaded"] == {"method": 3, "seed": 2, "task": 4}
    assert found["labels"] == ["bp", "cbp(replacement_rate=0.001)", "cbp(replacement_rate=0.05)"]
    assert (folder / "runs/01_continual_backprop/results.nc").is_file()


def check_upgd(found, folder):
    assert found["last_loss"] < found["first_loss"]
    # The gate of the largest utility is 1 - phi(1), and quotients of updates agree with the equation.
    np.testing.assert_allclose(found["lowest"], 1 / (1 + np.e), rtol=1e-4)
    np.testing.assert_allclose(found["gate_errors"], 0, atol=1e-4)
    weights, of_units = found["quality"]["weights"], found["quality"]["units"]
    assert weights["second_order"] > 0.8 > weights["magnitude"]
    assert of_units["second_order"] > 0.3  # for 14 units
    before, after = found["reborn"]
    assert before > 0 == after
    assert found["labels"] == ["cbp_upgd(replacement_rate=0.02)"] and found["dims"]["task"] == 3
    assert found["accuracy"] > 0
    assert (folder / "runs/02_upgd/results.nc").is_file()


def check_slippery_ant(found, folder):
    np.testing.assert_allclose(found["slid"], found["law"], atol=0.12)
    assert found["groups"] == ["params/actor_0", "params/actor_1", "params/critic_0", "params/critic_1"]
    assert found["shapes"] == [2, 2] and found["differ"]
    assert found["steps"] >= 1 and (folder / "ant.html").stat().st_size > 10_000
    assert found["dims"] == {"method": 2, "seed": 1, "task": 2}
    assert found["replaced"][0] == 0 < found["replaced"][1]
    assert found["frictions"] > 1, "the friction has changed"
    assert len(list((folder / "runs/04_slippery_ant").glob("episode-*.html"))) == 2


def check_any_network(found, folder):
    assert found["resnet"] == 12 and found["vit"] == ["residual", "head", "dense", "head", "dense"]
    assert found["drawn"] == 21  # kernels of ResNet-18
    assert found["streams"] == ["stem", "stage2_block1_conv2"]
    # Parameters of the replaced channel are resampled, at their initial values, or 0; outputs do not depend on it.
    before, after = (dict.fromkeys(found["roles"], 0.0) for _ in range(2))
    for role, (old, new) in zip(found["roles"], found["entries"], strict=True):
        before[role], after[role] = max(before[role], old), max(after[role], new)
    assert after["reads it"] == 0 < before["reads it"] and after["offset"] == pytest.approx(0, abs=1e-7)
    assert after["scale"] == pytest.approx(1) and after["statistics"] == 1 and before["statistics"] != 1
    assert after["writes it"] not in (0, before["writes it"])
    whole, forgotten = found["proof"]  # with all consumers reset, and with one that was not
    assert whole == [0, 0] and min(forgotten) > 0
    assert found["dims"] == {"method": 2, "seed": 1, "task": 2}
    assert (folder / "runs/03_any_network/results.nc").is_file()


def check_lottery_tickets(found, folder):
    # Each round prunes exactly half of the living weights, and a quarter of those of the output layer.
    left = [64 * 12, 12 * 8, 8 * 10]
    for alive in found["alive"]:
        left = [count - round(share * count) for count, share in zip(left, (0.5, 0.5, 0.25), strict=True)]
        assert alive == left
    assert found["nested"] and found["rewound"]
    assert found["still_dead"] == 0 < found["moved"]
    assert max(found["learned"]) > 40  # percent, for ten classes

    # All controls have as many weights in each layer; some have the ticket's mask, some its initial weights.
    assert found["controls"] == {
        "ticket": [left, True, True],
        "signs alone": [left, True, False],
        "one-shot": [left, False, True],
        "reinitialized": [left, True, False],
        "random": [left, False, True],
    }
    assert found["draws"] == {"ticket": 1, "signs alone": 1, "one-shot": 1, "reinitialized": 2, "random": 2}
    for name, share in found["paths"].items():
        a, b, c = (np.array(kernel) for kernel in found["masks"][name])
        through = [a * (b @ c).sum(1), b * a.sum(0)[:, None] * c.sum(1), c * (a @ b).sum(0)[:, None]]
        used = sum((paths > 0).sum() for paths in through)
        assert share == pytest.approx(100 * used / (a.sum() + b.sum() + c.sum()))

    # Half of the units are removed: outputs differ from the masked network's only by rounding.
    assert found["sizes"] == [6, 4] and found["parameters"] == 65 * 6 + 7 * 4 + 5 * 10
    assert found["difference"] < 1e-5 and found["changed"] > 1e-2
    assert found["steps"] == ["dense", "masked", "small"]
    assert found["dims"] == {"method": 3, "seed": 2, "task": 3, "evaluation": 3}
    np.testing.assert_allclose(found["densities"], [100, *found["density"]], rtol=1e-5)
    assert (folder / "runs/05_lottery_tickets/results.nc").is_file()


def check_questions(found, folder):
    assert set(found["found"]) == {"contribution", "random", "blend"}
    assert all(-1 <= value <= 1 for value in found["found"].values()) and abs(found["found"]["random"]) < 0.6
    # The user's utility from the notebook is averaged, in every measurement.
    assert found["measured"] == [1, 2, 2] and found["labels"][-1] == "cbp(replacement_rate=0.01, utility=blend)"
    assert found["differ"]  # different units are replaced
    assert found["low"] <= found["less"] <= found["high"]
    assert (folder / "runs/07_questions/stream/results.nc").is_file()


def check_adapters(found, folder):
    assert found["counts"] == [64 * 12 + 12 + 12 * 8 + 8 + 8 * 10 + 10, 2 * (64 + 12) + 2 * (12 + 8) + 2 * (8 + 10)]
    assert found["unchanged"] and found["apart"] < 1e-4 and 0 < found["back"] < 1e-5
    np.testing.assert_allclose(*found["norms"], rtol=1e-4)
    assert found["norms"][0] > 1

    # If each task has its own adapter, accuracy on a task changes only when the task is learned.
    before = found["before"]
    for name, matrix in found["matrices"].items():
        assert matrix[0] == before
        if name != "one adapter":
            assert all(matrix[row][task] == before[task] for task in range(3) for row in range(task + 1))
            assert all(matrix[row][task] == matrix[3][task] for task in range(3) for row in range(task + 1, 4))
            assert all(last > first for last, first in zip(matrix[3], before, strict=True))
    one, each, sparse = found["forgetting"].values()
    assert each == sparse == 0 < one
    one, each, sparse = found["rank"].values()
    assert len(each) == 2 * 3 and max(each + sparse) <= 2.001 < max(one) <= 4.001
    _, each, sparse = found["sparsity"].values()
    assert np.mean(sparse) > np.mean(each)
    assert all(len(values) == 2 * 3 for values in found["collisions"].values())
    assert set(found["summed"]) == set(list(found["matrices"])[1:])

    pulled = found["changed"]["0.5"]
    assert all(0 < few < many for few, many in zip(pulled, found["changed"]["0.0"], strict=True))
    for strength, tuned in found["tuned"].items():
        curves = found["by_density"][strength]
        assert [curve[0] for curve in curves] == tuned  # with all changes, it is the tuned network
        assert all(curve[-1] < curve[0] for curve in curves)
    assert found["untouched"] and all(len(values) == 3 for values in found["alone"].values())
    assert np.shape(found["overlap"]) == (2 * 3, 2) and np.min(found["overlap"]) > 0


CASES = {
    "01_continual_backprop": Case(
        sizes={
            "WIDTH": 8,
            "REPLACEMENT_RATE": 2e-3,
            "MATURITY": 20,
            "TASKS": 3,
            "WINDOW": 60,
            "GRID_RATES": (0.0, 1e-3, 5e-2),
            "GRID_SEEDS": 2,
            "GRID_TASKS": 4,
            "EXAMPLES_PER_TASK": 300,
        },
        read_back={
            "groups": "[group.name for group in units]",
            "steps": "len(age)",
            "replaced": "int(replaced.sum())",
            # In the step in which a unit is replaced, all of these must be 0.
            "newborn": "float(max(abs(history[name][replaced]).max() for name in ('age', 'utility', 'outgoing')))",
            "safe": "int(min(age[t - 1, u] + 1 for t, u in zip(step_at, unit_at)))",
            "reborn": "[float(history[name][t, unit]) for name in ('outgoing', 'incoming') for t in (step - 1, step)]",
            "left": "{name: [float(value) for value in values[1:]] for name, values in left.items()}",
            "same": "bool(same)",
            "counted": "grid['replaced_units'].sum((1, 2)).tolist()",
            "differ": "bool((grid['accuracy'][:, 0] != grid['accuracy'][:, 1]).any())",
            "loaded": "dict(results.sizes)",
            "labels": "results.method.values.tolist()",
        },
        check=check_continual_backprop,
        slow=True,
    ),
    "02_upgd": Case(
        sizes={
            "HIDDEN": (8, 6),
            "STEPS": 300,
            "MEASURED": 20,
            "REPLACEMENT_RATE": 0.02,
            "WINDOW": 20,
            "METHODS": ("cbp_upgd:replacement_rate=0.02",),
            "STREAM_TASKS": 3,
            "STREAM_EXAMPLES": 50,
            "STREAM_SEEDS": 2,
        },
        read_back={
            "first_loss": "float(first.mean())",
            "last_loss": "float(last.mean())",
            "lowest": "[float(np.nanmin(flat(gate))) for name, gate in gates.items() if 'local' not in name]",
            "gate_errors": "[float(np.nanmax(abs(gate * (1 + np.exp(scaled[scope])) - 1)))"
            " for scope, gate in measured.items()]",
            "quality": "quality",
            "reborn": "[float(incoming[step, unit]) for step in (t - 1, t)]",
            "labels": "results.method.values.tolist()",
            "dims": "dict(results.sizes)",
            "accuracy": "float(results.accuracy.min())",
        },
        check=check_upgd,
        slow=True,
    ),
    "03_any_network": Case(
        sizes={
            "WIDTHS": (4, 6),
            "SIZE": 8,
            "BATCH": 8,
            "REPLACEMENT_RATE": 0.05,
            "MATURITY": 3,
            "TASKS": 2,
            "SEEDS": 1,
            "CLASSES": 4,
            "EPOCHS": 1,
            "TRAIN_PER_CLASS": 10,
            "TEST_PER_CLASS": 5,
        },
        read_back={
            "resnet": "len(units)",
            "vit": "[group.kind for group in vit_units]",
            "drawn": "len(report.plot_units(units).axes[0].get_yticklabels())",
            "streams": "[group.name for group in streams]",
            "roles": "[role for role, _ in found]",
            "entries": "list(found.values())",
            "proof": "list(proof.values())",
            "dims": "dict(results.sizes)",
        },
        check=check_any_network,
        slow=True,  # compiles a dozen networks
    ),
    "04_slippery_ant": Case(
        sizes={
            "FRICTIONS": 3,
            "UPDATES": 2,
            "STEPS": 128,
            "INTERVAL": 64,
            "CHANGE_EVERY": 32,
            "EPISODE_LENGTH": 16,
            "SEEDS": 1,
            "ROLLOUT": {"num_envs": 4, "rollout_length": 8, "epochs": 2, "minibatches": 2},
            "CBP": "cbp_adam:step_size=3e-4,replacement_rate=1e-2,maturity_threshold=3",
        },
        read_back={
            "slid": "slid.tolist()",
            "law": "law.tolist()",
            "groups": "[group.name for group in units]",
            "shapes": "list(metrics['policy_loss'].shape)",
            "differ": "bool((states.params['params']['actor_0']['kernel'][0] !="
            " states.params['params']['actor_0']['kernel'][1]).any())",
            "steps": "len(poses.q)",
            "dims": "dict(results.sizes)",
            "replaced": "results.replaced_units.sum(('seed', 'task')).values.tolist()",
            "frictions": "len(np.unique(results.friction))",
        },
        check=check_slippery_ant,
        slow=True,  # five programs with Brax's physics, each of which takes long to compile
    ),
    "05_lottery_tickets": Case(
        sizes={
            "HIDDEN": (12, 8),
            "ITERATIONS": 300,
            "ROUNDS": 2,
            "SHOWN": (1, 2),
            "DRAWS": 2,
            "UNIT_FRACTION": 0.5,
            "SEEDS": 2,
            "EVALUATE_EVERY": 150,
        },
        read_back={
            "alive": "[[int(leaf.sum()) for leaf in jax.tree.leaves(each.mask) if leaf.ndim == 2] for each in rounds]",
            "nested": "bool(jax.tree.all(jax.tree.map(lambda new, old: (new <= old).all(), mask, rounds[0].mask)))",
            "rewound": "bool(jax.tree.all(rewound))",
            "still_dead": "float(abs(first_kernel(train(ticket.params, mask).params)[~first_kernel(mask)]).max())",
            "moved": "float(abs(first_kernel(rounds[1].trained) - first_kernel(rounds[0].params)).max())",
            "learned": "[float(each.measured) for each in rounds]",
            "controls": "{name: [[int(leaf.sum()) for leaf in jax.tree.leaves(each) if leaf.ndim == 2],"
            " bool((first_kernel(each) == first_kernel(mask)).all()),"
            " bool((first_kernel(weights) == np.where(first_kernel(each), first_kernel(first), 0)).all())]"
            " for name, draw in networks.items() for weights, each in [draw(keys[0])]}",
            "draws": "{name: len(each) for name, each in after.items()}",
            "paths": "{name: float(each) for name, each in paths.items()}",
            "masks": "{name: [leaf.astype(int).tolist() for leaf in jax.tree.leaves(each) if leaf.ndim == 2]"
            " for name, each in {'ticket': mask, **others}.items()}",
            "sizes": "sizes",
            "parameters": "count(cut)",
            "difference": "difference",
            "changed": "float(abs(small.apply(cut, x_test) - lenet.apply(dense, x_test)).max())",
            "steps": "list(step)",
            "dims": "dict(results.sizes)",
            "density": "density",
            "densities": "(100 * results.density.loc[{'method': 'ticket', 'seed': 0}]).values.tolist()",
        },
        check=check_lottery_tickets,
        slow=True,  # compiles four trainings and a round of the experiment
    ),
    "06_adapters": Case(
        sizes={
            "HIDDEN": (12, 8),
            "PRETRAINING": 300,
            "STEPS": 100,
            "RANK": 2,
            "L1": 3e-3,
            "DRAWS": 2,
            "STRENGTHS": (0.0, 0.5),
            "DENSITIES": (1.0, 0.2, 0.02),
            "DIMENSIONS": (64, 8),
        },
        read_back={
            "counts": "[count(params), count(adapter)]",
            "unchanged": "unchanged",
            "apart": "apart",
            "back": "back",
            "norms": "norms",
            "before": "[before[task] for task in TASKS]",
            "matrices": "{name: found.tolist() for name, found in matrices.items()}",
            "forgetting": "forgetting",
            **{
                name: f"{{name: [float(value) for value in values] for name, values in measured['{name}'].items()}}"
                for name in ("rank", "sparsity", "collisions")
            },
            "summed": "{name: values.tolist() for name, values in summed.items()}",
            "changed": "changed",
            "tuned": "{strength: [float(accuracy(each, *test[task])) for task, each in of_tasks.items()]"
            " for strength, of_tasks in tuned.items()}",
            "by_density": "{strength: values.tolist() for strength, values in by_density.items()}",
            "alone": "alone",
            "untouched": "untouched",
            "overlap": "list(overlap.values())",
        },
        check=check_adapters,
        slow=True,
    ),
    "07_questions": Case(
        sizes={
            "UTILITIES": ("contribution", "random"),
            "HIDDEN": (8,),
            "EXAMPLES": 100,
            "TASKS": 2,
            "WINDOW": 20,
            "SEEDS": 2,
            "RATE": 0.01,
            "STREAM_TASKS": 3,
        },
        read_back={
            "found": "found",
            "measured": "list(ranking.blend_spearman_late_1.shape)",
            "labels": "results.method.values.tolist()",
            "differ": "bool((results.accuracy[1] != results.accuracy[2]).any())",
            "less": "float(less.mean())",
            "low": "low",
            "high": "high",
        },
        check=check_questions,
        slow=True,
    ),
}


class ThisPython(AsyncKernelManager):
    """Install a kernel for the running interpreter, whatever kernels the user has."""

    @property
    def kernel_spec(self):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python", language="python")


def parameters_cell(notebook):
    (number,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    return number


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=[pytest.mark.slow] if path.stem in CASES and CASES[path.stem].slow else []
        )
        for path in NOTEBOOKS
    ],
)
def test_runs_at_a_tiny_size(path, tmp_path, monkeypatch):
    assert path.stem in CASES, "a notebook without a test: add its tiny size and a check of its values"
    case = CASES[path.stem]
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # at this size, most of the time is compilation
    notebook = nbformat.read(path, as_version=4)
    number = parameters_cell(notebook)
    defaults = {}
    exec(notebook.cells[number].source, defaults)
    assert case.sizes.keys() <= defaults.keys()  # otherwise a renamed parameter would silently keep its normal value
    sizes = "\n".join(f"{name} = {value!r}" for name, value in case.sizes.items())
    notebook.cells.insert(number + 1, nbformat.v4.new_code_cell(sizes))
    values = ", ".join(f"{name!r}: {expression}" for name, expression in case.read_back.items())
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{values}}}))"))
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()  # stops at the first error
    printed = "".join(output.text for output in notebook.cells[-1].outputs if output.get("name") == "stdout")
    case.check(json.loads(printed), tmp_path)


def test_notebooks_are_numbered():
    assert [path.stem[:3] for path in NOTEBOOKS] == [f"{i:02}_" for i in range(1, len(NOTEBOOKS) + 1)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_after_a_complete_run(path):
    """The file contains a run of all cells in order, without errors, and it is small."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [output.output_type for cell in code for output in cell.outputs]
    assert "error" not in kinds and "display_data" in kinds
    assert path.stat().st_size < 600_000
