import dataclasses
import json
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from cbp_jax.files import partial
from cbp_jax.report import join_results, load_results, new_results, record_task, save_results, stream_measures
from cbp_jax.report.measures import MEASURES, UPDATE_MEASURES
from cbp_jax.report.results import settings_json
from cbp_jax.report.storage import FILE_NAME


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int = 100
    methods: tuple[str, ...] = ("bp", "cbp")
    out: Path = Path("runs")
    step_sizes: np.ndarray = dataclasses.field(default_factory=lambda: np.array([0.01, 0.003]))
    limit: None = None


def small(**changes):
    arguments = dict(
        methods=["bp", "cbp(rate=1e-05)", "cbp(rate=0.0001)"],
        learners=["bp", "cbp", "cbp"],
        hyperparameters=[{"step_size": 0.01}, {"rate": 1e-5, "limit": None}, {"rate": 1e-4}],
        seeds=[3, 5],
        tasks=4,
        settings=Settings(),
        experiment="online_permuted",
    )
    return new_results(**{**arguments, **changes})


def test_new_results_are_all_nan_with_their_coordinates_and_settings():
    results = small()
    assert set(results.data_vars) == set(MEASURES)
    for variable in results.data_vars.values():
        assert variable.dims == ("method", "seed", "task") and variable.shape == (3, 2, 4)
        assert variable.dtype == np.float32 and variable.isnull().all()
    assert results.learner.values.tolist() == ["bp", "cbp", "cbp"]
    np.testing.assert_array_equal(results.rate, [np.nan, 1e-5, 1e-4])
    np.testing.assert_array_equal(results.step_size, [0.01, np.nan, np.nan])
    assert "limit" not in results.coords
    assert results.seed.values.tolist() == [3, 5] and small(seeds=2).seed.values.tolist() == [0, 1]
    assert results.attrs["experiment"] == "online_permuted"
    assert json.loads(results.attrs["settings"]) == {
        "width": 100,
        "methods": ["bp", "cbp"],
        "out": "runs",
        "step_sizes": [0.01, 0.003],
        "limit": None,
    }
    assert {"jax", "python", "cbp-jax"} <= set(json.loads(results.attrs["versions"]))


