"""Makes the table and the picture of a benchmark from its files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbp_jax import report
from cbp_jax.bench.running import is_complete, name_of
from cbp_jax.bench.suites import Problem, Suite
from cbp_jax.experiments.learners import looks_by_learner
from cbp_jax.report import looks

TABLE, PICTURE = "table.md", "table"


def collect(suite: Suite, folders: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
    """Load the finished results of all folders, by problem.

    Args:
      suite: the problems.
      folders: folders of benchmarks, with files `<problem>/<method>/results.nc`. If several have a method, the first
        counts.

    Returns:
      by problem, the results of all methods; and a line for each file that was left out because it is not finished.

    Raises:
      FileNotFoundError: a folder does not exist, or there are no finished results.
      ValueError: a file holds other results, or results of other settings or another version of the suite.
    """
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
    problems, left_out = {}, []
    for problem in suite.problems:
        parts: dict[str, Any] = {}
        for path in (path for folder in folders for path in sorted((folder / problem.name).glob("*/results.nc"))):
            results = report.load_results(path)
            _check(suite, problem, results, path)
            if not is_complete(results):
                left_out.append(f"{path} is left out: it is not finished")
                continue
            parts.setdefault(results.method.item(), results)
        if parts:
            problems[problem.name] = _joined(list(parts.values()))
    if not problems:
        found = "; ".join(left_out) or f"no files <problem>/<method>/results.nc of suite {suite.name!r}"
        raise FileNotFoundError(f"there are no finished results in {', '.join(map(str, folders))}: {found}")
    return problems, left_out


def write(suite: Suite, problems: dict[str, Any], out: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write the table of a benchmark as Markdown, and its picture, and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    counted = _counted(suite, problems)
    path = out / TABLE
    path.write_text(report.benchmark_table(problems, counted, title=title(suite, problems)))
    return [path, *report.save_figures({PICTURE: report.plot_benchmark(problems, counted)}, out, formats)]


def rows(suite: Suite, problems: dict[str, Any], methods: Sequence[str]) -> str:
    """Return the rows of some methods in the table of all problems, as Markdown."""
    return report.benchmark_rows(problems, methods, _counted(suite, problems))


def title(suite: Suite, problems: dict[str, Any]) -> str:
    """Return the heading of the table, with the budget."""
    seeds = sorted({results.sizes["seed"] for results in problems.values()})
    return (
        f"Suite {suite.name}: the best of {suite.configurations} configurations over {suite.tuning_seeds} tuning "
        f"seed{'s' * (suite.tuning_seeds > 1)}, run with {' or '.join(map(str, seeds))} others"
    )


def _counted(suite: Suite, problems: dict[str, Any]) -> list[str]:
    """Return the counted problems among those with results; all of these if none is counted."""
    return [name for name in suite.counted if name in problems] or list(problems)


def _joined(parts: Sequence[Any]) -> Any:
    """Return the results of all methods, with their colors and labels."""
    found = {name: look for part in parts for name, look in looks.looks_of(part).items()}
    joined = report.join_results(parts)
    known = looks_by_learner(list(found))
    return joined.assign_attrs({looks.ATTRIBUTE: looks.to_json({**found, **known})})


def _check(suite: Suite, problem: Problem, results: Any, path: Path) -> None:
    """Raise a ValueError if results were not made with the suite's settings."""
    try:
        kept = json.loads(results.attrs["settings"])
        expected = json.loads(report.results.settings_json(suite.budget(problem)))
        differing = [name for name, value in expected.items() if kept.get(name) != value]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no results of a benchmark: its settings cannot be read") from error
    other_problem = {"suite", "problem"} & set(differing)
    if other_problem or results.attrs["experiment"] != name_of(suite, problem) or results.sizes.get("method") != 1:
        raise ValueError(
            f"{path} holds no results of {name_of(suite, problem)}, but of {results.attrs['experiment']!r}"
        )
    if differing:
        raise ValueError(
            f"{path} holds results of suite {suite.name!r} with other settings ({', '.join(differing)}), or of "
            "another version of it: they cannot be compared with those of this one"
        )
