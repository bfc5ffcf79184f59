"""A user's experiment: one object in one short file, run from Python and by its import path."""

import dataclasses
import pathlib
import re
import sys

import pytest

from cbp_jax import cli, experiments, load_results

# The experiment of the recipe, in a module of another name.
TEXT = (pathlib.Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
(OWN,) = re.findall(r"<!-- file: my_package/drifting.py -->\n```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "drifting_digits.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(cli, "_use_all_cores", lambda: None)
    yield tmp_path
    sys.modules.pop("drifting_digits", None)


def test_an_experiment_of_at_most_sixty_lines_runs_from_python_and_by_its_path(folder, trained, capsys):
    assert len(OWN.strip().splitlines()) <= 60
    from drifting_digits import drifting

    assert drifting.total(drifting.preset("smoke")) == 4
    results = drifting.run(drifting.preset("smoke"), folder / "python")
    assert results.attrs["experiment"] == "drifting" and dict(results.sizes) == {"method": 2, "seed": 1, "task": 2}
    assert [group.problem.input_shape for group in trained] == [(64,)] * 2
    with pytest.raises(ValueError, match="dataset must be left out: drifting has none; got 'mnist'"):
        drifting.preset("smoke", "mnist")
    words = ["run", "drifting_digits:drifting", "--preset", "smoke", "--largest", "3", "--network", "mlp:hidden=(5,6)"]
    assert cli.main([*words, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert "drifting: Digits whose brightness drifts.\n" in printed.err and "largest            3.0\n" in printed.err
    (out,) = (folder / "runs").iterdir()
    assert out.name.startswith("drifting-smoke-") and load_results(out).attrs["experiment"] == "drifting"
    assert "drifting: accuracy in percent" in printed.out


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("drifting_digits:Settings", "must be a cbp_jax.experiments.Experiment, got type"),
        ("absent_digits:drifting", "there is no module 'absent_digits' to import, and no experiment of that name"),
        ("drifting_digits:moving", "has no 'moving'"),
    ],
)
def test_objects_that_are_not_experiments_are_refused(folder, capsys, path, message):
    assert cli.main(["run", path, "--preset", "smoke"]) == 2
    assert message in capsys.readouterr().err


def test_every_experiment_is_found_by_its_name_and_its_path():
    for name, experiment in experiments.EXPERIMENTS.items():
        assert getattr(experiments, name) is experiment and experiment.NAME == experiment.name == name
        assert sys.modules[f"cbp_jax.experiments.{name}"] is experiment
        ours = name.startswith("question_") or name in ("streaming_control", "continual_minatar")  # from no paper
        presets = {"smoke", "laptop"} if ours else {"smoke", "laptop", "paper"}
        assert presets <= set(experiment.PRESETS) and experiment.about.endswith((".", "?"))
        for preset in experiment.presets:
            settings = experiment.preset(preset)
            assert type(settings) is experiment.Settings and experiment.check(settings)
            assert experiment.total(settings) >= settings.seeds


TOO_MUCH = [
    ({"tasks": 10**12}, r"tasks=1000000000000 and seeds=2 with 2 methods make results of .* GiB of memory"),
    ({"seeds": 99_999_999_999}, "seeds=99999999999 with 2 methods make results of"),
    ({"hidden": (10**9, 10**9)}, r"hidden=\(1000000000, 1000000000\) takes .* GiB for weights"),
    ({"seeds": 10**7, "tasks": 1}, "seeds=10000000 with 1 method that run together keep networks and optimizers of"),
]


@pytest.mark.parametrize(("change", "message"), [*TOO_MUCH[:-1], pytest.param(*TOO_MUCH[-1], marks=pytest.mark.slow)])
def test_runs_that_do_not_fit_in_memory_are_refused(change, message):
    online = experiments.online_permuted
    with pytest.raises(ValueError, match=message):
        online.prepare(dataclasses.replace(online.preset("smoke"), **{"hidden": (100, 100), **change}))


@pytest.mark.parametrize(
    ("name", "change"),
    [("slowly_changing_regression", {"examples_per_task": 10**12}), ("continual_imagenet", {"epochs": 10**12})],
)
def test_more_updates_than_an_int32_can_count_are_refused(name, change):
    experiment = experiments.EXPERIMENTS[name]
    with pytest.raises(ValueError, match=r"a task must have at most 2147483647 updates, and has [0-9]{10,}"):
        experiment.prepare(dataclasses.replace(experiment.preset("smoke"), **change))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("class_incremental", {"tasks": 10**12}),
        ("continual_imagenet", {"procedural_classes": 10**12}),
        ("continual_imagenet", {"train_per_class": 10**12}),
    ],
)
def test_images_that_do_not_fit_in_memory_are_refused(name, change):
    experiment = experiments.EXPERIMENTS[name]
    with pytest.raises(ValueError, match=r"[0-9]+ procedural images of [0-9x]+ take .* GiB of memory"):
        experiment.prepare(dataclasses.replace(experiment.preset("smoke"), **change))


@pytest.mark.parametrize("name", ["slippery_ant", "utility_quality", "slowly_changing_regression"])
def test_other_experiments_refuse_runs_that_do_not_fit_in_memory(name):
    experiment = experiments.EXPERIMENTS[name]
    with pytest.raises(ValueError, match=r"seeds=99999999999 with 1 methods? make results of"):
        settings = experiment.preset("smoke")
        methods = {"methods": settings.methods[:1]} if hasattr(settings, "methods") else {}
        experiment.prepare(dataclasses.replace(settings, seeds=99_999_999_999, **methods))
