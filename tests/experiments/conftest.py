import types

import numpy as np
import pytest

import cbp_jax
from cbp_jax import report, training
from cbp_jax.experiments import lanes


@pytest.fixture
def trained(monkeypatch):
    """Replace training by a function that records its arguments for each group and yields results of ones."""
    groups = []

    def run_tasks(learner, problem, seeds, hyperparameters, tasks, *, checkpoint, measure_every, **settings):
        given = {"seeds": seeds, "hyperparameters": hyperparameters, "tasks": tasks, "measure_every": measure_every}
        groups.append(types.SimpleNamespace(learner=learner, problem=problem, **given, **settings))
        names = report.stream_measures(
            accuracy=problem.loss == "softmax_cross_entropy", updates=measure_every is not None
        )
        for _ in range(tasks):
            yield {name: np.ones(len(seeds)) for name in names}

    monkeypatch.setattr(training, "run_tasks", run_tasks)
    return groups


@pytest.fixture
def resumed(tmp_path, monkeypatch):
    """A function that kills a run after some tasks, and resumes it: its results must be those of an undisturbed run."""

    class Kill(Exception):
        pass

    def run(experiment, settings, whole, after=2):
        monkeypatch.setattr(lanes, "CHECKPOINT_EVERY", 0.0)
        calls = []

        def die(methods, lanes, measures):
            calls.append(methods)
            if len(calls) == after:
                raise Kill

        with pytest.raises(Kill):
            experiment.run(settings, tmp_path / "killed", die)
        assert np.isnan(cbp_jax.load_results(tmp_path / "killed").episode_return).any()
        again = experiment.run(settings, tmp_path / "killed")
        for name in whole.data_vars:
            np.testing.assert_array_equal(again[name], whole[name], err_msg=name)
        return again

    return run
