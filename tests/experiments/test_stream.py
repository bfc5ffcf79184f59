import dataclasses
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from same_runs import same
from toy_streams import tiny_problem

from cbp_jax import files, load_results, report, training
from cbp_jax.experiments import folder, lanes, stream

pytestmark = pytest.mark.usefixtures("compiled_once")

SETTINGS = stream.StreamSettings(
    methods=(
        "cbp:step_size=0.1,replacement_rate=0.2,maturity_threshold=3",
        "upgd:step_size=0.05,sigma=0.1",
        "cbp:step_size=0.05,replacement_rate=0.05,maturity_threshold=3",
    ),
    seeds=2,
    tasks=4,
    hidden=(4,),
    measured_examples=6,
    measure_every=4,
)


def run(out, progress=None, settings=SETTINGS, **changes):
    return stream.run("toy", dataclasses.replace(settings, **changes), tiny_problem(), out, progress)


def run_killed(out):
    """Run in a process that kills itself in the second method's third task; the saved state is of the second."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    lanes.SAVE_EVERY, lanes.CHECKPOINT_EVERY = 1e9, 0.0
    calls = Calls()

    def progress(*args):
        calls(*args)
        if len(calls) == SETTINGS.tasks + 3:
            os.kill(os.getpid(), signal.SIGKILL)

    run(Path(out), progress)


class Calls(list):
    """A progress callback that records its calls, and stops the run like Ctrl-C after a number of calls."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after

    def __call__(self, *args):
        self.append(args)
        if len(self) == self.stop_after:
            raise KeyboardInterrupt

    def done(self):
        return sum(lanes for _, lanes, _ in self)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run without an interruption."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return run(out), out


def assert_is_whole(results, out, whole):
    """Assert equality to the last bit, in memory and on disk, and that no other files are left."""
    expected, _ = whole
    assert set(report.stream_measures(updates=True)) == set(expected.data_vars)
    assert all(np.isfinite(values).all() for values in expected.data_vars.values())
    assert same(results, expected) and load_results(out).identical(results)
    assert [path.name for path in out.iterdir()] == ["results.nc"]


def only_after(task):
    """Save the state only after that task of a group."""
    save = training.Checkpoint.save
    return lambda self, tasks, state, **when: save(self, tasks, state, **when) if tasks == task else None


def finished_tasks(out):
    """Return the number of tasks of each method with results on disk, for all measures and seeds."""
    results = load_results(out)
    done = np.stack([np.isfinite(values.values) for values in results.data_vars.values()])
    assert (done.all((0, 2)) == done.any((0, 2))).all()
    return done.all((0, 2)).sum(1).tolist()


def told_at_once(calls):
    """Return the lanes that were reported without means, because they were already finished."""
    return [lanes for _, lanes, means in calls if not means]


@pytest.mark.slow
def test_a_repeatedly_interrupted_run_ends_like_an_uninterrupted_one(whole, tmp_path, monkeypatch):
    def interrupted(after):
        calls = Calls(after)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, calls)
        return calls

    state = tmp_path / folder.STATE_FILE
    monkeypatch.setattr(lanes, "CHECKPOINT_EVERY", 1e9)
    assert told_at_once(interrupted(after=2)) == []
    assert finished_tasks(tmp_path) == [2, 0, 2] and not state.exists()
    # The run first starts without a state, and then with one that is two tasks behind the results.
    monkeypatch.setattr(lanes, "CHECKPOINT_EVERY", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(training.Checkpoint, "save", only_after(1))
        assert told_at_once(interrupted(after=3)) == []
    assert finished_tasks(tmp_path) == [3, 0, 3] and state.exists()
    # One task of four lanes is finished; then three that complete the group, and two of the second method.
    assert told_at_once(interrupted(after=1 + 3 + 2)) == [4]
    assert finished_tasks(tmp_path) == [4, 2, 4] and state.exists()
    calls = Calls()
    assert_is_whole(run(tmp_path, calls), tmp_path, whole)
    # One group is complete; the saved state of the second method is one task older than the interruption.
    assert told_at_once(calls) == [16, 2] and calls.done() == stream.total(SETTINGS) == whole[0].loss.size


@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one(whole, compiled_once, tmp_path):
    script = f"import runpy; runpy.run_path({__file__!r})['run_killed']({str(tmp_path)!r})"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **compiled_once, "PYTHONPATH": path}
    process = subprocess.run([sys.executable, "-c", script], env=environment, timeout=120)
    assert process.returncode == -signal.SIGKILL
    # Results are not written after each task, but those that the state needs are saved with it.
    assert finished_tasks(tmp_path) == [4, 2, 4] and (tmp_path / folder.STATE_FILE).exists()
    calls = Calls()
    assert_is_whole(run(tmp_path, calls), tmp_path, whole)
    assert told_at_once(calls) == [16, 4] and calls.done() == stream.total(SETTINGS)


