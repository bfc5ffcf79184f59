import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax import cli, experiments, report, tickets
from cbp_jax.experiments import convolutional_tickets, lottery, lottery_tickets, ticket_rounds
from cbp_jax.experiments.lottery import CURVES, MEASURES, Settings, check, total
from cbp_jax.experiments.ticket_rounds import KINDS
from cbp_jax.report import tickets as report_tickets
from cbp_jax.units import leaves_by_path

preset, run = lottery_tickets.preset, lottery_tickets.run
SMOKE = preset("smoke")
DENSITIES = [1.0]
ALIVE = [64 * 20, 20 * 10, 10 * 10]
for _ in range(2):
    ALIVE = [n - round(rate * n) for n, rate in zip(ALIVE, (0.2, 0.2, 0.1), strict=True)]
    DENSITIES.append(sum(ALIVE) / (64 * 20 + 20 * 10 + 10 * 10))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, compiled_once):
    out, calls = tmp_path_factory.mktemp("runs") / "smoke", []
    return run(SMOKE, out, lambda *args: calls.append(args)), out, calls


def test_a_run_from_end_to_end(smoke):
    results, out, calls = smoke
    assert results.identical(cbp_jax.load_results(out)) and results.attrs["experiment"] == "lottery_tickets"
    assert dict(results.sizes) == {"method": 6, "seed": 2, "task": 3, "evaluation": 3}
    assert set(results.data_vars) == {*MEASURES, *CURVES} and results.iteration.values.tolist() == [0, 20, 40]
    assert sum(call[1] for call in calls) == total(SMOKE) and {call[0] for call in calls} == {", ".join(KINDS)}
    for name in MEASURES:
        assert np.isfinite(results[name]).all(), name
    np.testing.assert_allclose(results.density, np.broadcast_to(DENSITIES, (6, 2, 3)), rtol=1e-6)
    assert sorted(path.name for path in out.iterdir()) == ["results.nc"]


def test_measures_agree_with_the_curves(smoke):
    results, _, _ = smoke
    accuracy, losses = results.test_accuracy_at.values, results.validation_loss_at.values
    late = results.method.values.tolist().index("late_rewinding")
    began = np.isfinite(losses)
    assert not began[late, :, 1:, 0].any() and began[late, :, 0].all() and np.delete(began, late, 0).all()
    assert (np.isfinite(accuracy) == began).all()
    stop = np.nanargmin(losses, -1)
    np.testing.assert_array_equal(results.stop_iteration, 20 * stop)
    take = lambda curve: np.take_along_axis(curve, stop[..., None], -1)[..., 0]
    np.testing.assert_array_equal(results.stop_test_accuracy, take(accuracy))
    np.testing.assert_array_equal(results.stop_validation_loss, take(losses))
    np.testing.assert_array_equal(results.test_accuracy, accuracy[..., -1])


def test_kinds_of_tickets_share_the_dense_network_and_one_shot_also_the_first_ticket(smoke):
    results, _, _ = smoke
    at = lambda kind: results.validation_loss_at.loc[{"method": kind}].values
    for kind in ("late_rewinding", "one_shot", "random"):
        np.testing.assert_array_equal(at(kind)[:, 0], at("ticket")[:, 0])
    np.testing.assert_array_equal(at("one_shot")[:, 1], at("ticket")[:, 1])
    assert (at("one_shot")[:, 2] != at("ticket")[:, 2]).all()
    for kind in ("reinitialized", "signs"):
        assert (at(kind)[:, 0] != at("ticket")[:, 0]).all()
    assert (at("random")[:, 1] != at("ticket")[:, 1]).all()
    assert len(np.unique(at("ticket")[:, 0, 0])) == 2  # seeds differ


@functools.cache
def prepared(experiment):
    """Return the plan and the examples of an experiment's smoke run, without running it."""
    plans = []

    def run_lanes(start, go_on, data, *args, **kwargs):
        plans.append((go_on.args[0], data))
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lottery.training, "run_lanes", run_lanes)
        patch.setattr(lottery.folder, "opened", lambda results, out: _Nothing(results))
        patch.setattr(report, "save_results", lambda results, out: None)
        experiment.prepare(experiment.preset("smoke"))("nowhere")
    (found,) = plans
    return found


def rounds_of_a_lane(count=3):
    """Return the states of one seed before each round, its plan and its examples."""
    plan, data = prepared(lottery_tickets)
    states = [jax.jit(functools.partial(ticket_rounds.start, plan))(1)]
    go_on = jax.jit(functools.partial(ticket_rounds.go_on, plan))
    for _ in range(count):
        states.append(go_on(data, states[-1])[0])
    return states, plan, data


