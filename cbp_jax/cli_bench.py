"""`cbp-jax bench`: compares methods on the problems of a suite, with an equal tuning budget."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What --published is if no other results are to be shown.
NOTHING = "none"
# Where a source checkout has its published results; elsewhere there is no such folder.
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def main(argv: Sequence[str], before: Callable[[], None] = lambda: None) -> None:
    """Run the command.

    Args:
      argv: the arguments of the command.
      before: called before a user's module is imported.
    """
    args = _parser().parse_args(argv)
    from cbp_jax import bench, report
    from cbp_jax.cli_progress import Bar
    from cbp_jax.experiments.learners import LEARNERS

    report.drawing.check_formats(args.formats)
    if args.suite not in bench.SUITES:
        raise ValueError(f"suite must be one of {list(bench.SUITES)}, got {args.suite!r}")
    suite = bench.SUITES[args.suite]
    out = args.out or Path("runs") / f"bench-{suite.name}"
    published = _published(args.published, suite.name)
    folders = [out] if published is None or published.resolve() == out.resolve() else [out, published]
    if not args.method and not args.report:
        raise ValueError("--method must name the methods to run ('all' for every learner), unless --report is given")
    if published is not None and not published.is_dir():
        raise FileNotFoundError(f"--published must be a folder of results, got {published}")
    texts = list(LEARNERS) if args.method == ["all"] else args.method
    methods = []
    if texts:
        before()
        methods = [bench.read_method(text) for text in texts]
        pairs, left_out = bench.entries(suite, methods, out, args.problems)
        _tell(left_out)
        with Bar(bench.total(suite, pairs), args.quiet, percent=True) as bar:
            left_out = bench.run(suite, pairs, bar)
        _tell(left_out)
    problems, left_out = bench.collect(suite, [folder for folder in folders if folder.is_dir() or folder == out])
    _tell(left_out)
    paths = bench.write(suite, problems, out, tuple(args.formats))
    shown = [method.label for method in methods] or _methods(problems)
    print(f"{bench.title(suite, problems)}\n\n{bench.rows(suite, problems, shown)}\n")
    for path in paths:
        print(f"{'table' if path.suffix == '.md' else 'picture'}: {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cbp-jax bench",
        description="Tunes all methods with the same budget on the problems of a suite, runs the best settings with "
        "other seeds, and makes one table of all results.",
        epilog="To add one row to published results: cbp-jax bench --suite small --method my_module:my_factory",
    )
    parser.add_argument("--suite", default="small", help="small, full or smoke; `cbp-jax list` shows their problems")
    parser.add_argument(
        "--method",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="methods to run, as in `cbp-jax run --methods`. Settings given here are not tuned. 'all' is every "
        "learner. A function of your own is tuned over its attribute `space`, if it has one",
    )
    parser.add_argument("--problems", nargs="+", default=None, help="subset of the suite's problems; all by default")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for results, table and picture; by default runs/bench-SUITE"
    )
    parser.add_argument(
        "--published",
        default=None,
        metavar="DIR",
        help="folder of results that the table also shows; by default benchmarks/results/bench-SUITE of the source "
        "checkout, if cbp-jax is installed from one that has it; 'none' for no other results",
    )
    parser.add_argument("--report", action="store_true", help="only make the table and picture of existing results")
    parser.add_argument("--formats", nargs="+", default=["png"], help="formats of the picture, such as png pdf svg")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def _published(given: str | None, suite: str) -> Path | None:
    """Return the folder of published results, or None for no other results than those of the command."""
    if given is None:
        found = RESULTS / f"bench-{suite}"
        return found if found.is_dir() else None
    return None if given == NOTHING else Path(given)


def _tell(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"cbp-jax: {line}", file=sys.stderr)


def _methods(problems: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(method for results in problems.values() for method in results.method.values.tolist()))
