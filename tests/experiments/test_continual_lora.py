import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keyword_tasks import write_tasks

import cbp_jax
from cbp_jax import lora
from cbp_jax.experiments import EXPERIMENTS, adapter_reports, adapters, continual_lora, text_reports, texts
from cbp_jax.experiments.adapter_changes import change_of_adapter, change_of_kernels, collisions, overlap_of_subspaces
from cbp_jax.experiments.adapter_methods import METHODS, AdapterMethod, read_methods
from cbp_jax.experiments.adapter_reports import scores
from cbp_jax.experiments.adapter_trials import Trials
from cbp_jax.experiments.adapters import Settings, check, orders_of

preset, run = continual_lora.preset, continual_lora.run

OF_KEYWORDS = {
    **{"seeds": 2, "orders": 1, "encoder": "none", "width": 16, "depth": 1, "vocabulary": 50, "length": 12},
    **{"steps": 90, "learning_rate": 0.02, "full_learning_rate": 0.005, "dropout_rate": 0.0, "rank": 2},
    **{"target_modules": ("layer*",), "collision_density": 0.1, "memory_texts": 30},
}
LANES = ("sequential", "per_task", "added", "o_lora:orthogonality=5.0", "replay")


@pytest.fixture(scope="module")
def keywords(tmp_path_factory, compiled_once):
    """Run on tasks that are learned quickly and contradict each other, unless each has its own head."""
    folder, calls = tmp_path_factory.mktemp("lora"), []
    settings = Settings(tasks=write_tasks(folder), methods=LANES, **OF_KEYWORDS)
    return settings, run(settings, folder / "run", lambda *args: calls.append(args)), folder / "run", calls


def test_the_experiment_is_listed():
    assert EXPERIMENTS["continual_lora"] is continual_lora


def test_results_and_progress(keywords):
    settings, results, out, calls = keywords
    assert results.identical(cbp_jax.load_results(out)) and results.attrs["encoder"] == "none"
    assert results.method.values.tolist()[:3] == ["sequential", "per_task", "added"]
    assert dict(results.accuracy.sizes) == {"method": 5, "order": 1, "seed": 2, "task": 3, "other": 3}
    assert results.sequence.values.tolist() == [["animals", "letters", "three"]]
    assert sum(call[1] for call in calls) == continual_lora.total(settings) == 30
    measured = np.isfinite(results.accuracy.values)
    np.testing.assert_array_equal(measured, np.broadcast_to(np.tri(3, dtype=bool), measured.shape))
    for name in ("overlap", "collisions"):
        there = np.isfinite(results[name].values)
        np.testing.assert_array_equal(there, np.broadcast_to(np.tri(3, k=-1, dtype=bool), there.shape))


def of_method(results, name, method):
    return results[name].loc[{"method": method}].transpose("order", "seed", ...).values[0]


def test_separate_adapters_forget_nothing_and_a_shared_one_forgets(keywords):
    _, results, _, _ = keywords
    accuracy = {method: of_method(results, "accuracy", method) for method in results.method.values.tolist()}
    alone = accuracy["per_task"]
    for task in range(3):
        assert (alone[:, task:, task] == alone[:, task : task + 1, task]).all()  # exactly, for every text
    assert np.diagonal(alone, axis1=1, axis2=2).mean() > 0.8
    forgetting = {method: float(scores(values)["forgetting"].mean()) for method, values in accuracy.items()}
    assert forgetting["per_task"] == 0 and forgetting["sequential"] > 0.1
    assert forgetting["replay"] < 0.5 * forgetting["sequential"]
    # All methods learn the first task the same way: the same draws, from the same initial values.
    first = np.stack([values[:, 0, 0] for values in accuracy.values()])
    np.testing.assert_allclose(first, np.broadcast_to(first[:1], first.shape), atol=0.05)