class _Nothing:
    def __init__(self, results):
        self.results = results

    def __enter__(self):
        return self.results

    def __exit__(self, *exception):
        return None


def at(tree, kind):
    return {path: leaf[list(KINDS).index(kind)] for path, leaf in leaves_by_path(tree).items()}


@pytest.mark.slow
def test_masks_nest_and_weights_are_rewound_to_the_last_bit():
    states, plan, data = rounds_of_a_lane()
    first = at(states[0].starts, "ticket")
    kernels = [path for path, leaf in first.items() if leaf.ndim == 2]
    assert len(kernels) == 3
    for before, after in itertools.pairwise(states):
        for kind in ("ticket", "late_rewinding"):
            old, new = at(before.masks, kind), at(after.masks, kind)
            assert all((new[path] <= old[path]).all() for path in new)
            assert all(new[path].all() for path in new if path not in kernels)
        ticket = at(after.masks, "ticket")
        for kind in ("reinitialized", "signs"):
            assert all((at(after.masks, kind)[path] == ticket[path]).all() for path in ticket)
        for kind in ("one_shot", "random", "late_rewinding"):
            assert all(at(after.masks, kind)[path].sum() == ticket[path].sum() for path in ticket)
        random = at(after.masks, "random")
        assert any((random[path] != ticket[path]).any() for path in ticket)
        for kind in ("ticket", "one_shot", "random"):
            assert all((at(after.starts, kind)[path] == first[path]).all() for path in first)
        fresh = at(after.starts, "reinitialized"), at(before.starts, "reinitialized")
        assert all((fresh[0][path] != fresh[1][path]).all() for path in kernels)
    signs = at(states[-1].starts, "signs")
    for path in kernels:
        np.testing.assert_allclose(signs[path], np.sign(first[path]) * np.std(first[path]), rtol=1e-5)
    # Late rewinding returns to the weights of the dense network after so many iterations.
    shorter = plan._replace(iterations=plan.rewind_step, evaluate_every=plan.rewind_step, kinds=("ticket",))
    keys = ticket_rounds.stream_keys(states[0].key)
    order = ticket_rounds.passes(jax.random.fold_in(keys.problem, 0), len(data.train[1]), 40 * plan.batch_size)
    params = jax.tree.map(lambda leaf: leaf[0], (states[0].starts, states[0].masks))
    at_step = jax.jit(lambda w, m: ticket_rounds._train(shorter, data, order, keys, w, m, 0)[0])(*params)
    for state in states[1:]:
        for path, leaf in leaves_by_path(at_step).items():
            np.testing.assert_allclose(at(state.starts, "late_rewinding")[path], leaf, rtol=1e-5, atol=1e-7)
    late = [at(state.starts, "late_rewinding") for state in states[1:]]
    assert all((late[0][path] == late[2][path]).all() for path in late[0])


@pytest.mark.parametrize("experiment", [lottery_tickets, convolutional_tickets], ids=lambda found: found.name)
def test_weights_are_initialized_as_glorot_and_bengio_did_and_biases_with_0(experiment):
    plan, _ = prepared(experiment)
    params = leaves_by_path(jax.jit(plan.learner.init)(jax.random.key(0)))
    assert {leaf.ndim for leaf in params.values()} >= {1, 4 if experiment is convolutional_tickets else 2}
    for path, leaf in params.items():
        *window, inputs, outputs = 0, *leaf.shape
        if leaf.ndim == 1:
            assert (leaf == 0).all(), path
        else:
            fans = (inputs + outputs) * np.prod(window[1:])
            assert np.std(leaf) == pytest.approx(np.sqrt(2 / fans), rel=4 / np.sqrt(leaf.size)), path
            assert np.abs(leaf).max() > 1.8 * np.sqrt(2 / fans), f"{path} must be normal, not uniform"


