import dataclasses
import json
import pathlib
import shutil

import numpy as np
import optax
import pytest

from cbp_jax import bench, cli, cli_bench, load_results
from cbp_jax.bench import SMALL, SMOKE, SUITES, running
from cbp_jax.experiments.learners import LEARNERS, parse_method
from cbp_jax.report.benchmarks import COST

PROBLEM = "slowly_changing_regression"
pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Give all tests of a process the same devices, whichever runs first; times are not measured."""
    monkeypatch.setattr(cli, "_use_all_cores", lambda: None)
    monkeypatch.setattr(running, "relative_cost", cost)


def cost(problem, method, tasks):
    return {"bp": 1.0}.get(method.learner, 1.5)


@pytest.mark.slow
def test_all_problems_of_a_suite_run(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(cli, "_use_all_cores", lambda: None)
    assert cli.main(["bench", "--suite", "smoke", "--method", "bp", "cbp", "--out", str(tmp_path), "--quiet"]) == 0
    assert len(rows_of(capsys.readouterr().out)) == 2
    for path in tmp_path.glob("*/*/results.nc"):
        assert load_results(path)[COST].item() > 0
    page = (tmp_path / "table.md").read_text()
    assert len(rows_of(page)) == 6 and "(1 problem)" not in page and "nan" not in page


@pytest.mark.slow
def test_an_expensive_method_has_a_high_cost(monkeypatch):
    monkeypatch.undo()
    problem = dataclasses.replace(SMOKE.problems[1], settings=SMOKE.problems[1].changed(examples_per_task=20_000))
    assert bench.relative_cost(problem, parse_method("bp:step_size=0.1"), 4) == 1
    assert bench.relative_cost(problem, parse_method("muon"), 4) > 2


@pytest.fixture(scope="module")
def published(tmp_path_factory, compiled_once):
    """Run the command with two methods on a problem of the suite smoke, and return the results."""
    out = tmp_path_factory.mktemp("bench") / "published"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_use_all_cores", lambda: None)
        patch.setattr(running, "relative_cost", cost)
        words = ["bench", "--suite", "smoke", "--method", "bp", "l2", "--problems", PROBLEM, "--out", str(out)]
        assert cli.main([*words, "--quiet"]) == 0
    return out


def rows_of(page):
    return [line for line in page.splitlines() if line.startswith("| `")]


def test_a_suite_runs_from_end_to_end(published, capsys):
    files = sorted(path.relative_to(published).as_posix() for path in published.glob("*/*/results.nc"))
    assert files == [f"{PROBLEM}/{method}/results.nc" for method in ("bp", "l2")]
    results = load_results(published / PROBLEM / "l2")
    assert results.seed.values.tolist() == [0, 1] and results.tuning_seed.values.tolist() == [1000]
    tried = json.loads(results.configurations.item())
    assert len(tried) == SMOKE.configurations and set(tried[0]) == {"step_size", "l2"}
    best = tried[int(np.argmin(results.tuning_performance.values.mean(-1)))]
    assert parse_method(results.chosen.item()).hyperparameters.items() >= best.items()
    assert results[COST].item() == 1.5 and load_results(published / PROBLEM / "bp")[COST].item() == 1
    page = (published / "table.md").read_text()
    assert "best of 2 configurations over 1 tuning seed, run with 2 others" in page
    assert (published / "table.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # The same table can be made from the files only.
    (published / "table.md").unlink()
    assert cli.main(["bench", "--suite", "smoke", "--out", str(published), "--report", "--formats", "svg"]) == 0
    assert (published / "table.md").read_text() == page and (published / "table.svg").exists()
    assert set(rows_of(capsys.readouterr().out)) <= set(rows_of(page))


@pytest.mark.slow
def test_a_transformation_of_another_package_is_a_row_by_one_command(published, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent)
    before = {path: path.read_bytes() for path in published.rglob("*.nc")}
    out = tmp_path / "mine"
    words = ["--suite", "smoke", "--published", str(published), "--out", str(out), "--quiet"]
    assert cli.main(["bench", *words, "--method", "toy_package:signed", "--problems", PROBLEM]) == 0
    (row,) = rows_of(capsys.readouterr().out)
    assert row.startswith("| `toy_package:signed` | ")
    assert row in (out / "table.md").read_text() and (out / "table.png").exists()
    overall = (out / "table.md").read_text().split("## ")[1]
    assert [line.split("`")[1] for line in sorted(rows_of(overall))] == ["bp", "l2", "toy_package:signed"]
    assert {path.parent.name for path in out.glob("*/*/results.nc")} == {"toy_package_signed"}
    results = load_results(out / PROBLEM / "toy_package_signed")
    tried = [each["learning_rate"] for each in json.loads(results.configurations.item())]
    assert len(set(tried)) == SMOKE.configurations and all(1e-4 <= rate <= 1e-2 for rate in tried)
    assert {path: path.read_bytes() for path in published.rglob("*.nc")} == before


def test_results_of_the_source_checkout_are_the_published_ones(published, tmp_path, monkeypatch):
    for name, folder in (("bp", tmp_path / "mine"), ("l2", tmp_path / "checkout" / "bench-smoke")):
        shutil.copytree(published / PROBLEM / name, folder / PROBLEM / name)
    monkeypatch.setattr(cli_bench, "RESULTS", tmp_path / "checkout")

    def shown(out, *words):
        assert cli.main(["bench", "--suite", "smoke", "--report", "--out", str(out), *words]) == 0
        return sorted({line.split("`")[1] for line in rows_of((out / "table.md").read_text())})

    out = tmp_path / "mine"
    assert shown(out) == ["bp", "l2"]
    assert shown(out, "--published", "none") == ["bp"]
    monkeypatch.setattr(cli_bench, "RESULTS", tmp_path / "wheel")
    assert shown(out) == ["bp"]
    monkeypatch.setattr(cli_bench, "RESULTS", tmp_path / "checkout")
    shutil.copytree(out / PROBLEM / "bp", tmp_path / "checkout" / "bench-smoke" / PROBLEM / "bp")
    assert shown(tmp_path / "checkout" / "bench-smoke") == ["bp", "l2"]  # the published folder itself


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_results(published, tmp_path):
    method = parse_method("l2")
    pairs, _ = bench.entries(SMOKE, [method], tmp_path, [PROBLEM])
    counted, total = 0, bench.total(SMOKE, pairs)

    def stop(methods, lanes, measures):
        nonlocal counted
        assert methods == "slowly_changing_regression, l2"
        counted += lanes
        if counted > 0.7 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(SMOKE, pairs, stop)
    assert not running.finished(pairs[0].out) and bench.total(SMOKE, pairs) == total
    assert bench.run(SMOKE, pairs) == []
    whole, again = (load_results(folder / pairs[0].problem.name / "l2") for folder in (published, tmp_path))
    assert again.drop_vars(COST).identical(whole.drop_vars(COST))
    assert bench.total(SMOKE, pairs) == 0
    bench.run(SMOKE, pairs, stop)  # nothing is left to run


def test_every_learner_runs_on_a_problem_of_the_small_suite():
    counted = {}
    for problem in SMALL.problems:
        for name in LEARNERS:
            try:
                assert SMALL.plan(problem, parse_method(name)).check() == [name]
            except ValueError as error:
                counted.setdefault(name, []).append((problem.name, str(error)))
    ((name, message),) = counted.pop("c_chain")
    assert name == "class_incremental" and "has no reference batches" in message and not counted


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_suites_are_fair(suite):
    names = [problem.name for problem in suite.problems]
    assert len(set(names)) == len(names) and set(suite.counted) <= set(names)
    for problem in suite.problems:
        plan = suite.plan(problem, parse_method("adam"))
        assert plan.check() == ["adam"] and len(plan.tried()["adam"]) == suite.configurations
        assert plan.tuning.seeds == suite.tuning_seeds
        json.dumps(json.loads(bench.running.report.results.settings_json(suite.kept(problem, parse_method("adam")))))


def test_given_settings_are_not_searched():
    fixed = SMOKE.plan(SMOKE.problems[0], parse_method("bp:step_size=0.02"))
    assert [method.text for method in fixed.tried()["bp(step_size=0.02)"]] == ["bp:step_size=0.02"]
    plan = SMOKE.plan(SMOKE.problems[0], bench.read_method(f"{__name__}:own(learning_rate=0.5)"))
    (tried,) = plan.tried().values()
    assert [method.hyperparameters["learning_rate"] for method in tried] == [0.5]


def own(learning_rate, factor=1.0):
    return optax.sgd(learning_rate * factor)


own.space = {"learning_rate": (0.1, 0.2)}


def refused(capsys, *words):
    assert cli.main(["bench", "--suite", "smoke", "--quiet", *words]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("cbp-jax: error: ")
    return error


def test_mistakes_are_reported_before_anything_is_run(published, tmp_path, capsys):
    out = ("--out", str(tmp_path / "out"))
    assert "--method must name the methods to run" in refused(capsys, *out)
    assert "suite must be one of ['small', 'ant', 'full', 'smoke'], got 'x'" in refused(
        capsys, *out, "--suite", "x", "--report"
    )
    assert "problems must be some of ['online_permuted'" in refused(capsys, *out, "--method", "bp", "--problems", "x")
    assert "the learner must be one of" in refused(capsys, *out, "--method", "bq")
    assert "methods must differ" in refused(capsys, *out, "--method", "bp", "bp")
    assert "--published must be a folder" in refused(capsys, *out, "--report", "--published", str(tmp_path / "no"))
    assert "there is no folder" in refused(capsys, *out, "--report")
    assert not (tmp_path / "out").exists()
    words = ("--method", "bp:hidden=8,normalization=x", *out)
    assert "normalization must be one of" in refused(capsys, *words)


def test_a_method_that_a_problem_refuses_is_left_out_there(monkeypatch, tmp_path):
    refusing = dataclasses.replace(SMOKE.problems[0], settings=SMALL.problem("class_incremental").settings)
    refusing = dataclasses.replace(refusing, name="refusing", experiment=SMALL.problem("class_incremental").experiment)
    absent = dataclasses.replace(SMOKE.problems[1], name="absent", needs="no_such_package")
    suite = dataclasses.replace(SMOKE, problems=(SMOKE.problems[0], refusing, absent))
    pairs, left_out = bench.entries(suite, [parse_method("c_chain"), parse_method("bp")], tmp_path)
    assert [(pair.problem.name, pair.method.label) for pair in pairs] == [
        *(("online_permuted", "c_chain"), ("online_permuted", "bp"), ("refusing", "bp"))
    ]
    assert len(left_out) == 2 and "has no reference batches" in left_out[0]
    assert left_out[1] == "absent is left out: it needs no_such_package"
    with pytest.raises(ValueError, match="has no reference batches"):
        bench.entries(suite, [parse_method("c_chain")], tmp_path, ["refusing"])


def test_a_space_of_values_only_is_a_grid_within_the_budget(monkeypatch):
    monkeypatch.setattr(own, "space", {"learning_rate": (0.1, 0.2)})
    plan = SMOKE.plan(SMOKE.problems[0], bench.read_method(f"{__name__}:own"))
    (tried,) = plan.tried().values()
    assert [method.hyperparameters["learning_rate"] for method in tried] == [0.1, 0.2]
    monkeypatch.setattr(own, "space", {"learning_rate": (0.1, 0.2, 0.3)})
    with pytest.raises(ValueError, match=r"must have at most 2 combinations of values, .*, got 3 of learning_rate 0.1"):
        SMOKE.plan(SMOKE.problems[0], bench.read_method(f"{__name__}:own"))
    monkeypatch.setattr(own, "space", {"learning_rate": 0.1})
    with pytest.raises(ValueError, match=r"own: space must have a LogUniform or a tuple of values"):
        bench.read_method(f"{__name__}:own")


def test_results_of_another_budget_are_not_compared(published, tmp_path):
    more = dataclasses.replace(SMOKE, configurations=3)
    with pytest.raises(ValueError, match=r"other settings \(configurations\), or of another version of it"):
        bench.collect(more, [published])
    with pytest.raises(ValueError, match="configurations is 2 there and 3 now"):
        bench.entries(more, [parse_method("l2")], published)
    shutil.copytree(published / PROBLEM, tmp_path / "online_permuted")
    with pytest.raises(ValueError, match="holds no results of smoke/online_permuted, but of 'smoke/slowly"):
        bench.collect(SMOKE, [tmp_path])
    with pytest.raises(FileNotFoundError, match=r"no files <problem>/<method>/results.nc of suite 'small'"):
        bench.collect(SMALL, [tmp_path / "online_permuted"])


def test_unfinished_results_are_reported_and_left_out(published, tmp_path):
    from cbp_jax import report

    shutil.copytree(published / PROBLEM, tmp_path / PROBLEM)
    results = load_results(tmp_path / PROBLEM / "l2")
    results.replaced_units.values[:, :, -1] = np.nan
    report.save_results(results, tmp_path / PROBLEM / "l2")
    problems, left_out = bench.collect(SMOKE, [tmp_path])
    assert problems[PROBLEM].method.values.tolist() == ["bp"]
    assert left_out == [f"{tmp_path / PROBLEM / 'l2' / 'results.nc'} is left out: it is not finished"]


def test_progress_shows_percents_and_time_left(capsys):
    from cbp_jax.cli_progress import Bar

    with Bar(10, percent=True) as bar:
        bar("digits, bp", 5, {"accuracy": 0.5})
    shown = capsys.readouterr().err
    assert "%" in shown and "<" in shown and "task" not in shown