@pytest.mark.parametrize("after", [1, *(pytest.param(tasks, marks=pytest.mark.slow) for tasks in (2, 3))])
def test_a_run_stopped_by_ctrl_c_repeats_no_finished_task(few, tmp_path, after):
    calls = []

    def press(*args):
        calls.append(args)
        if len(calls) == after:
            signal.raise_signal(signal.SIGINT)

    with pytest.warns(RuntimeWarning, match="stopping when the current task ends"), pytest.raises(KeyboardInterrupt):
        run(tmp_path, press, BACKPROP)
    assert len(calls) == after and finished_tasks(tmp_path) == [after, after]
    calls = Calls()
    assert same(run(tmp_path, calls, BACKPROP), few)
    assert told_at_once(calls) == [4 * after] and calls.done() == stream.total(BACKPROP)
    assert [path.name for path in tmp_path.iterdir()] == ["results.nc"]


@pytest.fixture
def asked(monkeypatch):
    """Replace training: record its arguments, and yield losses that encode lane and task.

    The state of a lane is the number of its finished tasks. It is saved and restored like a network's state.
    """
    asked = []

    def run_tasks(learner, problem, seeds, hyperparameters, tasks, *, checkpoint, **settings):
        done = checkpoint.restore({"done": np.zeros(len(seeds), np.int32)})["done"]
        asked.append((checkpoint.name, checkpoint.tasks, seeds.tolist(), tasks, settings))
        names = report.stream_measures(accuracy=problem.loss == "softmax_cross_entropy")
        for task in range(checkpoint.tasks, tasks):
            assert (done == task).all()
            done = done + 1
            values = 10.0 * hyperparameters["step_size"] + seeds + 100 * task
            diverged = np.where(hyperparameters["step_size"] == 7, np.nan, values)
            yield {name: values if name == "replaced_units" else diverged for name in names}
            checkpoint.save(task + 1, lambda done=done: {"done": done})

    monkeypatch.setattr(training, "run_tasks", run_tasks)
    monkeypatch.setattr(stream.learners, "make_learner", lambda *args, **network: None)
    monkeypatch.setattr(stream.memory, "check_states", lambda *args: 1000)
    return asked


FAKE = dataclasses.replace(
    SETTINGS, methods=("bp:step_size=1", "adam:step_size=2", "bp:step_size=3"), tasks=3, measure_every=None
)
BP, ADAM = "bp(step_size=1); bp(step_size=3)", "adam(step_size=2)"


def stop(out, after):
    """Interrupt a run after so many tasks, and leave its saved state."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lanes, "CHECKPOINT_EVERY", 0.0)
        run(out, Calls(after), FAKE)
    assert (out / folder.STATE_FILE).exists()


def test_methods_and_seeds_are_lanes_of_groups_and_results_belong_to_them(asked, tmp_path):
    calls = Calls()
    results = run(tmp_path, calls, FAKE)
    assert [(name, seeds, tasks) for name, _, seeds, tasks, _ in asked] == [(BP, [0, 1, 0, 1], 3), (ADAM, [0, 1], 3)]
    assert all(settings["measured_examples"] == 6 and settings["mode"] == "auto" for *_, settings in asked)
    expected = 10.0 * np.array([1, 2, 3])[:, None, None] + np.arange(2)[:, None] + 100.0 * np.arange(3)
    for name, values in results.data_vars.items():
        np.testing.assert_array_equal(values, expected, err_msg=name)
    assert [call[:2] for call in calls] == [(BP.replace("; ", ", "), 4)] * 3 + [(ADAM, 2)] * 3
    assert calls[1][2]["loss"] == 120.5


BACKPROP = dataclasses.replace(SETTINGS, methods=("bp:step_size=0.1", "bp:step_size=0.05"), tasks=3, measure_every=None)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Run `BACKPROP` without an interruption."""
    return run(tmp_path_factory.mktemp("runs") / "few", None, BACKPROP)


