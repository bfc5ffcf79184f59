import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from same_runs import same
from toy_streams import tiny_problem

from cbp_jax import cli, cli_processes, load_results, report
from cbp_jax.experiments import folder, lanes, stream
from cbp_jax.experiments.share import Share

SETTINGS = stream.StreamSettings(
    methods=("bp:step_size=1", "adam:step_size=2", "bp:step_size=3"),
    seeds=2,
    tasks=4,
    hidden=(4,),
    measured_examples=6,
)
TASKS = 4
MEASURES = {"loss": "any number", "replaced_units": "encodes the finished tasks"}


class Train:
    """Replaces training: measures encode the lane, the task, and everything that the state has seen.

    Args:
      stop_after: number of tasks after which it raises a KeyboardInterrupt.
    """

    def __init__(self, stop_after=None):
        self.stop_after, self.asked = stop_after, []

    def __call__(self, learner, problem, seeds, hyperparameters, tasks, *, checkpoint, **settings):
        first = {"total": np.zeros(len(seeds)), "seed": np.asarray(seeds)}
        state = checkpoint.restore(first)
        np.testing.assert_array_equal(state["seed"], seeds)
        self.asked.append((checkpoint.lanes, checkpoint.tasks))
        for task in range(checkpoint.tasks, tasks):
            total = 0.5 * state["total"] + seeds + 10 * np.asarray(hyperparameters["step_size"]) + 100 * task
            state = {"total": total, "seed": state["seed"]}
            yield {name: total for name in MEASURES}
            checkpoint.save(task + 1, lambda state=state: state)
            if self.stop_after is not None:
                self.stop_after -= 1
                if not self.stop_after:
                    raise KeyboardInterrupt


def job(train, settings=SETTINGS):
    return stream.prepare("toy", settings, stream.check(settings), tiny_problem(), train=train, measures=MEASURES)


def run(out, share=None, stop_after=None, settings=SETTINGS):
    """Run and return the calls of training, and whether the results were joined."""
    train = Train(stop_after)
    if share is None:
        job(train, settings)(out)
        return train.asked, True
    with folder.claimed(out, share):
        job(train, settings)(out, None, share)
    return train.asked, folder.join(out)[1]


def stopped(out, share, stop_after):
    with pytest.raises(KeyboardInterrupt):
        run(out, share, stop_after)


