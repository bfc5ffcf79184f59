import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keyword_tasks import write_tasks

import cbp_jax
from cbp_jax.experiments import EXPERIMENTS, dominance, dominant_tickets, text_reports, texts
from cbp_jax.experiments.dominance import Settings, check
from cbp_jax.experiments.ticket_trials import Trials
from cbp_jax.tickets import dominant_ticket

preset, run = dominant_tickets.preset, dominant_tickets.run

OF_KEYWORDS = {
    **{"seeds": 2, "encoder": "none", "width": 16, "depth": 1, "vocabulary": 50, "length": 12, "steps": 60},
    **{"learning_rate": 0.005, "dropout_rate": 0.0, "strengths": (0.0, 0.5), "densities": (1.0, 0.2, 1e-6)},
    **{"dimensions": (10_000, 1), "compared": 0.1, "retrained": (1.0,)},
}


@pytest.fixture(scope="module")
def keywords(tmp_path_factory, compiled_once):
    """Run on tasks that are learned quickly. Return settings, results, their folder, and the reported progress."""
    folder, calls = tmp_path_factory.mktemp("tickets"), []
    settings = Settings(tasks=write_tasks(folder, ("animals", "letters")), **OF_KEYWORDS)
    return settings, run(settings, folder / "run", lambda *args: calls.append(args)), folder / "run", calls


def test_the_experiment_is_listed():
    assert EXPERIMENTS["dominant_tickets"] is dominant_tickets


def test_results_and_progress(keywords):
    settings, results, out, calls = keywords
    assert results.identical(cbp_jax.load_results(out)) and results.attrs["encoder"] == "none"
    assert results.method.values.tolist() == ["probe", "l1=0", "l1=0.5"]
    assert results.name.values.tolist() == results.other.values.tolist() == ["animals", "letters"]
    assert dict(results.ticket_accuracy.sizes) == {"method": 3, "seed": 2, "task": 2, "density": 3}
    assert sum(call[1] for call in calls) == dominant_tickets.total(settings) == 12
    assert [call[0] for call in calls] == ["probe"] * 2 + ["l1=0"] * 2 + ["l1=0.5"] * 2
    assert json.loads(results.attrs["settings"])["compared"] == 0.1


def test_keeping_all_changes_gives_the_tuned_network_and_keeping_none_does_worse(keywords):
    _, results, _, _ = keywords
    assert np.isfinite(results.accuracy).all() and results.accuracy.loc[{"method": "l1=0"}].min() > 0.9
    for method in ("l1=0", "l1=0.5"):
        of = lambda name, method=method: results[name].loc[{"method": method}]
        # With all changes, or all dimensions, it is the tuned network.
        np.testing.assert_array_equal(of("ticket_accuracy").sel(density=1.0), of("accuracy"))
        np.testing.assert_allclose(of("dimension_accuracy").sel(dimensions=10_000), of("accuracy"), atol=0.1)
        assert of("dimension_density").sel(dimensions=1).max() < of("dimension_density").sel(dimensions=10_000).min()
        # Training all weights from the start without a penalty gives the fine-tuned network again.
        assert np.isfinite(of("retrained_accuracy").sel(density=1.0)).all()
        assert np.isnan(of("retrained_accuracy").sel(density=0.2)).all()
    plain = {"method": "l1=0"}
    np.testing.assert_allclose(
        results.retrained_accuracy.loc[plain].sel(density=1.0), results.accuracy.loc[plain], atol=1e-6
    )
    # With almost no changes, and a head that was tuned for others, accuracy is far lower.
    assert results.ticket_accuracy.loc[plain].sel(density=1e-6).mean() < results.accuracy.loc[plain].mean() - 0.05


def test_the_l1_pull_changes_fewer_weights(keywords):
    _, results, _, _ = keywords
    changed = {method: float(results.changed.loc[{"method": method}].mean()) for method in ("l1=0", "l1=0.5")}
    assert changed["l1=0.5"] < changed["l1=0"] < 1


def test_overlaps_compare_the_two_tasks(keywords):
    _, results, _, _ = keywords
    shared = results.shared.loc[{"method": "l1=0"}].transpose("task", "other", "seed").values
    assert np.isnan(shared[[0, 1], [0, 1]]).all()
    np.testing.assert_array_equal(shared[0, 1], shared[1, 0])
    for name in ("by_size", "by_marginals"):
        chance = results[name].loc[{"method": "l1=0"}].transpose("task", "other", "seed").values[0, 1]
        assert (chance > 0).all()
        assert (shared[0, 1] > chance).all() if name == "by_size" else True
    jaccard = results.jaccard.loc[{"method": "l1=0"}].transpose("task", "other", "seed").values[0, 1]
    assert ((jaccard > 0) & (jaccard < 1)).all()