@pytest.mark.slow
def test_a_round_equals_training_by_hand():
    """The ticket's second round equals an independent implementation, step by step."""
    states, _, data = rounds_of_a_lane()
    keys = ticket_rounds.stream_keys(states[1].key)
    order = ticket_rounds.passes(jax.random.fold_in(keys.problem, 0), len(data.train[1]), 40 * 60)
    assert len(np.unique(order[: len(data.train[1])])) == len(data.train[1])  # each example once an epoch
    params = {path: np.asarray(leaf) for path, leaf in at(states[1].starts, "ticket").items()}
    mask = at(states[1].masks, "ticket")
    tx = optax.adam(1.2e-3)
    params = {path: leaf * mask[path] for path, leaf in params.items()}
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            h = x
            for layer in range(3):
                h = h @ params[f"params/Dense_{layer}/kernel"] + params[f"params/Dense_{layer}/bias"]
                h = jax.nn.relu(h) if layer < 2 else h
            return optax.softmax_cross_entropy_with_integer_labels(h, y).mean()

        updates, state = tx.update({p: g * mask[p] for p, g in jax.grad(loss)(params).items()}, state)
        return optax.apply_updates(params, updates), state

    images, labels = data.train
    for number in range(40):
        rows = order[60 * number : 60 * (number + 1)]
        params, state = step(params, state, images[rows].astype(jnp.float32) / 16, labels[rows])
    new = at(states[2].masks, "ticket")
    for path, rate in (("params/Dense_0/kernel", 0.2), ("params/Dense_1/kernel", 0.2), ("params/Dense_2/kernel", 0.1)):
        alive = int(mask[path].sum())
        size = np.where(mask[path], np.abs(params[path]), np.inf).ravel()
        expected = np.array(mask[path]).ravel()
        expected[np.argsort(size, kind="stable")[: round(rate * alive)]] = False
        # Sums are rounded differently here, so one weight may be pruned in place of another.
        assert (expected != np.ravel(new[path])).sum() <= 2
        assert expected.sum() == new[path].sum()


@pytest.mark.slow
def test_an_interrupted_run_resumes_exactly(smoke, tmp_path):
    whole, _, _ = smoke
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SMOKE, tmp_path, stop)
    partial = cbp_jax.load_results(tmp_path)
    assert np.isfinite(partial.density.values[:, :, :2]).all() and np.isnan(partial.density.values[:, :, 2]).all()
    assert lottery.summary(partial).count("%") and lottery.plot(partial, tmp_path / "pictures")[0].is_file()
    with pytest.raises(ValueError, match="finished tasks of a run with other settings"):
        run(dataclasses.replace(SMOKE, fraction=0.3), tmp_path)
    done = []
    again = run(SMOKE, tmp_path, lambda *args: done.append(args))
    assert sum(call[1] for call in done) == total(SMOKE) and len(done) == 3  # one was found, two ran
    assert again.drop_attrs().identical(whole.drop_attrs())
    run(SMOKE, tmp_path, lambda *args: done.append(args))
    assert done[-1] == (", ".join(KINDS), total(SMOKE), {})


@pytest.mark.slow
def test_a_run_with_a_later_first_seed_equals_part_of_a_longer_run(smoke, tmp_path):
    later = run(dataclasses.replace(SMOKE, first_seed=1, seeds=1), tmp_path)
    assert later.seed.values.tolist() == [1]
    np.testing.assert_array_equal(later.validation_loss_at, smoke[0].validation_loss_at.loc[{"seed": [1]}])


@pytest.mark.slow
def test_networks_trained_together_equal_those_trained_in_turn(smoke, tmp_path):
    results, _, _ = smoke
    together = run(dataclasses.replace(SMOKE, lanes="vmap"), tmp_path)
    for name in ("density", "validation_loss_at"):
        np.testing.assert_allclose(together[name], results[name], rtol=2e-3)


def test_tables_and_pictures(smoke, tmp_path):
    results, _, _ = smoke
    table = lottery.summary(results)
    for words in ("Early-stopping iteration", "Ticket", "One-shot", "ticket - reinitialized", "100.0%", "80.6%"):
        assert words in table
    values = 100 * results.test_accuracy.loc[{"method": "ticket"}].values[:, 0].astype(float)
    assert f"{values.mean():.2f} ± {12.7062 * values.std(ddof=1) / 2**0.5:.2f}" in table
    paths = lottery.plot(results, tmp_path, ("png", "svg"))
    assert [path.name for path in paths] == ["density.png", "density.svg", "accuracy.png", "accuracy.svg"]
    drawn = report.plot_densities(results)
    lines = {container.get_label(): container.lines[0] for container in drawn.axes[2].containers}
    assert list(lines) == [kind.look.title for kind in KINDS.values()]
    expected = 100 * results.test_accuracy.loc[{"method": "signs"}].values.mean(0)
    np.testing.assert_allclose(lines["Signs alone"].get_ydata(), expected, rtol=1e-6)
    low, high = drawn.axes[2].get_xlim()
    assert low > high and drawn.axes[2].get_xscale() == "log"  # dense to sparse
    figure = report.plot_accuracies(results)
    curves = figure.axes[2].containers
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == "65.1%"
    assert figure.legends[0].get_title().get_text() == "Weights remaining"
    assert not any(ax.get_legend() for ax in figure.axes), "a legend in a panel would cover its lines"
    assert any("dotted: reinitialized" in text.get_text() for text in figure.texts)
    expected = 100 * results.test_accuracy_at.loc[{"method": "reinitialized"}].values[:, 2].mean(0)
    np.testing.assert_allclose(curves[1].lines[0].get_ydata(), expected, rtol=1e-6)
    alone = results.isel(method=[1])
    assert [path.name for path in lottery.plot(alone, tmp_path)] == ["density.png"]
    with pytest.raises(ValueError, match="there are no tickets to draw"):
        report.plot_accuracies(alone)
    with pytest.raises(ValueError, match="no round has finished"):
        report.plot_densities(results * np.nan)