@pytest.fixture
def no_networks(monkeypatch):
    """Build no networks, and save every task."""
    monkeypatch.setattr(lanes, "CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(stream.learners, "make_learner", lambda *args, **network: None)
    monkeypatch.setattr(stream.memory, "check_states", lambda *args: 1000)


@pytest.fixture
def whole(no_networks, tmp_path_factory):
    """Make a run of one process."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    job(Train())(out)
    return load_results(out)


def assert_is_whole(out, whole):
    assert whole.loss.notnull().all() and same(load_results(out), whole)
    assert [path.name for path in out.iterdir()] == ["results.nc"]
    assert set(report.records.seconds_of(load_results(out))) == set(whole.method.values.tolist())


def finished(out):
    """Return how many tasks each lane has on disk, [method, seed]."""
    return np.isfinite(load_results(out).loss.values).sum(-1)


@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_processes_share_the_lanes_and_joined_results_equal_those_of_one_process(whole, tmp_path, count):
    lanes = []
    for index in range(count):
        asked, joined = run(tmp_path, Share(index, count))
        lanes += [lane for cohort, done in asked for lane in cohort]
        assert joined == (index == count - 1) and all(done == 0 for _, done in asked)
        assert (finished(tmp_path) == TASKS).sum() == len(lanes)
        assert [found.folder for found in report.list_runs(tmp_path)] == [tmp_path]  # parts are not listed as runs
    assert sorted(lanes) == sorted((label, seed) for label in whole.method.values for seed in (0, 1))
    assert_is_whole(tmp_path, whole)


def test_lanes_are_dealt_evenly_over_the_programs(no_networks):
    counts = [len(lanes) for lanes in job(Train()).lanes(Share(0, 4))]
    assert counts == [1, 1]  # of the four lanes of bp and the two of adam
    assert [sum(map(len, job(Train()).lanes(Share(index, 4)))) for index in range(4)] == [2, 2, 1, 1]


@pytest.mark.parametrize("then", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3))])
def test_after_a_process_is_lost_any_number_can_resume_and_no_finished_task_is_lost(whole, tmp_path, then):
    run(tmp_path, Share(0, 2))
    stopped(tmp_path, Share(1, 2), 3)  # in the first program, of which this process has two lanes
    before = finished(tmp_path)
    assert before.tolist() == [[4, 3], [4, 0], [4, 3]]
    assert report.list_runs(tmp_path)[0].state == "unfinished: 18 of 24 tasks"
    asked = []
    for index in range(then):
        share = Share(index, then) if then > 1 else None
        asked += run(tmp_path, share)[0]
    assert sorted((lane, done) for cohort, done in asked for lane in cohort) == [
        ((whole.method.values[1], 1), 0),
        ((whole.method.values[0], 1), 3),
        ((whole.method.values[2], 1), 3),
    ]
    assert_is_whole(tmp_path, whole)


@pytest.mark.slow
def test_lanes_that_one_process_finished_for_two_are_not_run_again(whole, tmp_path):
    for index in range(2):
        stopped(tmp_path, Share(index, 2), 1)
    with pytest.raises(KeyboardInterrupt):  # in the second program
        run(tmp_path, None, stop_after=TASKS - 1 + 2)
    assert [(len(cohort), done) for cohort, done in run(tmp_path)[0]] == [(2, 2)]
    assert_is_whole(tmp_path, whole)


@pytest.mark.slow
def test_a_failure_is_reported_until_another_process_has_finished_the_lanes(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Train, "__call__", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, Share(1, 2))
    assert report.list_runs(tmp_path)[0].state.startswith("failed: ZeroDivisionError: division by zero; 0 of 24")
    monkeypatch.undo()
    monkeypatch.setattr(stream.learners, "make_learner", lambda *args, **network: None)
    monkeypatch.setattr(stream.memory, "check_states", lambda *args: 1000)
    for index in range(3):
        run(tmp_path, Share(index, 3))
    assert_is_whole(tmp_path, whole)


@pytest.mark.slow
def test_several_processes_resume_the_run_of_one(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, None, stop_after=2)
    assert [done for index in range(3) for _, done in run(tmp_path, Share(index, 3))[0]] == [2, 2, 0, 2, 0]
    assert_is_whole(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_run_stopped_repeatedly_by_any_number_of_processes_ends_like_an_uninterrupted_one(whole, tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(4):
        count, before = rng.randint(1, 4), finished(tmp_path) if tmp_path.exists() and any(tmp_path.iterdir()) else 0
        for index in rng.sample(range(count), rng.randint(1, count)):
            try:
                run(tmp_path, Share(index, count) if count > 1 else None, rng.choice([1, 2, 3, 9]))
            except KeyboardInterrupt:
                pass
        assert (finished(tmp_path) >= before).all()
    run(tmp_path)
    assert_is_whole(tmp_path, whole)


def test_impossible_shares_are_refused_immediately(no_networks, tmp_path):
    for share, message in (
        (Share(2, 2), "process_id must be from 0 to 1, one less than processes, got 2"),
        (Share(0, 7), "processes must be at most the 6 lanes .* got 7"),
        (Share(0, 0), "processes must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            job(Train())(tmp_path, None, share)
    assert not any(tmp_path.iterdir())
    with folder.claimed(tmp_path, Share(1, 3)):
        for share, message in (
            (Share(1, 3), "process 1 of 3 is at work in .* already: each needs its own process_id"),
            (Share(0, 2), "process 1-of-3 is at work in .*, and processes is 2 now"),
        ):
            with pytest.raises(BlockingIOError, match=message), folder.claimed(tmp_path, share):
                pass
        with pytest.raises(BlockingIOError, match="in use by another run"):
            run(tmp_path)
        with folder.claimed(tmp_path, Share(2, 3)):
            folder.check(tmp_path, "toy", SETTINGS, Share(2, 3))
    assert not any(tmp_path.iterdir())


def test_processes_of_other_settings_are_refused(no_networks, tmp_path):
    run(tmp_path, Share(0, 2))
    other = dataclasses.replace(SETTINGS, hidden=(5,))
    with pytest.raises(ValueError, match="hidden is"):
        run(tmp_path, Share(1, 2), settings=other)
    with pytest.raises(ValueError, match="hidden is"):
        folder.check(tmp_path, "toy", other, Share(1, 2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--process-id", "1", "--processes", "2"], "must be given together; missing: --coordinator"),
        (["--coordinator", "here:1", "--processes", "2"], "must be given together; missing: --process-id"),
        (["--coordinator", "here", "--process-id", "0", "--processes", "2"], "coordinator must be HOST:PORT"),
        (["--coordinator", "here:1", "--process-id", "2", "--processes", "2"], "process_id must be from 0 to 1"),
        (["--coordinator", "here:1", "--process-id", "0", "--processes", "0"], "processes must be at least 1"),
        (["--distributed", "--processes", "2"], "--distributed finds the processes by itself; leave out --processes"),
        (
            ["--coordinator", "here:1", "--process-id", "0", "--processes", "9", "--seeds", "2"],
            "processes must be at most the 4 lanes",
        ),
        (
            ["--coordinator", "here:1", "--process-id", "0", "--processes", "2", "--log", "jsonl"],
            "--log must be left out with several processes",
        ),
    ],
)
def test_mistakes_on_the_command_line_are_reported_before_waiting_for_other_processes(words, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["run", "online_permuted", "--preset", "smoke", "--out", str(out), *words]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.mark.slow
def test_a_process_that_does_not_start_is_reported(capsys):
    given = cli_processes.Given(Share(1, 2), f"127.0.0.1:{free_port()}")
    with pytest.raises(TimeoutError, match=r"not all 2 processes met at 127.0.0.1:\d+ within 1 s"):
        cli_processes.meet(given, timeout=1)
    with pytest.raises(ValueError, match=r"coordinator must be .*'no\.such\.machine\.invalid'"):
        cli_processes.meet(given._replace(coordinator="no.such.machine.invalid:1"))


# Tests with real processes and real networks.

REAL = stream.StreamSettings(
    methods=("bp:step_size=0.1", "cbp:step_size=0.1,replacement_rate=0.2,maturity_threshold=3", "bp:step_size=0.05"),
    seeds=2,
    tasks=4,
    hidden=(4,),
    measured_examples=6,
)


def real_job(**changes):
    settings = dataclasses.replace(REAL, **changes)
    return stream.prepare("toy", settings, stream.check(settings), tiny_problem())


def as_process(out, words, kill_after=None, **changes):
    """Do what `cbp-jax run` does for this problem, in a separate process."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    lanes.CHECKPOINT_EVERY, lanes.SAVE_EVERY = 0.0, 0.0
    calls = []

    def progress(methods, lanes, means):
        calls.append(methods)
        if len(calls) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    share, address = Share(*words[:2]), words[2]
    with folder.claimed(Path(out), share):
        cli_processes.meet(cli_processes.Given(share, address), timeout=60)
        real_job(**changes)(Path(out), progress, share)
    folder.join(Path(out))


def start(out, environment, count, kill=None, devices=1, **changes):
    """Start processes on the loopback interface, one of which may kill itself, and wait until all have ended."""
    address, processes = f"127.0.0.1:{free_port()}", []
    # XLA's older emitters compile faster; see conftest.py.
    since = "backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    older = f" --xla_{'cpu_use_fusion_emitters=false' if jax.__version_info__ < (0, 11) else since}"
    environment = {
        **os.environ,
        **environment,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}{older}",
    }
    for index in range(count):
        settings = dict(changes, kill_after=2 if index == kill else None)
        call = f"['as_process']({str(out)!r}, {(index, count, address)!r}, **{settings!r})"
        script = f"import runpy; runpy.run_path({__file__!r}){call}"
        processes.append(subprocess.Popen([sys.executable, "-c", script], env=environment))
    ends = [process.wait(timeout=240) for process in processes]
    assert ends == [-signal.SIGKILL if index == kill else 0 for index in range(count)]