@pytest.mark.slow
def test_measures_belong_to_their_seed(keywords, monkeypatch):
    """The measures of one seed and the second task are computed again from the networks."""
    settings, results, _, _ = keywords
    prepared = texts.prepare(settings)
    trials = Trials(dataclasses.replace(settings, retrained=()), prepared)
    captured = []
    whole = trials._of_tickets
    monkeypatch.setattr(trials, "_of_tickets", lambda *args: captured.append(args) or whole(*args))
    list(trials.run(0.0))
    start, tuned, _ = captured[3]  # two seeds of the first task come first, then two of the second
    where = {"method": "l1=0", "seed": 1, "task": 1}
    ticket = dominant_ticket(start["encoder"], tuned["encoder"], threshold=0.0)
    assert float(results.changed.loc[where]) == pytest.approx(ticket.density)
    task = prepared.tasks[1]
    kept = jax.tree.map(jnp.where, dominant_ticket(start["encoder"], tuned["encoder"], keep=0.2).mask,
                        tuned["encoder"], start["encoder"])  # fmt: skip
    logits = np.array(prepared.net.apply({"params": {"encoder": kept, "head": tuned["head"]}}, task.test.tokens))
    accuracy = (logits[:, 2:].argmax(1) == task.test.labels).mean()
    assert float(results.ticket_accuracy.loc[where].sel(density=0.2)) == pytest.approx(accuracy)


@pytest.mark.slow
def test_a_diverging_lane_is_reported_changes_no_other_and_its_seed_is_left_out(keywords, tmp_path, monkeypatch):
    settings, whole, _, _ = keywords

    class Poisoned(Trials):
        def __init__(self, *args):
            super().__init__(*args)
            initial = self.lanes.gather(self.initial)
            initial["head"]["kernel"] = np.where(np.arange(2)[:, None, None] == 1, np.nan, initial["head"]["kernel"])
            self.initial = self.lanes.scatter(initial)

        def run(self, strength):
            yield from super().run(strength) if strength is not None else Trials(self.settings, self.prepared).run(None)

    monkeypatch.setattr(dominance, "Trials", Poisoned)
    few, means = dataclasses.replace(settings, strengths=(0.0,)), []
    with pytest.warns(RuntimeWarning, match="diverged") as heard:
        results = run(few, tmp_path, lambda label, lanes, shown: means.append(shown))
    assert [str(warning.message).partition(":")[0] for warning in heard] == ["l1=0 diverged with seed 1 in task 1"]
    assert results.identical(cbp_jax.load_results(tmp_path))
    np.testing.assert_array_equal(results.diverged, [[np.nan, np.nan], [np.nan, 0]])
    of = lambda results, name: results[name].loc[{"method": "l1=0"}].transpose("seed", ...).values
    for name in results.data_vars:
        np.testing.assert_array_equal(of(results, name)[0], of(whole, name)[0], err_msg=name)
        assert name == "accuracy" or np.isnan(of(results, name)[1]).all(), name
    for task, shown in enumerate(means[2:]):
        assert shown == {name: pytest.approx(float(of(whole, name)[0, task])) for name in dominance.MEASURES}

    table, left = dominant_tickets.summary(results), results.isel(seed=[0])
    line = "l1=0: 1 of 2 seeds diverged and are left out for all methods (seed 1 in task 1)"
    assert table == f"{dominant_tickets.summary(left)}\n\n{line}"
    assert dominant_tickets.plot(results.isel(seed=[1]), tmp_path)  # of which no ticket has a finite value
    figures = []
    monkeypatch.setattr(text_reports, "save_figures", lambda drawn, *_: figures.extend(drawn.values()) or [])
    for shown in (results, left):
        dominant_tickets.plot(shown, tmp_path)
    curves = [[line.get_ydata() for ax in figure.axes for line in ax.lines] for figure in figures[::2]]
    for drawn, expected in zip(*curves, strict=True):
        np.testing.assert_array_equal(drawn, expected)
    assert all("1 of 2 seeds left out" in " ".join(figure.get_supxlabel().split()) for figure in figures[:2])


def test_the_least_density_that_suffices():
    dims, seeds = ("method", "seed", "task"), 2
    accuracy = np.array([[[0.5, 0.5, 0.5]] * seeds, [[0.9, 0.4, 0.9]] * seeds])
    kept = np.full((2, seeds, 3, 3), np.nan)
    kept[1, :, 0], kept[1, :, 1], kept[1, :, 2] = [0.897, 0.9, 0.6], [0.9, 0.9, 0.9], [0.7, 0.9, 0.9]
    import xarray as xr

    results = xr.Dataset(
        {"accuracy": (dims, accuracy), "ticket_accuracy": ((*dims, "density"), kept)},
        coords={"method": ["probe", "l1=0"], "strength": ("method", [np.nan, 0.0]), "density": [0.1, 0.5, 0.01]},
    )
    # Task 1: all densities down to 0.1 suffice. Task 2: nothing was learned. Task 3: only 0.5 suffices.
    found = text_reports.least(results, "l1=0", "ticket_accuracy", "density")
    np.testing.assert_array_equal(found, [0.1, np.nan, 0.5])


