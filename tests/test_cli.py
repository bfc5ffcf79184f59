import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from cbp_jax.experiments.online_permuted import Settings, preset

from cbp_jax import cli, cli_log, cli_progress, experiments, load_results, nets, report, training
from cbp_jax.experiments import (
    EXPERIMENTS,
    figures,
    learners,
    online_permuted,
    slowly_changing_regression,
    utility_quality,
)

TINY = (
    *("--preset", "smoke", "--dataset", "mnist", "--methods", "bp:step_size=0.02"),
    *("--seeds", "2", "--tasks", "2", "--examples-per-task", "None", "--hidden", "5", "4"),
)


USE_ALL_CORES = cli._use_all_cores


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Give all tests of a process the same devices, whichever runs first."""
    monkeypatch.setattr(cli, "_use_all_cores", lambda: None)


def replace_job(monkeypatch, experiment, run):
    """Let the command check settings, and replace training by another function."""

    def job(settings):
        experiment.check(settings)
        return functools.partial(run, settings)

    monkeypatch.setitem(EXPERIMENTS, experiment.name, dataclasses.replace(experiment, job=job))


@pytest.fixture
def fake_run(monkeypatch):
    """Replace the experiment by a function that records its settings and makes results."""
    calls = []

    def run(settings, out, progress=None):
        calls.append((settings, out))
        labels = [learners.parse_method(text).label for text in settings.methods]
        results = report.new_results(
            labels,
            labels,
            [{}] * len(labels),
            seeds=settings.seeds,
            tasks=settings.tasks,
            settings=settings,
            experiment=online_permuted.NAME,
        )
        for task in range(settings.tasks):
            ones = np.full((len(labels), settings.seeds), 0.5)
            report.record_task(results, task, {name: ones for name in results.data_vars})
        report.save_results(results, out)
        return results

    replace_job(monkeypatch, online_permuted, run)
    return calls


@pytest.fixture
def fake_runs(monkeypatch):
    """Replace the experiments without accuracy, which have other tables and pictures."""

    def regression(settings, out, progress=None):
        labels = [learners.parse_method(text).label for text in settings.methods]
        results = report.new_results(
            labels,
            ["bp", "cbp"],
            [{}, {}],
            seeds=settings.seeds,
            tasks=settings.tasks,
            settings=settings,
            experiment=slowly_changing_regression.NAME,
            measures=report.stream_measures(accuracy=False),
        )
        for task in range(settings.tasks):
            report.record_task(results, task, {"loss": np.full((2, settings.seeds), 1.5 - task / 8)})
        report.save_results(results, out)
        return results

    def quality(settings, out, progress=None):
        results = experiments.quality._empty_results(settings, list(settings.activations))
        results.correlation.values[:] = 0.25
        report.save_results(results, out)
        return results

    replace_job(monkeypatch, slowly_changing_regression, regression)
    replace_job(monkeypatch, utility_quality, quality)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Prepare a dataset `mnist` of ten images from IDX files, with the command line."""
    source, target = tmp_path_factory.mktemp("idx"), tmp_path_factory.mktemp("tensorflow_datasets")
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 10), ("t10k", 4)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (source / f"{prefix}-{name}").write_bytes(header + array.tobytes())
    assert cli.main(["data", "prepare", "mnist", "--from", str(source), "--data-dir", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """Run the command in a separate process; return the folder of the run and the output."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "-m", "cbp_jax", "run", "online_permuted", *TINY]
    process = subprocess.run(
        [*command, "--data-dir", str(data_dir), "--out", str(out), "--no-compilation-cache"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return out, process


def refused(capsys, *words):
    """Return the single line of the error message."""
    assert cli.main(list(words)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("cbp-jax: error: ")
    return printed.err.removeprefix("cbp-jax: error: ")


def refused_in_one_line(capsys, *words):
    message = refused(capsys, *words)
    assert message.count("\n") == 1 and message.endswith("\n")
    return message


def test_a_run_ends_with_the_paths_of_its_picture_and_results(finished):
    out, process = finished
    *_, picture, results = process.stdout.splitlines()
    assert picture.startswith(f"picture: {out}") and results == f"results: {out / 'results.nc'}"
    picture = picture.removeprefix("picture: ")
    with open(picture, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    loaded = load_results(out)
    assert dict(loaded.sizes) == {"method": 1, "seed": 2, "task": 2}
    assert np.isfinite(loaded.accuracy).all()
    assert json.loads(loaded.attrs["settings"])["hidden"] == [5, 4]
    assert "bp(step_size=0.02)" in process.stdout  # the table
    assert "100%" in process.stderr and "4/4" in process.stderr  # the bar


def test_plot_draws_a_run_again_in_the_given_folder_and_form(finished, tmp_path, capsys):
    out, _ = finished
    assert cli.main(["plot", str(out), "--out", str(tmp_path / "pictures"), "--formats", "svg"]) == 0
    *table, picture = capsys.readouterr().out.splitlines()
    assert any("bp(step_size=0.02)" in line for line in table)
    assert picture.startswith(f"picture: {tmp_path / 'pictures'}") and picture.endswith(".svg")
    assert "<svg" in (tmp_path / "pictures" / os.path.basename(picture)).read_text()


def test_plot_joins_runs_of_other_seeds(finished, tmp_path, capsys):
    out, _ = finished
    more = load_results(out).assign_coords(seed=[7, 8])
    report.save_results(more, tmp_path / "more")
    pictures = tmp_path / "all"
    assert cli.main(["plot", str(out), str(tmp_path / "more"), "--out", str(pictures)]) == 0
    assert capsys.readouterr().out.startswith(f"results: {pictures / 'results.nc'}")
    assert load_results(pictures).seed.values.tolist() == [0, 1, 7, 8]
    assert "--out must name a folder" in refused_in_one_line(capsys, "plot", str(out), str(tmp_path / "more"))
    assert "'bp(step_size=0.02)', seed 0 twice" in refused_in_one_line(
        capsys, "plot", str(out), str(out), "--out", str(pictures)
    )
    message = refused_in_one_line(capsys, "plot", str(out), str(tmp_path / "more"), "--out", str(tmp_path / "more"))
    assert "--out must not be the folder of one of the runs" in message
    assert load_results(tmp_path / "more").seed.values.tolist() == [7, 8]


@pytest.mark.slow
def test_plot_compares_runs_with_other_settings(finished, tmp_path, capsys):
    out, _ = finished
    other = load_results(out)
    settings = json.loads(other.attrs["settings"])
    report.save_results(other.assign_attrs(settings=json.dumps({**settings, "hidden": [9]})), tmp_path / "other")
    assert cli.main(["plot", str(out), str(tmp_path / "other"), "--out", str(tmp_path / "both")]) == 0
    joined = load_results(tmp_path / "both")
    labels = ["bp(step_size=0.02, hidden=5 4)", "bp(step_size=0.02, hidden=9)"]
    assert joined.method.values.tolist() == labels and "hidden" not in json.loads(joined.attrs["settings"])
    assert all(label in capsys.readouterr().out for label in labels[:1])


def test_data_prepare_says_what_it_made(data_dir, capsys):
    # It is already prepared, so it is left unchanged.
    source = data_dir / "absent"
    message = refused_in_one_line(
        capsys, "data", "prepare", "mnist", "--from", str(source), "--data-dir", str(data_dir)
    )
    assert "train-images-idx3-ubyte" in message and str(source) in message
    assert "name must be one of mnist" in refused_in_one_line(capsys, "data", "prepare", "svhn", "--from", "x")
    assert "six binary batch files" in refused_in_one_line(capsys, "data", "prepare", "cifar10", "--from", "x")


def test_list_shows_experiments_learners_and_datasets(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in (*EXPERIMENTS, *learners.LEARNERS, *online_permuted.PRESETS, "digits", "mnist", "docstrings/kind"):
        assert name in shown
    assert "replacement_rate=0.0001" in shown


def test_every_figure_has_a_command_that_can_be_run(capsys):
    assert cli.main(["list", "figures"]) == 0
    shown = capsys.readouterr().out
    for figure in figures.FIGURES:
        assert figure.about in shown and f"cbp-jax run {figure.command}\n" in shown and figure.cost
        name, *words = figure.command.split()
        given = dict(zip(words[::2], words[1::2], strict=True))
        settings = EXPERIMENTS[name].preset(given["--preset"], given.get("--dataset"))
        assert EXPERIMENTS[name].check(settings)
    papers = {figure.command.split()[0] for figure in figures.FIGURES}
    assert papers == set(EXPERIMENTS)


def test_the_console_script_is_this_command():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="cbp-jax")
    assert script.load() is cli.main


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--help"], ["list", "run", "plot", "runs", "bench", "data"]),
        (["list", "--help"], ["Lists"]),
        (["run", "online_permuted", "--help"], ["--preset", "--out", "--quiet", "--methods", "--examples-per-task"]),
        (
            ["run", "--help"],
            ["EXPERIMENT", "--preset", "--grid", "--plan", "--lanes-at-once", "--log", "--no-compilation-cache"],
        ),
        (["plot", "--help"], ["run_dir", "--formats"]),
        (["runs", "--help"], ["folder", "subfolders", "where to look"]),
        (["bench", "--help"], ["--suite", "--method", "--published", "--report", "--problems"]),
        (["data", "--help"], ["prepare"]),
        (["data", "prepare", "--help"], ["--from", "--data-dir", "IDX"]),
    ],
    ids=" ".join,
)
def test_help(words, expected, capsys):
    try:
        assert cli.main(words) == 0
    except SystemExit as stopped:
        assert stopped.code in (0, None)
    shown = capsys.readouterr().out
    for word in expected:
        assert word in shown


def test_help_shows_the_presets_values(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "online_permuted", "--preset", "paper", "--help"])
    shown = capsys.readouterr().out
    assert shown.count("2000") >= 3 and "800" in shown and "60000" in shown


@pytest.mark.parametrize("words", [[], ["train"], ["data"], ["data", "prepare", "mnist"], ["plot"], ["list", "all"]])
def test_unknown_commands_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2 and "usage: cbp-jax" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("experiment", "words", "shown", "picture"),
    [
        (
            "slowly_changing_regression",
            ["--methods", "bp:activation=tanh", "cbp", "--tasks", "3", "--beta", "0.5"],
            ["slowly_changing_regression: loss, mean over seeds", "bp(activation=tanh)", "1.250 ± 0.000"],
            "tasks",
        ),
        (
            "utility_quality",
            ["--activations", "tanh", "relu"],
            ["utility_quality: Spearman's rank correlation", "Second order", "0.250 ± 0.000"],
            "utility_quality",
        ),
    ],
    ids=["regression", "quality"],
)
def test_tables_and_pictures_are_those_of_the_experiment(
    fake_runs, tmp_path, capsys, experiment, words, shown, picture
):
    out = tmp_path / "run"
    assert cli.main(["run", experiment, "--preset", "smoke", *words, "--out", str(out), "--quiet"]) == 0
    table, last = capsys.readouterr().out.rsplit("picture: ", 1)
    assert all(text in table for text in shown)
    assert last == f"{out / picture}.png\nresults: {out / 'results.nc'}\n"
    kept = json.loads(load_results(out).attrs["settings"])
    assert kept.get("beta", 0.5) == 0.5 and kept.get("activations", ["tanh", "relu"]) == ["tanh", "relu"]

    assert cli.main(["plot", str(out), "--out", str(tmp_path / "again"), "--formats", "svg"]) == 0
    assert capsys.readouterr().out == f"{table}picture: {tmp_path / 'again' / picture}.svg\n"
    assert [path.name for path in (tmp_path / "again").iterdir()] == [f"{picture}.svg"]


def test_results_of_an_unknown_experiment_are_shown_like_those_of_streams(tmp_path, capsys):
    results = report.new_results(["bp"], ["bp"], [{}], seeds=1, tasks=1, settings={}, experiment="slippery_ant")
    report.record_task(results, 0, {"accuracy": [[0.5]]})
    report.save_results(results, tmp_path)
    assert cli.main(["plot", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("slippery_ant: accuracy in percent") and f"picture: {tmp_path / 'tasks.png'}" in printed


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ("slowly_changing_regression", "slowly_changing_regression has none; got 'mnist'"),
        ("utility_quality", "dataset must be left out"),
    ],
)
def test_a_dataset_is_refused_where_there_is_none(fake_runs, tmp_path, capsys, experiment, message):
    words = ["run", experiment, "--preset", "smoke", "--dataset", "mnist", "--out", str(tmp_path / "run")]
    assert message in refused_in_one_line(capsys, *words) and not (tmp_path / "run").exists()


def test_options_change_the_presets_settings(fake_run, tmp_path, capsys):
    words = ["run", "online_permuted", "--preset", "smoke", "--out", str(tmp_path / "run"), "--quiet"]
    words += [
        "--methods",
        "bp",
        "adam",
        "cbp:replacement_rate=1e-5",
        "--seeds",
        "3",
        "--hidden",
        "8",
        "--lanes",
        "vmap",
    ]
    assert cli.main(words) == 0
    ((settings, out),) = fake_run
    assert out == tmp_path / "run"
    assert settings == dataclasses.replace(
        preset("smoke"), methods=("bp", "adam", "cbp:replacement_rate=1e-5"), seeds=3, hidden=(8,), lanes="vmap"
    )
    assert f"results: {out / 'results.nc'}" in capsys.readouterr().out


def test_a_grid_makes_a_method_of_each_combination(fake_run, tmp_path, capsys):
    words = ["run", "online_permuted", "--preset", "smoke", "--quiet", "--out", str(tmp_path / "run")]
    grid = ["--grid", "replacement_rate=1e-4,1e-5", "step_size=0.1,0.2"]
    assert cli.main([*words, "--methods", "bp", "cbp", *grid]) == 0
    ((settings, _),) = fake_run
    assert settings.methods[:2] == ("bp:step_size=0.1", "bp:step_size=0.2") and len(settings.methods) == 6
    assert settings.methods[-1] == "cbp:replacement_rate=1e-5,step_size=0.2"
    assert "cbp(replacement_rate=1e-05, step_size=0.2)" in capsys.readouterr().out
    assert "no method has rate; bp have" in refused_in_one_line(capsys, *words, "--methods", "bp", "--grid", "rate=1")
    lottery = ["run", "lottery_tickets", "--preset", "smoke", "--grid", "step_size=1,2"]
    assert "grid must be left out: lottery_tickets does not compare learners" in refused_in_one_line(capsys, *lottery)


@pytest.mark.slow
def test_the_plan_is_printed_alone_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["run", "online_permuted", "--preset", "smoke", "--seeds", "3", "--methods", "bp", "cbp"]
    assert cli.main([*words, "--grid", "replacement_rate=0,1", "--lanes-at-once", "4", "--plan"]) == 0
    printed = capsys.readouterr()
    first, of_bp, of_cbp, time, *of_programs = printed.out.splitlines()
    assert first.startswith("plan: 2 programs to compile, 9 lanes (3 methods x 3 seeds) of 4 tasks, on ")
    assert of_bp.startswith("  bp: 3 lanes; at least ") and " KiB on each device" in of_bp
    assert of_cbp.startswith("  cbp(replacement_rate=0), cbp(replacement_rate=1): 6 lanes in 2 batches; ")
    assert re.fullmatch(r"time: about .*, of which compilation .* s, if all tasks take as long as .*", time)
    assert re.fullmatch(r"  bp: .* s to compile, then .* s for a task of 1 lane; 3 calls x 4 tasks", of_programs[0])
    assert of_programs[1].endswith("6 calls x 4 tasks") and len(of_programs) == 2
    assert printed.err.startswith("compiling each program and timing its first tasks; Ctrl-C stops")
    assert not list(tmp_path.iterdir())
    assert "lanes_at_once must be at least 1, got 0" in refused_in_one_line(capsys, *words, "--lanes-at-once", "0")
    quality = ["run", "utility_quality", "--preset", "smoke"]
    assert "--plan must be left out: utility_quality has no plan" in refused_in_one_line(capsys, *quality, "--plan")
    message = refused_in_one_line(capsys, *quality, "--lanes-at-once", "2")
    assert "lanes_at_once must be left out: utility_quality has no lanes, got 2" in message


def test_a_note_is_printed_as_a_warning_above_the_bar(capsys):
    with cli_progress.Bar(1, quiet=True) as bar:
        cli_log.Logged(bar, []).note("the devices' memory ran out")
    assert capsys.readouterr().err == "warning: the devices' memory ran out\n"


def test_the_presets_sizes_follow_the_dataset(fake_run, tmp_path):
    for name, dataset in (("laptop", "mnist"), ("smoke", "digits")):
        words = ["run", "online_permuted", "--preset", name, "--dataset", dataset, "--quiet"]
        assert cli.main([*words, "--tasks", "2", "--out", str(tmp_path / name)]) == 0
    assert [settings for settings, _ in fake_run] == [
        dataclasses.replace(preset("laptop", "mnist"), tasks=2),
        dataclasses.replace(preset("smoke", "digits"), tasks=2),
    ]


def test_the_default_folder_of_a_run_depends_on_its_settings(fake_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["run", "online_permuted", "--preset", "smoke", "--quiet"]
    for more in ([], ["--seeds", "4"], []):
        assert cli.main([*words, *more]) == 0
    first, other, again = (out for _, out in fake_run)
    assert first == again != other
    assert first.parent == other.parent and first.parent.name == "runs"
    assert first.name.startswith("online_permuted-smoke-")


def test_a_folder_with_the_same_run_is_used_again(fake_run, tmp_path):
    words = ["run", "online_permuted", "--preset", "smoke", "--out", str(tmp_path), "--quiet"]
    assert cli.main(words) == 0
    assert cli.main(words) == 0
    assert len(fake_run) == 2


def test_a_folder_with_a_run_of_other_settings_is_refused(fake_run, finished, capsys):
    out, _ = finished
    before = (out / "results.nc").read_bytes()
    message = refused_in_one_line(
        capsys, "run", "online_permuted", *TINY, "--out", str(out), "--seeds", "3", "--hidden", "5", "5"
    )
    assert str(out) in message and "other settings" in message
    assert "hidden is [5, 4] there and [5, 5] now; seeds is 2 there and 3 now)" in message
    assert not fake_run and (out / "results.nc").read_bytes() == before


def test_a_folder_with_another_experiment_is_refused(fake_run, tmp_path, capsys):
    settings = preset("smoke")
    other = report.new_results(["bp"], ["bp"], [{}], seeds=1, tasks=1, settings=settings, experiment="slippery_ant")
    report.save_results(other, tmp_path)
    message = refused_in_one_line(capsys, "run", "online_permuted", "--preset", "smoke", "--out", str(tmp_path))
    assert "another experiment, 'slippery_ant'" in message and str(tmp_path) in message
    assert not fake_run and load_results(tmp_path).identical(other)


def test_a_folder_with_other_files_is_refused(fake_run, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    message = refused_in_one_line(capsys, "run", "online_permuted", "--preset", "smoke", "--out", str(tmp_path))
    assert "not empty" in message and str(tmp_path) in message
    message = refused_in_one_line(
        capsys, "run", "online_permuted", "--preset", "smoke", "--out", str(tmp_path / "thesis.tex")
    )
    assert "thesis.tex" in message
    assert not fake_run and [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], f"experiment must be one of {list(EXPERIMENTS)}, got 'nothing'"),
        (["online_permuted", "--preset", "large"], "preset must be one of ['smoke', 'laptop', 'paper', "),
        (["online_permuted", "--methods", "bp", "sgd"], "method 'sgd': the learner must be one of ['bp', 'adam'"),
        (
            ["online_permuted", "--methods", "cbp:replacement_rate=2"],
            "method 'cbp:replacement_rate=2': replacement_rate must be in [0, 1], got 2",
        ),
        (["online_permuted", "--seeds", "0"], "seeds must be at least 1, got 0"),
        (["online_permuted", "--activation", "step"], "got 'step'"),
    ],
)
def test_a_mistake_is_reported_in_one_line_before_anything_is_run(words, message, fake_run, tmp_path, capsys):
    assert message in refused_in_one_line(capsys, "run", *words, "--out", str(tmp_path / "run"))
    assert not fake_run and not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--speed", "9"], ["--seeds", "many"], ["--lanes", "pmap"], ["extra"]])
def test_unknown_options_are_refused(words, fake_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "online_permuted", "--preset", "smoke", "--out", str(tmp_path / "run"), *words])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert words[-1] in printed.err + printed.out or words[0] in printed.err + printed.out
    assert not fake_run and not (tmp_path / "run").exists()


def test_missing_data_is_reported_with_the_ways_to_get_it(tmp_path, capsys):
    words = ["run", "online_permuted", "--preset", "smoke", "--quiet", "--out", str(tmp_path / "run")]
    words += ["--data-dir", str(tmp_path / "data")]
    assert cli.main([*words, "--dataset", "mnist"]) == 2
    message = capsys.readouterr().err
    assert "dataset 'mnist' is not prepared in" in message and str(tmp_path / "data") in message
    assert "cbp-jax data prepare mnist --from DIR" in message
    assert cli.main([*words, "--dataset", "mnits"]) == 2
    assert "unknown dataset 'mnits' (did you mean mnist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["plot", "absent", "more", "--out"], ["bench", "--method", "bp", "--out"]])
def test_an_unknown_format_is_refused_before_anything_else(words, tmp_path, capsys):
    told = refused_in_one_line(capsys, *words, str(tmp_path / "out"), "--formats", "png", "xyz")
    assert "formats must be a list of some of " in told and "; got ['png', 'xyz']" in told
    assert not (tmp_path / "out").exists()


def test_plot_refuses_a_folder_without_a_run(tmp_path, capsys):
    assert "has no results.nc" in refused_in_one_line(capsys, "plot", str(tmp_path))
    assert "does not exist" in refused_in_one_line(capsys, "plot", str(tmp_path / "absent"))


def test_an_interrupted_run_says_that_its_results_are_kept(monkeypatch, tmp_path, capsys):
    def run(settings, out, progress):
        raise KeyboardInterrupt

    replace_job(monkeypatch, online_permuted, run)
    assert cli.main(["run", "online_permuted", "--preset", "smoke", "--quiet", "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "cbp-jax: stopped; the same command resumes the run"


TERMINATED = """
import os, signal, sys, time
import numpy as np
from cbp_jax import cli, report, training

def run_tasks(learner, problem, seeds, *args, **settings):
    for task in range(2):
        yield {name: np.ones(len(seeds)) for name in report.stream_measures()}
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

training.run_tasks = run_tasks
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path):
    words = ["run", "online_permuted", "--preset", "smoke", "--methods", "bp", "--tasks", "9", "--out", str(tmp_path)]
    process = subprocess.run(
        [sys.executable, "-c", TERMINATED, *words, "--quiet", "--no-compilation-cache"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == 143
    last = process.stderr.splitlines()[-1]
    assert last == "cbp-jax: stopped; the same command resumes the run"
    assert "Traceback" not in process.stderr and process.stdout == ""
    assert np.isfinite(load_results(tmp_path).loss.values).all((0, 1)).tolist() == [True] * 2 + [False] * 7
    assert [path.name for path in tmp_path.iterdir()] == ["results.nc"]


def test_a_task_that_runs_at_sigterm_is_finished_and_no_task_is_repeated(monkeypatch, tmp_path, capsys):
    ran, stop_in = [], 2

    def run_tasks(learner, problem, seeds, *args, checkpoint, **settings):
        done = checkpoint.restore({"done": np.zeros(len(seeds))})["done"]
        for task in range(checkpoint.tasks, 4):
            assert (done == task).all()
            if task == stop_in:
                os.kill(os.getpid(), signal.SIGTERM)
            ran.append(task)
            done = done + 1
            yield {name: done for name in report.stream_measures()}
            checkpoint.save(task + 1, lambda done=done: {"done": done})

    monkeypatch.setattr(training, "run_tasks", run_tasks)
    words = ["run", "online_permuted", "--preset", "smoke", "--methods", "bp", "--tasks", "4", "--out", str(tmp_path)]
    assert cli.main(words) == 143
    told = capsys.readouterr().err.splitlines()
    assert any("stopping when the current task ends; interrupt again to stop at once" in line for line in told)
    assert told[-1] == "cbp-jax: stopped; the same command resumes the run"
    assert np.isfinite(load_results(tmp_path).loss.values).all((0, 1)).tolist() == [True] * 3 + [False]
    stop_in = None
    assert cli.main(words) == 0 and ran == [0, 1, 2, 3]
    assert (load_results(tmp_path).loss == [1, 2, 3, 4]).all()


def test_the_package_is_the_command(monkeypatch, capsys):
    for words, status in (("list", "figures"), 0), (("run", "nothing"), 2):
        monkeypatch.setattr(sys, "argv", ["cbp_jax", *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(cli.__file__.replace("cli.py", "__main__.py"), run_name="__main__")
        printed = capsys.readouterr()
        assert stop.value.code == status == cli.main(words)
        assert printed == capsys.readouterr()


def test_the_command_leaves_sigterm_as_it_was(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["list"]) == 0 and signal.getsignal(signal.SIGTERM) is before


def test_the_command_can_be_called_after_jax_has_started(fake_run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_use_all_cores", USE_ALL_CORES)
    jax.devices()  # starts JAX, if no test has done so
    assert cli.main(["run", "online_permuted", "--preset", "smoke", "--quiet", "--out", str(tmp_path)]) == 0


def test_help_says_what_every_setting_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "online_permuted", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')} " in shown
    assert "Number of examples of each task; by default all of the dataset." in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "mnits"], "unknown dataset 'mnits'"),
        (["--dataset", ""], "dataset must be a name or the path of an array file, got ''"),
        (["--dataset", "one_class.npz"], "dataset must have at least 2 classes, and 'one_class' has 1"),
        (["--dataset", "damaged.npz"], "damaged.npz is damaged: its array 'x' cannot be read"),
        (["--dataset", "huge.npz"], "y of huge.npz must be below 100000"),
        (["--batch-size", "9999"], "batch_size must be an integer from 1 to 200; got 9999"),
        (["--examples-per-task", "0"], "examples_per_task must be an integer of at least 1; got 0"),
        (["--measured-examples", "999999999"], "measured_examples must be at most the 1797 examples that a task has"),
        (["--measure-every", "201"], "measure_every must be at most the 200 updates of a task, got 201"),
        (["--tasks", "1000000000000"], "tasks=1000000000000 and seeds=2 with 2 methods make results of"),
        (["--seeds", "99999999999"], "seeds=99999999999 with 2 methods make results of"),
        (["--network", "vit:patch=5"], "network 'vit': x must be images whose sides are multiples of patch=5"),
        (
            ["--network", "vit:depth=1", "--methods", "upgd:order=2"],
            "method 'upgd:order=2' needs the network's curvature: hesscale does not follow",
        ),
        (["--network", "resnet81"], "network 'resnet81': the network must be one of"),
        (["--network", "resnet18", "--activation", "tanh"], "activation must be 'relu', as network 'resnet18'"),
        (["--network", "vit", "--methods", "dropout"], "method 'dropout': network 'vit' has no dropout_rate"),
    ],
    ids=" ".join,
)
def test_mistakes_that_depend_on_the_data_are_reported_before_a_bar_is_shown_or_anything_written(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez("one_class.npz", x=images, y=np.zeros(40, int))
    np.savez("huge.npz", x=images, y=np.arange(40) * 10**15)
    np.savez_compressed("damaged.npz", x=images, y=np.arange(40) % 3)
    stored = pathlib.Path("damaged.npz").read_bytes()
    pathlib.Path("damaged.npz").write_bytes(stored[:900] + bytes(100) + stored[1000:])
    run = ["run", "online_permuted", "--preset", "smoke", *words, "--out", "run"]
    assert message in refused_in_one_line(capsys, *run) and not pathlib.Path("run").exists()


def test_settings_are_printed_one_per_line_as_they_would_be_given(fake_run, tmp_path, capsys):
    words = ["run", "online_permuted", "--preset", "smoke", "--hidden", "8", "9", "--quiet", "--out", str(tmp_path)]
    assert cli.main([*words, "--methods", "bp", "cbp:replacement_rate=1e-5"]) == 0
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith("online_permuted: Online Permuted MNIST (Dohare et al.")
    shown = dict(line.split(maxsplit=1) for line in lines)
    assert list(shown) == [field.name for field in dataclasses.fields(Settings)]
    assert shown["methods"] == "bp cbp:replacement_rate=1e-5" and shown["hidden"] == "8 9"
    assert shown["measure_every"] == "None"
    assert len({re.match(r"  \w+ +", line).end() for line in lines}) == 1  # aligned


def test_list_shows_networks(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in nets.NETWORKS) and "my_module:MyNet(width=64)" in shown


SMALL = ("run", "online_permuted", "--preset", "smoke", "--seeds", "2", "--hidden", "4", "--tasks", "2", "--quiet")
SMALL += ("--examples-per-task", "20", "--measured-examples", "10")


def test_a_log_has_a_line_for_each_task_and_method_and_reports_diverged_lanes(tmp_path, capsys):
    words = [*SMALL, "--methods", "bp", "bp:step_size=1e30", "--out", str(tmp_path), "--log", "jsonl", "tensorboard"]
    assert cli.main(words) == 0
    results = load_results(tmp_path)
    lost = [
        (str(results.method[i].item()), s)
        for i, s in zip(*np.nonzero(np.isfinite(results.diverged.values)), strict=True)
    ]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert lost and len(told) == len(lost)
    assert all(
        line.startswith(f"warning: {method} diverged with seed {seed} in task ")
        for line, (method, seed) in zip(told, lost, strict=True)
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    tasks = [line for line in lines if "diverged" not in line]
    assert [(line["method"], line["task"]) for line in tasks] == [
        (m, t) for t in range(2) for m in results.method.values
    ]
    assert len(lines) - len(tasks) == len(lost)
    for line in tasks[::2]:
        expected = results.loss.loc[{"method": "bp", "task": line["task"]}].mean()
        assert line["loss"] == pytest.approx(float(expected), rel=1e-5) and line["time"].endswith("+00:00")
    for line in tasks[1::2]:
        sick = results.loc[{"method": line["method"], "task": line["task"]}]
        left = sick.accuracy.values[~(sick.diverged.values <= line["task"])]
        assert line["accuracy"] == (pytest.approx(float(left.mean()), rel=1e-5) if left.size else None)
    written = sorted(path.parent.name for path in (tmp_path / "tensorboard").rglob("events.*"))
    assert written == ["bp", "bp_step_size=1e+30"]

    assert cli.main(["runs", str(tmp_path)]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    assert row.split()[:3] == [".", "online_permuted", "finished"] and "bp: accuracy " in row
    assert "folder must exist; there is none at" in refused_in_one_line(capsys, "runs", str(tmp_path / "absent"))
    quality = ["run", "utility_quality", "--preset", "smoke", "--log", "jsonl"]
    assert "--log must be left out: utility_quality does not report" in refused_in_one_line(capsys, *quality)