class Listener(Calls):
    """Also records single methods' reports, and diverged lanes."""

    def __init__(self):
        super().__init__()
        self.tasks, self.lost = [], []

    def task_done(self, method, task, means):
        self.tasks.append((method, task, means))

    def diverged(self, method, seed, task):
        self.lost.append((method, seed, task))


@pytest.mark.parametrize("mode", [pytest.param("vmap", marks=pytest.mark.slow), "map"])
def test_a_diverging_lane_is_reported_immediately_and_changes_no_other(tmp_path, mode):
    healthy = dataclasses.replace(BACKPROP, lanes=mode)
    sick = dataclasses.replace(healthy, methods=("bp:step_size=0.1", "bp:step_size=1e38"))
    heard = Listener()
    results = run(tmp_path / "sick", heard, sick)
    bad = "bp(step_size=1e+38)"
    assert heard.lost == [(bad, 0, 0)]  # reported once; all units of the other seed are dead, but its loss is finite
    assert np.isfinite(results.loss.loc[{"method": bad}]).any("task").values.tolist() == [False, True]
    expected = run(tmp_path / "healthy", None, healthy)
    for name, values in expected.data_vars.items():
        np.testing.assert_array_equal(results[name][0], values[0], err_msg=name)
    of_first = [means["loss"] for method, _, means in heard.tasks if method == "bp(step_size=0.1)"]
    np.testing.assert_allclose(of_first, expected.loss[0].mean("seed"), rtol=1e-6)
    assert heard.tasks[0][:2] == ("bp(step_size=0.1)", 0) and len(heard.tasks) == 6
    if mode == "map":  # with map, not even leaving the method out changes a bit
        alone = run(tmp_path / "alone", None, dataclasses.replace(healthy, methods=("bp:step_size=0.1",)))
        for name, values in alone.data_vars.items():
            np.testing.assert_array_equal(results[name][0], values[0], err_msg=name)
    told = f"{bad}: 1 of 2 seeds diverged and are left out (seed 0 in task 1)"
    assert stream.summary(results).endswith(told)


def test_means_leave_out_lanes_that_diverged_in_this_or_an_earlier_task(asked, tmp_path, monkeypatch):
    healthy = training.run_tasks

    def run_tasks(learner, problem, seeds, *args, checkpoint, **settings):
        for task, measured in enumerate(healthy(learner, problem, seeds, *args, checkpoint=checkpoint, **settings)):
            lost = (seeds == 0) & (checkpoint.tasks + task == 1)  # its loss is finite again in the last task
            yield measured | {"loss": np.where(lost, np.inf, measured["loss"])}

    monkeypatch.setattr(training, "run_tasks", run_tasks)
    monkeypatch.setattr(lanes, "CHECKPOINT_EVERY", 0.0)

    class Stopped(Listener):
        def task_done(self, method, task, means):
            super().task_done(method, task, means)
            if (method, task) == ("bp(step_size=3)", 1):
                raise KeyboardInterrupt

    first, second = Stopped(), Listener()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first, FAKE)
    results = run(tmp_path, second, FAKE)  # which goes on after the first task of the first two methods
    assert first.lost == [("bp(step_size=1)", 0, 1), ("bp(step_size=3)", 0, 1)] and second.lost == [(ADAM, 0, 1)]
    assert [each[:2] for each in second.tasks[:2]] == [("bp(step_size=1)", 1), ("bp(step_size=3)", 1)]
    for method, task, means in first.tasks + second.tasks:
        values = results.loc[{"method": method, "task": task, "seed": [0, 1] if task < 1 else [1]}]
        assert means == {name: float(values[name].mean()) for name in results.data_vars}, (method, task)
    of_both = results.loc[{"method": ["bp(step_size=1)", "bp(step_size=3)"], "seed": [1]}]
    assert [call[2]["accuracy"] for call in second[1:3]] == of_both.accuracy.mean(("method", "seed")).values[
        1:
    ].tolist()
    # Of one seed, nothing is left.
    alone = Listener()
    run(tmp_path / "alone", alone, dataclasses.replace(FAKE, seeds=1))
    assert all(np.isnan(list(means.values())).all() == (task > 0) for _, task, means in alone.tasks)
    assert [np.isnan(call[2]["accuracy"]) for call in alone] == [False, True, True] * 2