@pytest.mark.slow
def test_a_diverging_network_is_reported_changes_no_other_and_its_seed_is_left_out(smoke, tmp_path, monkeypatch):
    whole, _, _ = smoke
    place, start = list(KINDS).index("random"), ticket_rounds.start

    def poisoned(plan, seed):
        state = jax.lax.optimization_barrier(start(plan, seed))  # which the compiler leaves as it is without NaN
        bad = lambda leaf: leaf.at[place].set(jnp.where(seed == 1, jnp.nan, leaf[place]))
        return state._replace(starts=jax.tree.map(bad, state.starts))

    monkeypatch.setattr(ticket_rounds, "start", poisoned)
    means = []
    with pytest.warns(RuntimeWarning, match="diverged") as heard:
        results = run(SMOKE, tmp_path, lambda kinds, lanes, shown: means.append(shown["accuracy"]))
    assert [str(warning.message).partition(":")[0] for warning in heard] == ["random diverged with seed 1 in task 1"]
    assert results.identical(cbp_jax.load_results(tmp_path))
    assert results.diverged.loc[{"method": "random"}].values.tolist()[1] == 0 and int(results.diverged.count()) == 1
    others = [kind for kind in KINDS if kind != "random"]
    for name in whole.data_vars:
        np.testing.assert_array_equal(results[name].loc[{"method": others}], whole[name].loc[{"method": others}])
        np.testing.assert_array_equal(results[name][:, 0], whole[name][:, 0])
    healthy = np.delete(whole.test_accuracy.values.reshape(-1, 3), 2 * place + 1, 0)
    np.testing.assert_allclose(means, healthy.mean(0), rtol=1e-6)

    table, left = lottery.summary(results), whole.isel(seed=[0])
    line = "random: 1 of 2 seeds diverged and are left out for all methods (seed 1 in task 1)"
    assert table == f"{lottery.summary(left)}\n\n{line}"
    for draw in (report.plot_densities, report.plot_accuracies):
        figure, expected = draw(results), draw(left)
        for ax, same in zip(figure.axes, expected.axes, strict=True):
            for drawn, of_seed in zip(ax.containers, same.containers, strict=True):
                np.testing.assert_array_equal(drawn.lines[0].get_ydata(), of_seed.lines[0].get_ydata())
        note = " ".join(figure.get_supxlabel().split())
        assert note.startswith("One seed; 1 of 2 seeds left out, because a method diverged")


def test_curves_are_drawn_as_running_means():
    noisy = np.random.default_rng(0).normal(size=(2, 9))
    noisy[1, 6:] = np.nan
    found = report_tickets._running_mean(noisy, 3)
    for row in range(2):
        for place in range(9):
            around = noisy[row, max(place - 1, 0) : place + 2]
            expected = np.nan if np.isnan(noisy[row, place]) else np.nanmean(around)
            assert found[row, place] == pytest.approx(expected, nan_ok=True)
    np.testing.assert_array_equal(report_tickets._running_mean(noisy, 1), noisy)


@pytest.mark.slow
def test_a_run_from_the_command_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "_use_all_cores", lambda: None)
    words = "run convolutional_tickets --preset smoke --methods ticket --seeds 1 --rounds 1 --quiet --out".split()
    learner = "cbp_adam:replacement_rate=0.01,maturity_threshold=5"
    assert cli.main([*words, str(tmp_path), "--learner", learner]) == 0
    printed = capsys.readouterr().out
    assert "convolutional_tickets: mean over seeds" in printed and "density.png" in printed
    # Two convolutions with 4 channels, then 256 to 10 to 10 units: 10%, 20% and 10% are pruned.
    kernels = {36: 0.1, 144: 0.1, 64 * 10: 0.2, 10 * 10: 0.1}
    living = sum(n - round(rate * n) for n, rate in kernels.items())
    density = cbp_jax.load_results(tmp_path).density.values[0, 0]
    np.testing.assert_allclose(density, [1, living / sum(kernels)], rtol=1e-6)