def test_measures_of_a_stream_follow_what_its_tasks_are():
    assert stream_measures() == MEASURES
    assert stream_measures(updates=True) == {**MEASURES, **UPDATE_MEASURES}
    tested = stream_measures(test=True, dormant=True)
    assert set(tested) - set(MEASURES) == {"test_accuracy", "test_loss", "dormant_units"}
    assert set(stream_measures(accuracy=False, test=True)) - set(MEASURES) == {"test_loss"}
    regression = stream_measures(accuracy=False, updates=True)
    assert list(regression) == [name for name in (*MEASURES, *UPDATE_MEASURES) if name != "accuracy"]
    results = small(measures=regression)
    assert list(results.data_vars) == list(regression) and "accuracy" not in results
    assert results.plasticity.attrs["long_name"] == UPDATE_MEASURES["plasticity"]
    with pytest.raises(ValueError, match="unknown measure 'accuracy'"):
        record_task(results, 0, {"accuracy": np.ones((3, 2))})
    with pytest.raises(ValueError, match="the name 'plasticity' is taken"):
        small(measures=regression, hyperparameters=[{"plasticity": 1.0}, {}, {}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["bp", "bp", "cbp"]}, "methods must be labels.*all different"),
        ({"methods": [], "learners": [], "hyperparameters": []}, "methods must be labels"),
        ({"learners": ["bp"]}, "learners must have one entry for each of the 3 methods; got 1"),
        ({"hyperparameters": [{}]}, "hyperparameters must have one entry"),
        (
            {"hyperparameters": [{}, {}, {"rate": "high"}]},
            r"rate of 'cbp\(rate=0.0001\)' must be a number; got 'high'",
        ),
        ({"hyperparameters": [{}, {}, {"loss": 1.0}]}, "the name 'loss' is taken"),
        ({"hyperparameters": [{}, {}, {"seed": 1.0}]}, "the name 'seed' is taken"),
        ({"texts": [{}]}, "texts must have one entry for each of the 3 methods; got 1"),
        ({"texts": [{}, {}, {"rate": "high"}]}, "texts: the name 'rate' is taken"),
        ({"seeds": 0}, "seeds must be"),
        ({"seeds": [1, 1]}, "seeds must be"),
        ({"tasks": 0}, "tasks must be at least 1; got 0"),
    ],
)
def test_new_results_refuses_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_record_task_writes_its_block_and_nothing_else():
    results = small()
    block = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    # Rows and columns have another order than in the results, so labels must decide, not positions.
    record_task(results, 2, {"accuracy": block}, methods=["cbp(rate=0.0001)", "bp"], seeds=jnp.array([5, 3]))
    expected = np.full((3, 2, 4), np.nan)
    expected[2, :, 2] = 2.0, 1.0
    expected[0, :, 2] = 4.0, 3.0
    np.testing.assert_array_equal(results.accuracy, expected)
    assert results.loss.isnull().all()
    record_task(results, 0, {"loss": np.arange(6.0).reshape(3, 2)})
    np.testing.assert_array_equal(results.loss[..., 0], np.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(results.accuracy, expected)


@pytest.mark.parametrize(
    ("task", "values", "where", "message"),
    [
        (4, {}, {}, "task: got .4.; these results have"),
        (-1, {}, {}, "task: got"),
        (0, {"speed": np.ones((3, 2))}, {}, "unknown measure 'speed'"),
        (0, {"loss": np.ones((2, 3))}, {}, r"loss must have the shape .* \(3, 2\); got \(2, 3\)"),
        (0, {}, {"methods": ["adam"]}, "method: got .'adam'."),
        (0, {}, {"methods": ["bp", "bp"]}, "method: got"),
        (0, {}, {"seeds": [0]}, "seed: got .0.; these results have, once each, .3, 5."),
    ],
)
def test_record_task_refuses_bad_arguments_and_then_writes_nothing(task, values, where, message):
    results = small()
    with pytest.raises(ValueError, match=message):
        record_task(results, task, {"accuracy": np.ones((3, 2)), **values}, **where)
    assert results.accuracy.isnull().all()


@pytest.mark.parametrize("of", ["folder", "file"])
def test_results_come_back_from_their_file(tmp_path, of):
    results = small()
    record_task(results, 0, {"accuracy": np.full((3, 2), 0.1)})
    path = save_results(results, tmp_path / "deep" / "run")
    assert path == tmp_path / "deep" / "run" / FILE_NAME
    loaded = load_results(path if of == "file" else path.parent)
    xr.testing.assert_identical(loaded, results)
    path.unlink()  # loaded results are in memory and can be changed
    record_task(loaded, 1, {"accuracy": np.full((3, 2), 0.2)})
    assert int(loaded.accuracy.notnull().sum()) == 12


def test_an_interrupted_save_leaves_the_last_results(tmp_path, monkeypatch):
    results = small()
    record_task(results, 0, {"accuracy": np.ones((3, 2))})
    save_results(results, tmp_path)
    before = results.copy(deep=True)
    record_task(results, 1, {"accuracy": np.ones((3, 2))})

    def killed(descriptor):  # when all of the file but its end has been written
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save_results(results, tmp_path)
    xr.testing.assert_identical(load_results(tmp_path), before)
    (tmp_path / f".{FILE_NAME}.part").write_bytes(b"what a kill leaves, which runs no cleaning up")
    monkeypatch.undo()
    save_results(results, tmp_path)
    xr.testing.assert_identical(load_results(tmp_path), results)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_full_disk_is_reported_and_leaves_the_last_results(tmp_path):
    save_results(small(), tmp_path)
    partial(tmp_path / FILE_NAME).symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=rf"{FILE_NAME} cannot be written: no space left on device, and it takes .* bytes"
    ):
        save_results(small(tasks=9), tmp_path)
    xr.testing.assert_identical(load_results(tmp_path), small())
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_one_flipped_bit_of_the_data_is_found(tmp_path):
    results = small()
    record_task(results, 0, {"loss": np.full((3, 2), 0.123)})
    content = bytearray(save_results(results, tmp_path).read_bytes())
    content[content.index(np.float32(0.123).tobytes())] ^= 1
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{FILE_NAME} is not a results file: it cannot be read"):
        load_results(tmp_path)


def test_reading_during_a_save_gives_the_last_results(tmp_path):
    path = save_results(small(), tmp_path)
    last = path.read_bytes()
    with path.open("rb") as reader:
        save_results(small(tasks=9), tmp_path)
        assert reader.read() == last != path.read_bytes()


def test_save_results_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="run_dir must be a folder"):
        save_results(small(), tmp_path / "file")


def test_load_results_says_why_a_file_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; give the folder of a run"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no results\.nc"):
        load_results(tmp_path)
    (tmp_path / "notes.txt").write_text("not netCDF")
    with pytest.raises(ValueError, match=r"notes\.txt is not a results file: it cannot be read"):
        load_results(tmp_path / "notes.txt")
    xr.Dataset({"x": ("time", [1.0])}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match=r"other\.nc is not .* has no experiment, settings, seed, task"):
        load_results(tmp_path / "other.nc")
    whole = save_results(small(), tmp_path).read_bytes()
    (tmp_path / "cut.nc").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.nc is not a results file"):
        load_results(tmp_path / "cut.nc")