def test_results_record_how_they_were_made_and_how_long_it_took(asked, tmp_path, monkeypatch):
    first = run(tmp_path, None, FAKE)
    assert set(report.records.seconds_of(first)) == set(first.method.values.tolist())
    assert first.attrs["device"].startswith("cpu") and "resumed" not in first.attrs and "failed" not in first.attrs
    stop(tmp_path / "more", after=2)
    monkeypatch.setattr(sys, "argv", ["/bin/cbp-jax", "run", "again", "and again"])
    (resumed,) = json.loads(run(tmp_path / "more", None, FAKE).attrs["resumed"])
    assert resumed["command"] == "cbp-jax run again 'and again'" and resumed["device"] == first.attrs["device"]


def test_a_failed_run_says_so_until_it_is_resumed(asked, tmp_path):
    def fail(*args):
        raise RuntimeError("out of memory\nand so on")

    with pytest.raises(RuntimeError):
        run(tmp_path, fail, FAKE)
    assert report.list_runs(tmp_path)[0].state == "failed: RuntimeError: out of memory; 4 of 18 tasks"
    assert "failed" not in run(tmp_path, None, FAKE).attrs and report.list_runs(tmp_path)[0].state == "finished"


@pytest.mark.parametrize("mode", [pytest.param("vmap", marks=pytest.mark.slow), "map"])
def test_lanes_in_batches_give_the_same_results_and_can_be_resumed(tmp_path, mode):
    settings = dataclasses.replace(BACKPROP, lanes=mode)
    batched = lambda out, progress=None, at_once=3: stream.run(
        "toy", settings, tiny_problem(), out, progress, lanes_at_once=at_once
    )
    together = run(tmp_path / "together", None, settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lanes, "CHECKPOINT_EVERY", 0.0)
        batched(tmp_path / "batches", Calls(2), at_once=2)
    calls = Calls()
    in_batches = batched(tmp_path / "batches", calls)
    assert told_at_once(calls) == [4]
    for name, values in together.data_vars.items():
        if mode == "map":
            np.testing.assert_array_equal(in_batches[name], values, err_msg=name)
        else:
            np.testing.assert_allclose(in_batches[name], values, rtol=1e-6, err_msg=name)


class OutOfMemory:
    """Lets compiled functions raise the error of a device without memory, after some calls with too many lanes.

    Args:
      patch: pytest's monkeypatch.
      fits: how many lanes the devices hold.
      after: number of calls of each function before memory runs out.
    """

    def __init__(self, patch, fits, after=0):
        self.held, self.raised = [], 0
        jit = training.Lanes.jit

        def jit_here(lanes, function, donate_lane=None, **options):
            compiled, calls = jit(lanes, function, donate_lane, **options), 0
            held = min(lanes.count, lanes._chunk) if lanes._waiting else lanes.count

            def call(*args):
                nonlocal calls
                calls += donate_lane is not None
                if donate_lane is not None and held > fits and calls > after:
                    self.raised += 1
                    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
                self.held.append(held)
                return compiled(*args)

            return call

        patch.setattr(training.Lanes, "jit", jit_here)