def test_settings_of_the_paper():
    paper = preset("paper")
    assert (paper.dataset, paper.test_split, paper.hidden, paper.learner) == (
        "mnist", "test", (300, 100), "adam:step_size=1.2e-3"
    )  # fmt: skip
    assert (paper.batch_size, paper.iterations, paper.evaluate_every, paper.seeds, paper.validation_examples) == (
        60, 50_000, 100, 5, 5000
    )  # fmt: skip
    assert (paper.fraction, paper.output_fraction, paper.conv_fraction) == (0.2, 0.1, None)
    conv = convolutional_tickets.preset("paper")
    assert (conv.dataset, conv.iterations, conv.conv_fraction, conv.hidden) == ("cifar10", 20_000, 0.1, (256, 256))
    assert conv.learner == "adam:step_size=2e-4"
    assert preset("paper", "fashion_mnist").test_split == "test"
    assert preset("laptop").test_split is None and preset("laptop", "drawings.npz").test_split is None
    for experiment in (lottery_tickets, convolutional_tickets):
        assert experiments.EXPERIMENTS[experiment.name] is experiment
        for name in experiment.presets:
            assert check(experiment.preset(name)) == list(experiment.preset(name).methods)


@pytest.mark.slow
def test_global_pruning_compares_layers_with_the_same_fraction():
    _, plan, _ = rounds_of_a_lane()
    params = plan.learner.init(jax.random.key(0))
    params["params"]["Dense_0"]["kernel"] *= 10
    mask = functools.partial(plan.prune, scope="global")(params, plan.full_mask(params))
    left = {path: int(leaf.sum()) for path, leaf in leaves_by_path(mask).items() if leaf.ndim == 2}
    assert left["params/Dense_2/kernel"] == 90
    assert left["params/Dense_0/kernel"] + left["params/Dense_1/kernel"] == 1480 - 296
    assert left["params/Dense_1/kernel"] < 0.5 * 200
    assert tickets.density(mask) == np.float32((1480 - 296 + 90) / 1580)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"first_seed": -1}, "first_seed must be from 0 to"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"methods": ()}, r"methods must be at least one and all different, got \(\)"),
        ({"methods": ("ticket", "ticket")}, "methods must be at least one and all different"),
        ({"methods": ("tickets",)}, r"methods must be of \['ticket', .* got 'tickets'"),
        ({"methods": ("random",)}, "methods must have 'ticket', whose masks 'random' takes"),
        ({"evaluate_every": 30}, "evaluate_every must divide iterations = 50000, got 30"),
        ({"rewind_step": 150}, "rewind_step must be a multiple of evaluate_every = 100 from 0 to less than iterations"),
        ({"rewind_step": 50_000}, "rewind_step must be a multiple of evaluate_every = 100"),
        ({"methods": ("late_rewinding",)}, "rewind_step must be a multiple of evaluate_every = 100 from 100"),
        ({"fraction": 0.0}, "fraction must be above 0, got 0"),
        ({"fraction": 1.0}, r"fraction must be in \[0, 1\), got 1"),
        ({"output_fraction": -0.1}, r"output_fraction must be in \[0, 1\), got -0.1"),
        ({"conv_fraction": 1.5}, r"conv_fraction must be in \[0, 1\), got 1.5"),
        ({"scope": "all"}, "scope must be 'layer' or 'global', got 'all'"),
        ({"lanes": "turns"}, "lanes must be .* got 'turns'"),
        ({"hidden": (0,)}, r"hidden must be .* got \(0,\)"),
        ({"activation": "rleu"}, "activation must be .* got 'rleu'"),
        ({"learner": "adamm"}, "the learner must be one of .* got 'adamm'"),
        ({"learner": "bp:reset=head"}, "lottery tickets have no tasks before which it could be reset"),
        ({"learner": "injection"}, "lottery tickets have no tasks before which"),
        ({"learner": "c_chain"}, "lottery tickets have no reference batches"),
        ({"learner": "upgd:order=2"}, "lottery tickets have no curvature"),
        ({"network": "lenet", "learner": "layer_norm"}, "network 'lenet' has no normalization"),
        ({"iterations": 10**9}, "iterations times batch_size must be at most 2147483647"),
        ({"dataset": " "}, "dataset must be a name"),
        ({"validation_examples": 1790, "test_examples": 7}, "leave 0 of 1797 training examples"),
        ({"seeds": 10**12}, "make results of .* GiB"),
    ],
)
def test_bad_settings(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(Settings(**settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