def test_table_and_pictures(keywords, tmp_path):
    _, results, _, _ = keywords
    table = dominant_tickets.summary(results)
    assert table.startswith("dominant_tickets, encoder none: means over seeds")
    lines = table.splitlines()
    accuracy = 100 * results.accuracy.loc[{"method": "l1=0", "task": 0}].values
    row, _ = [line for line in lines if line.startswith("l1=0 ") and "animals" in line and "," not in line]
    assert text_reports.interval(accuracy) in row
    assert sum("animals, letters" in line for line in lines) == 2
    start = next(number for number, line in enumerate(lines) if "trained alone" in line)
    rows = {tuple(line.split()[:3]): line for line in lines[start + 2 : start + 6]}
    assert len(rows) == 4  # two strengths and two tasks, all weights
    for name in ("ticket_accuracy", "retrained_accuracy"):
        found = results[name].loc[{"method": "l1=0.5", "task": 1}].sel(density=1.0)
        assert text_reports.interval(100 * found.values) in rows["l1=0.5", "letters", "100"]
    without = results.assign(retrained_accuracy=np.nan * results.retrained_accuracy)
    assert "trained alone" in table and "alone" not in dominant_tickets.summary(without)
    paths = dominant_tickets.plot(results, tmp_path, ("png", "pdf"))
    assert [path.name for path in paths] == [
        f"dominant_tickets{part}.{kind}" for part in ("", "_overlap") for kind in ("png", "pdf")
    ]
    assert all(path.stat().st_size > 1000 for path in paths)


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_the_unfinished_methods(keywords, tmp_path, monkeypatch):
    settings, whole, _, _ = keywords
    asked, rows = [], {}
    for number, method in enumerate(whole.method.values.tolist()):
        rows[None if number == 0 else settings.strengths[number - 1]] = method

    class Replayed:
        def __init__(self, settings, prepared):
            pass

        def run(self, strength):
            method = rows[strength]
            asked.append(method)
            for task in range(2):
                if method == "l1=0.5" and task == 1 and asked.count(method) == 1:
                    raise KeyboardInterrupt
                of = lambda name, method=method, task=task: whole[name].loc[{"method": method, "task": task}]
                found = {name: of(name).transpose("seed", ...).values for name in whole.data_vars}
                for name, (dim, _) in dominance.TICKET_MEASURES.items():
                    if dim == "other":
                        found[name] = found[name][:, :task]
                yield found

    monkeypatch.setattr(dominance, "Trials", Replayed)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path)
    assert np.isfinite(cbp_jax.load_results(tmp_path).accuracy).sum() == 10
    assert "-" in dominant_tickets.summary(cbp_jax.load_results(tmp_path))
    assert dominant_tickets.plot(cbp_jax.load_results(tmp_path), tmp_path / "pictures")
    calls = []
    results = run(settings, tmp_path, lambda *args: calls.append(args))
    assert asked == ["probe", "l1=0", "l1=0.5", "l1=0.5"] and sum(call[1] for call in calls) == 12
    assert results.equals(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths": ()}, "strengths must be at least one and all different"),
        ({"strengths": (0.1, 0.1)}, "strengths must be at least one and all different"),
        ({"strengths": (-0.1,)}, "strengths must be finite and not negative, got -0.1"),
        ({"densities": (0.0, 1.0)}, r"densities must be in \(0, 1\]"),
        ({"retrained": (0.77,)}, r"retrained must be some of the densities .* got \(0.77,\)"),
        ({"dimensions": (0,)}, "dimensions must be at least 1"),
        ({"compared": 0.0}, r"compared must be in \(0, 1\], got 0.0"),
        ({"axis": "diagonal"}, "axis must be 'row', 'column' or 'both', got 'diagonal'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"seeds": 99_999_999_999}, "seeds=99999999999 with 4 methods make results of"),
    ],
)
def test_bad_settings(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(Settings(), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_presets():
    for name in ("smoke", "laptop", "paper"):
        assert check(preset(name))[0] == "probe"
    assert preset("smoke").encoder == "none"  # also where a pre-trained one is installed
    assert preset("paper").encoder == "roberta-large" and len(preset("paper").tasks) == 7
