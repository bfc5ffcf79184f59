import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import cbp_jax
from cbp_jax import files
from cbp_jax.report import (
    join_results,
    list_runs,
    new_results,
    record_task,
    records,
    runs_table,
    save_results,
)


def run_of(folder, done, methods=("bp", "cbp"), tasks=3):
    results = new_results(methods, methods, [{}] * len(methods), seeds=2, tasks=tasks, settings={}, experiment="toy")
    for task in range(done):
        accuracy = 0.5 + 0.1 * np.arange(len(methods))[:, None] + 0.01 * np.arange(2)
        record_task(results, task, {"accuracy": accuracy, "loss": accuracy})
    save_results(results, folder)
    return results


def test_results_carry_device_command_and_commit(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/cbp-jax", "run", "toy", "--methods", "a b"])
    results = new_results(["bp"], ["bp"], [{}], seeds=1, tasks=1, settings={}, experiment="toy")
    assert results.attrs["command"] == "cbp-jax run toy --methods 'a b'"
    assert results.attrs["device"].startswith("cpu") and isinstance(results.attrs["commit"], str)
    monkeypatch.setattr(sys, "argv", [str(Path(cbp_jax.__file__).parent / "__main__.py"), "run", "toy"])
    assert records.origin()["command"] == "cbp-jax run toy"


def test_the_commit_is_that_of_the_package_and_not_of_a_repository_around_it(tmp_path):
    git = lambda *words: subprocess.run(
        ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words],
        check=True,
        capture_output=True,
    )
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    commit_of = records.commit_of.__wrapped__
    assert commit_of(package) == ""
    git("init")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-m", "of another project")
    assert commit_of(package) == ""
    git("add", "package")
    git("commit", "-m", "one")
    clean = commit_of(package)
    assert len(clean) == 40
    (tmp_path / "other").write_text("changed")
    assert commit_of(package) == clean
    (package / "__init__.py").write_text("x = 1")
    assert commit_of(package) == f"{clean} with changes"


def test_seconds_are_shared_by_methods_that_run_together_and_add_up():
    results = new_results(["a", "b"], ["a", "b"], [{}, {}], seeds=1, tasks=1, settings={}, experiment="toy")
    assert records.seconds_of(results) == {}
    records.add_seconds(results, ["a", "b"], 3.0)
    records.add_seconds(results, ["b"], 0.25)
    assert records.seconds_of(results) == {"a": 1.5, "b": 1.75}
    more = new_results(["a", "c"], ["a", "c"], [{}, {}], seeds=[7], tasks=1, settings={}, experiment="toy")
    records.add_seconds(more, ["a"], 1.0)
    assert records.seconds_of(join_results([results, more])) == {"a": 2.5, "b": 1.75}
    assert records.seconds_of(results) == {"a": 1.5, "b": 1.75}
    for _ in range(1000):  # tasks shorter than a millisecond
        records.add_seconds(more, ["c"], 1e-4)
    assert records.seconds_of(more)["c"] == pytest.approx(0.1)


def test_runs_below_a_folder_are_listed_with_state_and_headline(tmp_path):
    whole = run_of(tmp_path / "a" / "whole", 3)
    records.add_seconds(whole, ["bp", "cbp"], 700.0)
    records.add_seconds(whole, ["cbp"], 20.0)
    save_results(whole, tmp_path / "a" / "whole")
    run_of(tmp_path / "begun", 0)
    run_of(tmp_path / "c", 1)
    run_of(tmp_path / "d", 2)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.nc").write_bytes(b"half")
    (tmp_path / "c" / files.LOCK_FILE).touch()  # the lock file of a killed run
    with files.locked(tmp_path / "d"):
        runs = list_runs(tmp_path)
    states = {run.folder.name: run.state for run in runs}
    assert states.pop("broken").startswith("cannot be read: ")
    assert states == {
        "whole": "finished",
        "begun": "unfinished: 0 of 12 tasks",
        "c": "unfinished: 4 of 12 tasks",
        "d": "running: 8 of 12 tasks",
    }
    best = {run.folder.name: run.headline for run in runs}
    assert best["whole"].startswith("cbp: accuracy 60.50 ± ") and best["whole"].endswith("%") and best["begun"] == "-"
    table = runs_table(runs, tmp_path).splitlines()
    assert table[0].split()[:3] == ["run", "experiment", "state"] and table[2].startswith("a/whole ")
    seconds = {run.folder.name: run.seconds for run in runs}
    assert seconds.pop("whole") == pytest.approx(720) and np.isnan(list(seconds.values())).all()
    times = {row.split()[0]: row[table[0].index("time") :] for row in table[2:]}
    assert table[0].endswith("  time") and times == {"a/whole": "12 min", **dict.fromkeys(seconds, "-")}


def test_folders_without_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder must contain runs; neither .* nor a folder in it has a results\.nc"):
        list_runs(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder must exist; there is none at"):
        list_runs(tmp_path / "absent")


def test_committed_results_name_their_commit_and_no_folder_of_a_machine():
    published = sorted((Path(__file__).parents[2] / "benchmarks" / "results").rglob("*.nc"))
    assert published
    for path in published:
        with h5py.File(path) as file:  # faster than load_results
            attrs = dict(file.attrs)
        assert attrs.get("commit"), path.name
        assert not re.search(r"/(home|root|tmp|work|Users)/", " ".join(map(str, attrs.values()))), path.name