@pytest.mark.slow
def test_two_processes_give_the_same_results_as_one(compiled_once, tmp_path):
    few = {"methods": REAL.methods[:1], "tasks": 2}
    real_job(**few)(tmp_path / "one")
    start(tmp_path / "two", compiled_once, 2, **few)
    assert_is_whole(tmp_path / "two", load_results(tmp_path / "one"))


@pytest.fixture(scope="module")
def one(compiled_once, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "one"
    real_job()(out)
    return load_results(out)


@pytest.mark.slow
def test_three_processes_give_the_same_results_as_one(one, compiled_once, tmp_path):
    start(tmp_path, compiled_once, 3)
    assert_is_whole(tmp_path, one)


@pytest.mark.slow
def test_eight_devices_give_the_same_results_as_one(tmp_path):
    """The programs are optimized as in any run; one has ten lanes, so that devices run several in turn."""
    found = []
    for devices in (1, 8):
        out = tmp_path / str(devices)
        script = f"""
import runpy
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
assert len(jax.devices()) == {devices}
runpy.run_path({__file__!r})["real_job"](seeds=5)(Path({str(out)!r}))
"""
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags}
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=240)
        found.append(load_results(out))
    one, eight = found
    assert [results.attrs["device"] for results in found] == ["cpu", "cpu x 8"]
    assert one.loss.notnull().all() and same(eight.assign_attrs(device=one.attrs["device"]), one)


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 2])
def test_a_process_that_is_killed_loses_nothing_that_was_finished(one, compiled_once, tmp_path, then):
    start(tmp_path, compiled_once, 2, kill=1)
    before = finished(tmp_path)
    assert sorted(before.ravel().tolist()) == [0, 2, 2, 4, 4, 4]
    left = load_results(tmp_path)
    for name, values in left.data_vars.items():  # to the last bit
        np.testing.assert_array_equal(values.values[values.notnull()], one[name].values[values.notnull()])
    if then == 1:
        real_job()(tmp_path)
    else:
        start(tmp_path, compiled_once, 2)
    assert_is_whole(tmp_path, one)