@pytest.mark.parametrize("module", ["xarray", "h5netcdf", "h5py"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, module):
    results = small()
    monkeypatch.setitem(sys.modules, module, None)
    for call in (lambda: save_results(results, tmp_path), lambda: load_results(tmp_path)):
        with pytest.raises(ImportError, match=rf'need {module}: pip install "cbp-jax\[report\]"'):
            call()


def filled(number, **changes):
    results = small(**changes)
    for measure in results.data_vars.values():
        measure.values[...] = number + np.arange(measure.size, dtype=np.float32).reshape(measure.shape)
    return results


def test_results_of_other_seeds_and_methods_are_joined():
    first, second = filled(0), filled(100, seeds=[1])
    of_adam = {"hyperparameters": [{"step_size": 0.1}], "texts": [{"reset": "head"}]}
    third = filled(200, methods=["adam"], learners=["adam"], **of_adam, seeds=[3, 1])
    joined = join_results([first, second, third])
    assert joined.method.values.tolist() == ["bp", "cbp(rate=1e-05)", "cbp(rate=0.0001)", "adam"]
    assert joined.seed.values.tolist() == [1, 3, 5] and joined.attrs == first.attrs
    assert joined.learner.values.tolist() == ["bp", "cbp", "cbp", "adam"]
    np.testing.assert_array_equal(joined.step_size, [0.01, np.nan, np.nan, 0.1])
    assert joined.reset.values.tolist() == ["", "", "", "head"]
    for part in (first, second, third):
        labels = {"method": part.method.values, "seed": part.seed.values}
        np.testing.assert_array_equal(joined.accuracy.loc[labels], part.accuracy)
        assert joined.accuracy.dims == part.accuracy.dims
    assert np.isnan(joined.accuracy.loc[{"method": "adam", "seed": 5}]).all()
    assert join_results([first]).identical(first)


def test_joined_results_name_the_commits_and_commands_of_all_parts():
    parts = [small(seeds=[seed]).assign_attrs(commit=commit) for seed, commit in enumerate(("a", "b", "a", ""))]
    parts = [part.assign_attrs(command=f"run --first-seed {min(seed, 2)}") for seed, part in enumerate(parts)]
    joined = join_results(parts).attrs
    assert joined["commit"] == "a, b"
    assert joined["command"] == "run --first-seed 0; run --first-seed 1; run --first-seed 2"


def test_joined_settings_have_the_seeds_and_methods_of_all_parts():
    settings = [{"seeds": 1, "first_seed": seed, "methods": ["bp"], "tasks": 2} for seed in (3, 4)]
    joined = join_results([small(seeds=[own["first_seed"]], settings=own) for own in settings])
    assert json.loads(joined.attrs["settings"]) == {"seeds": 2, "first_seed": 3, "methods": ["bp"], "tasks": 2}
    settings[1]["tasks"] = 9
    with pytest.raises(ValueError, match="must have the same settings, got 'bp' with tasks=2 and 9"):
        join_results([small(seeds=[own["first_seed"]], settings=own) for own in settings])


def test_long_names_of_methods_survive_being_joined_to_loaded_short_ones(tmp_path):
    names = ["bp", "cbp(replacement_rate=1e-05)"]
    parts = [small(methods=[name], learners=[name[:3]], hyperparameters=[{}], tasks=1) for name in names]
    loaded = [load_results(save_results(part, tmp_path / str(number))) for number, part in enumerate(parts)]
    joined = load_results(save_results(join_results(loaded), tmp_path / "joined"))
    assert joined.method.values.tolist() == names and joined.learner.values.tolist() == ["bp", "cbp"]


def test_incompatible_results_are_not_joined():
    with pytest.raises(ValueError, match="parts must be results, got none"):
        join_results([])
    with pytest.raises(ValueError, match=r"different methods, seeds or settings, got 'bp', seed 5 twice"):
        join_results([small(), small(seeds=[5, 7])])
    with pytest.raises(ValueError, match=r"of one experiment, got \['online_permuted', 'other'\]"):
        join_results([small(), small(seeds=[7], experiment="other")])


def test_settings_that_are_functions_are_stored_by_import_path():
    """Another process, in which they have another address, can then resume the run."""
    kept = settings_json({"utilities": ("weight", load_results)})
    assert json.loads(kept) == {"utilities": ["weight", "cbp_jax.report.storage:load_results"]}
