import json

import numpy as np
import pytest

from cbp_jax import files, load_results, report, training
from cbp_jax.experiments import folder, stream

SETTINGS = stream.StreamSettings(methods=("bp", "cbp"), seeds=2, tasks=3)


def results_of(experiment="toy", settings=SETTINGS, measures=report.measures.MEASURES, labels=("bp", "cbp"), tasks=3):
    return report.new_results(
        labels, labels, [{}] * 2, seeds=2, tasks=tasks, settings=settings, experiment=experiment, measures=measures
    )


def as_by_another_version(**changes):
    """Return the JSON of settings of a version with other fields."""
    kept = json.loads(report.results.settings_json(SETTINGS)) | changes
    return {name: value for name, value in kept.items() if value is not ...}


@pytest.fixture
def finished(tmp_path):
    """Return a function that writes a run of four finished tasks and returns the contents of its folder."""

    def write(results):
        for task in (0, 1):
            report.record_task(results, task, {name: np.ones((2, 2)) for name in results.data_vars})
        report.save_results(results, tmp_path)
        (tmp_path / folder.STATE_FILE).write_bytes(b"a state")
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    return write


OTHERS = {
    "a field more, None by default": (
        results_of(settings=as_by_another_version(speed=None)),
        "speed is null there and unknown now",
    ),
    "a field less": (results_of(settings=as_by_another_version(measure_every=...)), "measure_every is unknown there"),
    "a field of another value": (results_of(settings=as_by_another_version(tasks=9)), "tasks is 9 there and 3 now"),
}
SHAPES = {
    "a measure less": (
        results_of(measures=dict(list(report.measures.MEASURES.items())[1:])),
        "measures only there: none, only now: accuracy",
    ),
    "a measure more": (
        results_of(measures=report.measures.MEASURES | {"speed": "how fast"}),
        "measures only there: speed, only now: none",
    ),
    "labels": (results_of(labels=("bp", "cbp(utility=contribution)")), "each method is named otherwise"),
    "tasks": (results_of(tasks=4), "each task is named otherwise, or there are 4 and 3"),
}


@pytest.mark.parametrize(("old", "message"), [*OTHERS.values(), *SHAPES.values()], ids=[*OTHERS, *SHAPES])
def test_a_run_of_another_version_is_refused_and_loses_nothing(finished, tmp_path, old, message):
    before = finished(old.copy(deep=True))
    with pytest.raises(ValueError) as refused, folder.opened(results_of(), tmp_path):
        raise AssertionError("the run goes on")
    text = str(refused.value)
    assert message in text and f"{tmp_path} holds 4 finished tasks" in text
    assert f"Choose another folder (--out), or move {tmp_path / 'results.nc'} and {tmp_path / 'state.msgpack'}" in text
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("old", "message"), OTHERS.values(), ids=OTHERS)
def test_the_command_refuses_it_before_it_starts(finished, tmp_path, old, message):
    before = finished(old.copy(deep=True))
    with pytest.raises(ValueError, match=message):
        folder.check(tmp_path, "toy", SETTINGS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_with_the_same_settings_is_resumed(finished, tmp_path):
    finished(results_of())
    folder.check(tmp_path, "toy", SETTINGS)
    with folder.opened(results_of(), tmp_path) as results:
        assert int(results.loss.notnull().sum()) == 8 and results.identical(load_results(tmp_path))
        with pytest.raises(BlockingIOError, match="in use by another run"):
            folder.check(tmp_path, "toy", SETTINGS)


@pytest.mark.parametrize("content", [b"", b"years of work"], ids=["empty", "text"])
def test_unreadable_results_are_kept_and_the_error_says_what_to_do(tmp_path, content):
    (tmp_path / "results.nc").write_bytes(content)
    for tried in (lambda: folder.check(tmp_path, "toy", SETTINGS), folder.opened(results_of(), tmp_path).__enter__):
        with pytest.raises(
            ValueError, match=r"results.nc is not a results file.* It is left as it is\. Choose another"
        ):
            tried()
    assert (tmp_path / "results.nc").read_bytes() == content


@pytest.mark.parametrize("settings", ["", "7", "[]"])
def test_foreign_results_are_refused(tmp_path, settings):
    results = results_of()
    results.attrs["settings"] = settings
    report.save_results(results, tmp_path)
    with pytest.raises(
        ValueError, match=r"not a results file of cbp_jax: its settings cannot be read\. Choose another"
    ):
        folder.check(tmp_path, "toy", SETTINGS)


def test_files_of_a_run_killed_before_its_first_results_do_not_block_the_folder(tmp_path):
    (tmp_path / files.LOCK_FILE).touch()
    files.partial(tmp_path / "results.nc").write_bytes(b"half of a file")
    folder.check(tmp_path, "toy", SETTINGS)


def test_the_last_results_are_on_disk_before_the_state_is_deleted(tmp_path, monkeypatch):
    """Otherwise a run that is killed in between has neither, and repeats all of its tasks."""
    with folder.kept(results_of(), tmp_path) as kept:
        checkpoint = training.Checkpoint(tmp_path / folder.STATE_FILE, "bp", lanes=[("bp", 0), ("bp", 1)])
        for task in range(3):
            report.record_task(kept.results, task, {"loss": np.ones((2, 2))})
        found = []
        monkeypatch.setattr(training.Checkpoint, "delete", lambda _: found.append(load_results(tmp_path)))
        kept.close(checkpoint)
    assert found[0].loss.notnull().all()