@pytest.mark.parametrize("save", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["resumed", "restarted"])
@pytest.mark.parametrize("mode", [pytest.param("vmap", marks=pytest.mark.slow), "map"])
def test_where_memory_runs_out_half_of_the_lanes_go_on_with_the_same_results(tmp_path, monkeypatch, mode, save):
    settings = dataclasses.replace(BACKPROP, lanes=mode)
    expected = run(tmp_path / "whole", None, settings)
    monkeypatch.setattr(lanes, "CHECKPOINT_EVERY", 0.0 if save else 1e9)
    device = OutOfMemory(monkeypatch, fits=2, after=1)
    calls = Calls()
    with pytest.warns(RuntimeWarning, match="memory ran out; going on with 2 lanes at once"):
        found = run(tmp_path / "halved", calls, settings)
    assert device.raised == 1 and device.held[0] == 4 and device.held[-1] <= 2
    # Each task is reported once, though it may be run again.
    assert told_at_once(calls) == [] and [lanes for _, lanes, _ in calls] == [4, 4, 4]
    for name, values in expected.data_vars.items():
        if mode == "map":
            np.testing.assert_array_equal(found[name], values, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_memory_that_does_not_hold_one_lane_and_other_errors_end_the_run(tmp_path, monkeypatch):
    OutOfMemory(monkeypatch, fits=0)
    with (
        pytest.warns(RuntimeWarning, match="with 1 lane at once"),
        pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"),
    ):
        run(tmp_path, None, dataclasses.replace(BACKPROP, tasks=1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        stream.memory.fewer_lanes(jax.errors.JaxRuntimeError("INTERNAL: other"), 4, None)


@pytest.mark.slow
def test_the_first_tasks_of_each_program_are_timed(monkeypatch):
    prepare = lambda **changes: stream.prepare(
        "toy",
        changed := dataclasses.replace(SETTINGS, measure_every=None, **changes),
        stream.check(changed),
        tiny_problem(),
    )
    cbp, upgd = prepare(lanes="map").timed()
    assert cbp.of_a_call * cbp.calls >= 4 and upgd.of_a_call * upgd.calls >= 2 and upgd.methods[0].startswith("upgd")
    assert (cbp.of_a_call, cbp.calls) == (1, 4) or jax.local_device_count() > 1
    assert len(cbp.methods) == 2 and cbp.tasks == SETTINGS.tasks
    assert 0 < cbp.task < cbp.first and 0 < upgd.compilation < upgd.first
    assert cbp.seconds == pytest.approx(cbp.compilation + cbp.calls * cbp.tasks * cbp.task)
    alone = cbp._replace(tasks=1, task=None)  # compilation and task cannot be told apart
    assert alone.seconds == pytest.approx(alone.calls * alone.first)
    assert cbp.memory is None  # a CPU does not report it
    stats = [{"peak_bytes_in_use": 3}, {"peak_bytes_in_use": 5}, None]
    fake = [types.SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream.memory.jax, "local_devices", lambda: fake)
        assert stream.memory.peak() == 5
    monkeypatch.setattr(stream.memory, "peak", lambda: 7)
    notes = []
    OutOfMemory(monkeypatch, fits=3)
    (together,) = prepare(lanes="vmap", tasks=1, methods=BACKPROP.methods).timed(tell=notes.append)
    assert notes == [stream.memory.fewer_text(2)]  # all four lanes do not fit
    assert (together.of_a_call, together.calls, together.task, together.memory) == (2, 2, None, 7)


def test_the_plan_lists_programs_lanes_and_memory(monkeypatch):
    job = stream.prepare("toy", SETTINGS, stream.check(SETTINGS), tiny_problem(), lanes_at_once=3)
    cbp, upgd = job.plan.programs
    assert [len(cbp.methods), cbp.lanes, cbp.at_once, len(upgd.methods), upgd.lanes] == [2, 4, 3, 1, 2]
    weights = 6 * 4 + 4 + 4 * 3 + 3
    assert 4 * weights < cbp.lane_bytes < 16 * weights and upgd.lane_bytes >= 2 * 4 * weights
    assert cbp.shared_bytes >= 30 * 6
    lines = job.plan.text(["device"]).splitlines()
    assert lines[0] == "plan: 2 programs to compile, 6 lanes (3 methods x 2 seeds) of 4 tasks, on 1 device"
    assert "4 lanes in 2 batches; at least " in lines[1] and "2 lanes; at least " in lines[2]
    with pytest.raises(ValueError, match="lanes_at_once must be at least 1, got 0"):
        stream.prepare("toy", SETTINGS, stream.check(SETTINGS), tiny_problem(), lanes_at_once=0)
    # On an accelerator, the number of lanes is computed.
    monkeypatch.setattr(stream.memory.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(stream.memory, "_of_device", lambda: 1000.0)
    devices = len(jax.local_devices())
    found = [stream.memory.lanes_that_fit(lane, 8 * devices, shared=100) for lane in (50, 100, 10_000)]
    assert found == [None, 4 * devices, devices]


def test_a_finished_run_computes_nothing_more_and_keeps_its_results(asked, tmp_path):
    # The losses of a diverged lane are NaN, but it counts as finished.
    settings = dataclasses.replace(FAKE, methods=(*FAKE.methods, "upgd:step_size=7"))
    with pytest.warns(
        RuntimeWarning, match=r"upgd\(step_size=7\) diverged with seed [01] in task 1: its loss is not finite"
    ):
        first = run(tmp_path, None, settings)
    assert np.isnan(first.loss.values[-1]).all()
    assert first.diverged.loc[{"method": "upgd(step_size=7)"}].values.tolist() == [0, 0]
    assert first.diverged[:-1].isnull().all()
    asked.clear()
    calls = Calls()
    again = run(tmp_path, calls, settings)
    assert asked == [] and again.identical(first) and load_results(tmp_path).identical(first)
    assert told_at_once(calls) == [12, 6, 6] and len(calls) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["results.nc"]


def test_a_run_stopped_after_its_last_task_finishes_and_leaves_no_state(asked, tmp_path):
    stop(tmp_path, after=6)
    assert finished_tasks(tmp_path) == [3, 3, 3]
    recorded = load_results(tmp_path)
    asked.clear()
    again = run(tmp_path, None, FAKE)
    assert [(name, done) for name, done, *_ in asked] == [(ADAM, 2)] and same(again, recorded)
    assert [path.name for path in tmp_path.iterdir()] == ["results.nc"]


def kept(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("changes", [{"seeds": 3}, {"tasks": 4}, {"hidden": (5,)}, {"batch_size": 2}], ids=str)
def test_a_run_of_other_settings_in_the_same_folder_is_refused_and_loses_nothing(asked, tmp_path, changes):
    stop(tmp_path, after=2)
    before = kept(tmp_path)
    with pytest.raises(ValueError, match=f"4 finished tasks of a run with other settings .{next(iter(changes))} is"):
        run(tmp_path, None, FAKE, **changes)
    assert kept(tmp_path) == before and len(before) == 2


def test_another_experiment_in_the_same_folder_is_refused_and_loses_nothing(asked, tmp_path):
    stop(tmp_path, after=2)
    before = kept(tmp_path)
    with pytest.raises(ValueError, match="holds another experiment, 'toy'"):
        stream.run("other", FAKE, tiny_problem(), tmp_path)
    assert kept(tmp_path) == before


def test_a_folder_in_use_is_refused_and_free_again_after_a_run_that_failed(asked, tmp_path):
    with files.locked(tmp_path), pytest.raises(BlockingIOError, match=f"{tmp_path} is in use by another run"):
        run(tmp_path, None, FAKE)
    assert kept(tmp_path) == {}
    stop(tmp_path, after=2)
    run(tmp_path, None, FAKE)


def test_a_disk_that_is_full_at_the_first_write_is_reported(asked, tmp_path):
    files.partial(tmp_path / "results.nc").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"results\.nc cannot be written: no space left on device"):
        run(tmp_path, None, FAKE)
    assert kept(tmp_path) == {}


def test_a_damaged_state_is_refused_and_after_deleting_it_the_run_gives_the_same_results(asked, tmp_path):
    whole = run(tmp_path / "whole", None, FAKE)
    stop(tmp_path, after=2)
    state = tmp_path / folder.STATE_FILE
    state.write_bytes(state.read_bytes()[:-1] + b"\0")
    with pytest.raises(ValueError, match=f"cannot resume from {state}: it is damaged"):
        run(tmp_path, None, FAKE)
    assert finished_tasks(tmp_path) == [2, 0, 2]
    state.unlink()
    assert same(run(tmp_path, None, FAKE), whole)


def test_a_state_whose_results_are_gone_is_refused(asked, tmp_path):
    stop(tmp_path, after=3)
    results = load_results(tmp_path)
    results.loss.loc[{"task": 0}] = np.nan
    report.save_results(results, tmp_path)
    with pytest.raises(ValueError, match="the results next to it are not those of its 2 tasks"):
        run(tmp_path, None, FAKE)


@pytest.mark.parametrize("without", ["results", "its name"])
def test_a_state_without_results_or_of_other_methods_is_not_used(asked, tmp_path, without):
    stop(tmp_path, after=2)
    if without == "results":
        (tmp_path / "results.nc").unlink()
    else:  # the file that remains if a run is killed before it deletes the state of the last group
        state = training.Checkpoint(tmp_path / folder.STATE_FILE, ADAM, every=0.0)
        state.save(2, lambda: {"done": np.full(2, 2, np.int32)})
    asked.clear()
    run(tmp_path, None, FAKE)
    assert [done for _, done, *_ in asked] == [0, 0]