def words_of(slurm_process):
    names = {"PROCID": slurm_process, "LOCALID": slurm_process, "JOB_ID": os.getpid() + 2000, "NTASKS": 2}
    names |= {"STEP_NODELIST": "localhost", "STEP_NUM_NODES": 1, "STEP_NUM_TASKS": 2}
    return {f"SLURM_{name}": str(value) for name, value in names.items()}


@pytest.mark.slow
def test_processes_started_by_slurm_are_found():
    script = """
import jax
from cbp_jax import cli_processes
print(*cli_processes.meet(cli_processes.Given(detect=True), 60), jax.config.read("jax_cuda_visible_devices"))
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script], env={**os.environ, **words_of(index)}, stdout=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]
    found = [process.communicate(timeout=120)[0].split() for process in started]
    assert found == [["0", "2", "0"], ["1", "2", "1"]]  # index, count, and a GPU for each
    with pytest.raises(ValueError, match="--distributed found no cluster that JAX supports"):
        cli_processes.meet(cli_processes.Given(detect=True), 5)


@pytest.mark.slow
def test_the_command_runs_in_two_processes_and_the_last_one_draws(tmp_path):
    words = ["run", "online_permuted", "--preset", "smoke", "--seeds", "1", "--tasks", "2", "--quiet"]
    command = [sys.executable, "-m", "cbp_jax", *words, "--no-compilation-cache"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    address = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    started = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / "two"), *address, "--process-id", str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    told = sorted(process.communicate(timeout=280)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0]
    drawn = [text for text in told if "results: " in text]
    assert drawn and all("tasks.png" in text for text in drawn)
    assert all("The last process joins the results" in text for text in told if text not in drawn)
    subprocess.run([*command, "--out", str(tmp_path / "one")], env=environment, check=True, timeout=280)
    assert same(load_results(tmp_path / "two"), load_results(tmp_path / "one"))
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["results.nc", "tasks.png"]