def test_the_penalty_of_o_lora_keeps_tasks_apart(keywords):
    _, results, _, _ = keywords
    overlap = lambda method: np.nanmean(of_method(results, "overlap", method))
    assert overlap("o_lora(orthogonality=5)") < 0.5 * overlap("added")
    assert overlap("sequential") > 2 * overlap("added")  # a single adapter keeps its input directions
    rank = of_method(results, "rank", "per_task")
    assert ((rank > 1) & (rank <= 2 + 1e-4)).all()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Make trials of one step, whose networks are inspected."""
    settings = Settings(
        tasks=write_tasks(tmp_path_factory.mktemp("tiny")),
        methods=("sequential",),
        **{**OF_KEYWORDS, "orders": 2, "seeds": 1, "steps": 2, "width": 8},
    )
    prepared = texts.prepare(settings)
    return settings, prepared, Trials(settings, prepared, orders_of(3, 2))


def test_which_classes_a_loss_covers(tiny):
    _, _, trials = tiny
    orders = trials.orders
    own, shared, joint = AdapterMethod(), AdapterMethod(head="shared"), AdapterMethod(head="shared", joint=True)
    assert trials._asked(own, 0, 2, 2).tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert trials._asked(shared, 0, 0, 1).tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert trials._asked(joint, 0, 0, 0).all()
    later = orders[1]
    np.testing.assert_array_equal(trials._asked(shared, 1, later[0], 0), trials.masks[later[0]])


@pytest.mark.parametrize(
    ("method", "position", "expected"),
    [
        (METHODS["sequential"], 2, {2: 16}),
        (METHODS["replay"], 0, {0: 16}),
        (METHODS["replay"], 2, {2: 8, 0: 4, 1: 4}),
        (METHODS["joint"], 0, {0: 6, 1: 5, 2: 5}),
        (AdapterMethod(replay=0.9), 2, {2: 2, 0: 7, 1: 7}),
    ],
)
def test_batches_come_from_the_expected_tasks(tiny, method, position, expected):
    _, prepared, trials = tiny
    batch = trials._train(method, 0, position)
    assert batch.tokens.shape == (2, 16, 12)
    for step in batch.labels:
        task_of = [next(n for n, task in enumerate(prepared.tasks) if label in task.classes) for label in step]
        assert {task: task_of.count(task) for task in set(task_of)} == expected
    asked = batch.classes[np.arange(2)[:, None], np.arange(16), batch.labels]
    assert asked.all() and (batch.classes.sum(-1) <= 3).all()  # with separate heads, each text has its task's classes


@pytest.mark.slow
def test_a_new_adapter_is_added_to_earlier_ones(tiny, monkeypatch):
    """With "added", a new adapter is trained on the sum of earlier ones; with "per_task", on the base network."""
    _, _, trials = tiny
    seen = {}
    for name in ("added", "per_task"):
        merged, whole = [], trials._merge
        monkeypatch.setattr(
            trials, "_merge", lambda *args, whole=whole, merged=merged: merged.append(args) or whole(*args)
        )
        list(trials.run(METHODS[name]))
        monkeypatch.undo()
        seen[name] = merged
    assert len(seen["added"]) == 3 and not seen["per_task"]
    (_, base, adapter), (_, later, _) = seen["added"][:2]
    take = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree[0])
    expected = lora.merge(take(base), take(adapter))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), take(later), expected)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(take(base)), jax.tree.leaves(take(later)), strict=True))


def test_the_memory_of_o_lora_is_the_concatenated_adapters(tiny):
    _, _, trials = tiny
    encoder = {"layer0_mlp1": {"kernel": jnp.zeros((8, 6))}}
    one, two = (trials._adapter(encoder, seed) for seed in range(2))
    wide = one.replace(factors=jax.tree.map(lambda a: a, one.factors))
    wide.factors["layer0_mlp1/kernel"]["lora_A"] = jnp.zeros((8, 6))
    for position, adapter in enumerate((one, two)):
        wide = trials._write(position, wide, adapter)
    new = trials._adapter(encoder, 2)
    np.testing.assert_allclose(lora.orthogonality(new, wide), lora.orthogonality(new, [one, two]), rtol=1e-5)


@pytest.mark.slow
def test_heads_have_the_same_learning_rate_whatever_is_trained(tiny):
    """At the learning rate of an encoder a new head would hardly move."""
    settings, prepared, trials = tiny
    slow = Trials(dataclasses.replace(settings, full_learning_rate=1e-30), prepared, trials.orders)
    fit = slow._make_fit(slow._form(METHODS["full"]))
    numbers = slow._share({"l1": jnp.float32(0), "orthogonality": jnp.float32(0)})
    base, head = (tuple(chunk[part] for chunk in slow.begin) for part in ("encoder", "head"))
    train = slow.lanes.scatter(slow._stacked(lambda lane: slow._train(METHODS["full"], lane, 0)))
    (body, new_head, _), *_ = fit(numbers, slow.seeds, base, head, base, slow.seeds, train)
    chex.assert_trees_all_close(body, base[0], atol=1e-20)
    assert np.abs(new_head["kernel"] - head[0]["kernel"]).max() > 0.01


def random_adapter(seed, rank=2):
    rng = np.random.default_rng(seed)
    params = {"a": jnp.zeros((7, 5)), "query": {"kernel": jnp.zeros((6, 2, 3))}}
    adapter = lora.init(params, seed, rank=rank, alpha=3)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), adapter)


def numpy_rank(matrix):
    values = np.linalg.svd(matrix, compute_uv=False)
    p = values[values > 1e-6 * values.max()]
    p = p / p.sum()
    return np.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize("before", [None, 5])
def test_the_change_by_an_adapter_is_the_product_of_its_matrices(before):
    after = random_adapter(0)
    earlier = None if before is None else random_adapter(before)
    change = change_of_adapter(after, earlier, 0.1)
    dense = {}
    for path, shape in (("a", (7, 5)), ("query/kernel", (6, 6))):
        delta = lambda one, path=path: np.asarray(cbp_jax.units.leaves_by_path(lora.delta(one))[path], np.float64)
        dense[path] = (delta(after) - (0 if earlier is None else delta(earlier))).reshape(shape)
    assert change.rank == pytest.approx(np.mean([numpy_rank(matrix) for matrix in dense.values()]), rel=1e-3)
    small = np.concatenate([(np.abs(m) <= 0.01 * np.abs(m).max()).ravel() for m in dense.values()])
    assert change.sparsity == pytest.approx(small.mean(), abs=1 / 71)
    largest = np.sort(np.concatenate([np.abs(m).ravel() for m in dense.values()]))[::-1]
    for path, matrix in dense.items():
        np.testing.assert_array_equal(change.ticket[path], np.abs(matrix) > (largest[6] + largest[7]) / 2)
        basis = change.reads[path]
        np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-5)
        left = np.linalg.svd(matrix)[0][:, :2]
        np.testing.assert_allclose(np.square(left.T @ basis).sum(), 2, atol=1e-4)
    # The same as for kernels with this change.
    zeros = {path: np.zeros_like(matrix) for path, matrix in dense.items()}
    same = change_of_kernels(dense, zeros, {path: m.shape for path, m in dense.items()}, 2, 0.1)
    assert same.sparsity == pytest.approx(change.sparsity, abs=1 / 71)
    assert overlap_of_subspaces(change, same) == pytest.approx(1, abs=1e-4)
    np.testing.assert_array_equal(same.ticket["a"], change.ticket["a"])


def test_two_changes():
    one, other = (change_of_adapter(random_adapter(seed), None, 0.2) for seed in (0, 1))
    assert collisions(one, one) == pytest.approx(14 / sum(m.sum() ** 2 / m.size for m in one.ticket.values()))
    assert 0 < overlap_of_subspaces(one, other) < 1
    np.testing.assert_allclose(overlap_of_subspaces(one, other), overlap_of_subspaces(other, one), rtol=1e-5)
    nothing = change_of_adapter(jax.tree.map(np.zeros_like, random_adapter(0)), None, 0.2)
    assert (nothing.rank, nothing.sparsity) == (0.0, 1.0)


def test_a_change_that_is_not_finite_is_not_measured():
    one, lost = random_adapter(0), random_adapter(1)
    lost.factors["a"]["lora_A"][0, 0] = np.inf
    healthy, changes = change_of_adapter(one, None, 0.2), [change_of_adapter(lost, one, 0.2)]
    shapes, kernels = {"a": (7, 5)}, {"a": np.ones((7, 5))}
    changes.append(change_of_kernels({"a": np.full((7, 5), np.nan)}, kernels, shapes, 2, 0.2))
    for change in changes:
        assert np.isnan([change.rank, change.sparsity]).all()
        for measure in (overlap_of_subspaces, collisions):
            assert np.isnan([measure(change, healthy), measure(healthy, change), measure(change, change)]).all()


def test_a_diverging_lane_is_reported_changes_no_other_and_its_seed_is_left_out(keywords, tmp_path, monkeypatch):
    settings, whole, _, _ = keywords

    class Poisoned(Trials):
        def __init__(self, *args):
            super().__init__(*args)
            begin = self.lanes.gather(self.begin)
            begin["head"]["kernel"] = np.where(np.arange(2)[:, None, None] == 1, np.nan, begin["head"]["kernel"])
            self.begin = self.lanes.scatter(begin)

    monkeypatch.setattr(adapters, "Trials", Poisoned)
    few, means = dataclasses.replace(settings, methods=("sequential",)), []
    with pytest.warns(RuntimeWarning, match="diverged") as heard:
        results = run(few, tmp_path, lambda label, lanes, shown: means.append(shown["accuracy"]))
    messages = [str(warning.message).partition(":")[0] for warning in heard]
    assert messages == ["sequential diverged with seed 1 in task 1"]
    assert results.identical(cbp_jax.load_results(tmp_path))
    np.testing.assert_array_equal(results.diverged, [[np.nan, 0]])
    assert results.loss.loc[{"seed": 1}].isnull().all() and results["rank"].loc[{"seed": 1}].isnull().all()
    for name in results.data_vars:
        np.testing.assert_array_equal(
            of_method(results, name, "sequential")[0], of_method(whole, name, "sequential")[0]
        )
    np.testing.assert_allclose(means, np.nanmean(of_method(results, "accuracy", "sequential")[0], -1), rtol=1e-6)

    left = results.isel(seed=[0])
    line = "sequential: 1 of 2 seeds diverged and are left out for all methods (seed 1 in task 1)"
    assert continual_lora.summary(results) == f"{continual_lora.summary(left)}\n\n{line}"
    drawn = []
    monkeypatch.setattr(adapter_reports, "heat_maps", lambda panels, *args, **_: drawn.append((panels, args[2])))
    for shown in (results, left):
        continual_lora.plot(shown, tmp_path)
    np.testing.assert_array_equal(drawn[0][0]["One adapter"], drawn[1][0]["One adapter"])
    assert drawn[0][1].endswith("; 1 of 2 seeds left out, because a method diverged")
    # Its loss is not finite, but it is finished.
    monkeypatch.setattr(adapters, "Trials", None)
    assert run(few, tmp_path).identical(results)


def test_scores():
    accuracy = np.array([[0.9, np.nan, np.nan], [0.5, 0.8, np.nan], [0.6, 0.7, 0.9]])
    found = scores(accuracy, np.array([0.9, 0.9, 0.8]))
    assert found["average"] == pytest.approx(2.2 / 3) and found["forgetting"] == pytest.approx((0.3 + 0.1) / 2)
    assert found["transfer"] == pytest.approx((-0.1 + 0.1) / 2)
    assert scores(np.array([[0.5, np.nan], [0.6, 0.8]]))["forgetting"] == pytest.approx(-0.1)  # it became better
    assert np.isnan(scores(np.array([[0.9]]))["forgetting"]) and np.isnan(scores(accuracy)["transfer"])


def test_methods():
    methods = read_methods(["o_lora:head=shared,form=squared", "added_l1(l1=0.1)", "full"])
    assert methods["o_lora(head=shared, form=squared)"] == AdapterMethod(
        "added", head="shared", orthogonality=0.5, form="squared"
    )
    assert methods["added_l1(l1=0.1)"] == AdapterMethod("added", l1=0.1) and methods["full"].adapters == "none"
    assert set(read_methods(list(METHODS)).values()) == set(METHODS.values())


@pytest.mark.parametrize("name", ["laptop", "paper"])
def test_presets_compare_methods_with_own_and_with_shared_heads(name):
    methods = read_methods(preset(name).methods)
    shared = {label.partition("(")[0] for label, method in methods.items() if method.head == "shared"}
    assert shared == {"sequential", "per_task", "per_task_l1", "o_lora", "full", "replay", "joint"} and set(
        METHODS
    ) <= set(methods)


def test_transfer_is_relative_to_a_task_alone_with_the_same_head(keywords):
    """Of two "per_task", the one whose head is that of the method is compared with."""
    _, results, _, _ = keywords
    labels = ["sequential", "per_task", "sequential(head=shared)", "per_task(head=shared)"]
    four = results.isel(method=[0, 1, 0, 1]).assign_coords(method=labels)
    four["accuracy"] = four.accuracy + np.array([0.0, 0.1, 0.0, 0.3])[:, None, None, None, None]
    rows = {line.split()[0]: line for line in continual_lora.summary(four).splitlines()[3:]}
    transfer = lambda row: float(row.split("±")[2].split()[1])
    difference = transfer(rows["sequential"]) - transfer(rows["sequential(head=shared)"])
    assert difference == pytest.approx(20, abs=0.11)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "methods must be one or more, got none"),
        (["lora"], "methods must be of .*'sequential', .* got 'lora'"),
        (["full", "full"], "methods must all be different, got 'full' twice"),
        (["full:speed=1"], "method 'full:speed=1' has the settings"),
        (["full:head=two"], r"head must be one of \('own', 'shared'\), got 'two'"),
        (["sequential:orthogonality=0.5"], "orthogonality needs an adapter for each task, got adapters='one'"),
        (["full:l1=0.5"], "l1 penalizes the change by an adapter"),
        (["replay:replay=1.0"], "replay must be below 1, got 1.0"),
        (["added:l1=true"], "l1 must be a number of at least 0, got True"),
    ],
)
def test_bad_methods(texts, message):
    with pytest.raises(ValueError, match=message):
        read_methods(texts)


def test_orders():
    orders = orders_of(4, 10)
    assert orders[0].tolist() == [0, 1, 2, 3] and len({tuple(order) for order in orders.tolist()}) == 10
    np.testing.assert_array_equal(orders_of(4, 3), orders[:3])
    assert (np.sort(orders, 1) == np.arange(4)).all()
    assert len(orders_of(3, 100)) == 6 and orders_of(1, 3).tolist() == [[0]]


def test_table_and_picture(keywords, tmp_path):
    _, results, _, _ = keywords
    lines = continual_lora.summary(results).splitlines()
    assert lines[0].startswith("continual_lora, encoder none: means over 2 sequences of 3 tasks")
    row = next(line for line in lines if line.startswith("per_task "))
    assert row.split()[4:7] == ["0.0", "±", "0.0"]  # forgetting
    assert sum(line.startswith(tuple("spaor")) for line in lines[4:]) == 5
    (path,) = continual_lora.plot(results, tmp_path)
    assert path.name == "continual_lora.png" and path.stat().st_size > 1000


def test_titles_of_the_picture_fit_their_panels(keywords, tmp_path, monkeypatch):
    _, results, _, _ = keywords
    labels = [f"{name}(head=shared)" for name in ("sequential", "per_task", "o_lora", "joint")]
    labels.insert(1, "per_task_l1(l1=0.0001, head=shared)")
    figures = []
    monkeypatch.setattr(text_reports, "save_figures", lambda drawn, *_: figures.extend(drawn.values()) or [])
    continual_lora.plot(results.assign_coords(method=labels), tmp_path)
    (figure,) = figures
    figure.draw_without_rendering()
    boxes = [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
    titles = [" ".join(ax.get_title().split()) for ax in figure.axes if ax.get_title()]
    assert titles[:3] == ["One adapter, one head", "One per task, L1 of 1e-4, one head", "One per task, one head"]
    assert len(boxes) == 5 and boxes[0].x1 < boxes[1].x0 and boxes[1].x1 < boxes[2].x0  # the first row


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_the_unfinished_methods(keywords, tmp_path, monkeypatch):
    settings, whole, _, _ = keywords
    labels, asked = dict(zip(read_methods(LANES).values(), whole.method.values.tolist(), strict=True)), []

    class Replayed:
        def __init__(self, settings, prepared, orders):
            pass

        def run(self, method):
            asked.append(labels[method])
            for task in range(3):
                if labels[method] == "added" and task == 1 and asked.count("added") == 1:
                    raise KeyboardInterrupt
                where = {"method": labels[method], "task": task}
                counts = {"accuracy": task + 1, "overlap": task, "collisions": task}
                yield {
                    name: whole[name].loc[where].values[..., : counts[name]]
                    if name in counts
                    else whole[name].loc[where].values
                    for name in ("loss", "rank", "sparsity", *counts)
                }

    monkeypatch.setattr(adapters, "Trials", Replayed)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path)
    partial = cbp_jax.load_results(tmp_path)
    assert np.isfinite(partial.loss).sum() == 2 * 7
    assert continual_lora.summary(partial) and continual_lora.plot(partial, tmp_path / "pictures")
    results = run(settings, tmp_path)
    assert asked[:4] == ["sequential", "per_task", "added", "added"] and results.equals(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("lora",)}, "methods must be of"),
        ({"orders": 0}, "orders must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive, got 0"),
        ({"collision_density": 0.0}, r"collision_density must be in \(0, 1\], got 0.0"),
        ({"target_modules": ()}, "target_modules must be one pattern or more, got none"),
        ({"batch_size": 1}, "method 'joint': batch_size must be at least the number of tasks, 2"),
        ({"seeds": 99_999_999_999}, "seeds=199999999998 with 16 methods make results of"),
    ],
)
def test_bad_settings(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(Settings(), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_presets():
    for name in ("smoke", "laptop", "paper"):
        assert check(preset(name))
    assert preset("smoke").encoder == "none"  # also where a pre-trained one is installed
