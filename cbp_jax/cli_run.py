"""`cbp-jax run`: runs an experiment, prints its table and draws its pictures."""

import argparse
import dataclasses
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cbp_jax import cli_processes, cli_show


class _Asked(NamedTuple):
    """The parsed command line.

    Attributes:
      given: the options that all experiments have.
      processes: the options about several processes.
      share: this process, if there are several; otherwise None.
      experiment: the experiment to run.
      start: the settings of the preset.
      settings: the settings of the preset, changed by the options of the experiment.
      out: the folder of the run.
    """

    given: argparse.Namespace
    processes: cli_processes.Given
    share: Any
    experiment: Any
    start: Any
    settings: Any
    out: Path


def main(argv: Sequence[str], before: Callable[[], None] = lambda: None) -> None:
    """Run the command.

    Args:
      argv: the arguments of the command.
      before: called before a user's module is imported.
    """
    asked = _read(argv, before)
    if asked is None:
        return
    job = _prepare(asked, before)
    if asked.given.plan:
        _time(asked, job)
        return
    _announce(asked, job)
    results = _run_alone(asked, job) if asked.share is None else _run_share(asked, job)
    if results is not None:
        _report(asked, results)


def _read(argv: Sequence[str], before: Callable[[], None]) -> _Asked | None:
    """Read the command line. If it names no experiment, print the help and return None."""
    from cbp_jax.experiments import learners

    parser = _parser()
    given, rest = parser.parse_known_args(argv)
    processes = cli_processes.read(given)
    grid = learners.read_grid(given.grid)
    if given.experiment is None:
        parser.print_help()
        return None
    share = processes.share
    if processes.detect and not given.help and not given.plan:
        share = cli_processes.meet(processes)  # may choose devices, so it must come before JAX starts
    experiment = _experiment(given.experiment, before)
    start = experiment.preset(given.preset, given.dataset)
    if given.help:
        parser.print_help()
        rest = ["--help"]
    settings = _parse(f"cbp-jax run {given.experiment}", start, rest)
    if grid:
        settings = _swept(experiment, settings, grid)
    out = given.out or Path("runs") / f"{experiment.name}-{given.preset}-{_hash(settings)}"
    if share is not None and share.count == 1:
        share = None
    return _Asked(given, processes, share, experiment, start, settings, out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cbp-jax run",
        add_help=False,
        allow_abbrev=False,  # --lanes is a setting of the experiment
        description="Runs an experiment. `cbp-jax run EXPERIMENT --preset NAME --help` lists its options.",
    )
    parser.add_argument(
        "experiment", nargs="?", help="a name that `cbp-jax list` shows, or the path of one: my_module:my_experiment"
    )
    parser.add_argument(
        "--preset",
        default="laptop",
        help="settings to start from: smoke, laptop, paper, or another that `cbp-jax list` shows",
    )
    parser.add_argument("--dataset", default=None, help="dataset of images; the preset's sizes may depend on it")
    parser.add_argument("--out", type=Path, default=None, help="folder for results and pictures; by default runs/...")
    parser.add_argument(
        "--grid",
        nargs="+",
        default=[],
        metavar="SETTING=VALUE,VALUE",
        help="run every method that has these settings, with every combination of their values, such as "
        "replacement_rate=1e-4,1e-5 step_size=0.01,0.003",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="only print what would be compiled, how many lanes (methods times seeds) would run, their memory, and how "
        "long it would take: for this, each program is compiled, and its first tasks are run and timed",
    )
    parser.add_argument(
        "--lanes-at-once",
        type=int,
        default=None,
        metavar="N",
        help="maximum number of lanes on the devices at once, by default as many as fit. Fewer need less memory; the "
        "results are the same",
    )
    parser.add_argument(
        "--log",
        nargs="+",
        default=[],
        choices=["jsonl", "tensorboard"],
        help="also log each finished task: a line of JSON for each task and method (log.jsonl), or TensorBoard scalars",
    )
    parser.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="compile everything again. Otherwise compiled programs are cached in the user's cache folder, or in "
        "JAX_COMPILATION_CACHE_DIR",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("-h", "--help", action="store_true")
    cli_processes.add_options(parser)
    return parser


def _experiment(name: str, before: Callable[[], None]) -> Any:
    """Return the experiment of a name or an import path."""
    from cbp_jax import by_path, experiments

    if name in experiments.EXPERIMENTS:
        return experiments.EXPERIMENTS[name]
    if ":" in name:
        before()
    found = by_path.read(name, "experiment")
    if found is None:
        raise ValueError(f"experiment must be one of {list(experiments.EXPERIMENTS)}, got {name!r}")
    if not isinstance(found.value, experiments.Experiment):
        raise ValueError(f"{name} must be a cbp_jax.experiments.Experiment, got {type(found.value).__name__}")
    return found.value


def _parse(program: str, start: Any, argv: list[str]) -> Any:
    """Parse the settings of the experiment, with `start` as defaults."""
    try:
        tyro = importlib.import_module("tyro")
    except ImportError as error:
        raise ImportError('the command line needs tyro: pip install "cbp-jax[cli]"') from error
    return tyro.cli(type(start), prog=program, default=start, args=argv, config=(tyro.conf.FlagConversionOff,))


def _swept(experiment: Any, settings: Any, grid: dict[str, tuple[str, ...]]) -> Any:
    """Return the settings with a method for each combination of the grid's values."""
    from cbp_jax.experiments import learners

    methods = experiment.check(settings)
    if not hasattr(settings, "methods") or not all(isinstance(method, learners.Method) for method in methods):
        raise ValueError(f"grid must be left out: {experiment.name} does not compare learners; got {' '.join(grid)}")
    return dataclasses.replace(settings, methods=learners.expand(settings.methods, grid))


def _hash(settings: Any) -> str:
    text = json.dumps(dataclasses.asdict(settings), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _prepare(asked: _Asked, before: Callable[[], None]) -> Any:
    """Check the folder, the settings and the options, and prepare the run."""
    from cbp_jax import cli_compiled
    from cbp_jax.experiments import folder

    given, experiment, settings, share = asked.given, asked.experiment, asked.settings, asked.share
    if not given.no_compilation_cache and (kept := cli_compiled.keep_compiled()):
        print(f"compiled programs are cached in {kept} (turn this off by --no-compilation-cache)", file=sys.stderr)
    if not given.plan:
        folder.check(asked.out, experiment.name, settings, share)
    before()  # preparing may import a user's module, which may start JAX
    asked_for = [name for name, value in vars(settings).items() if value != getattr(asked.start, name)]
    how = {} if share is None else {"processes": share.count}
    job = experiment.prepare(settings, asked_for, lanes_at_once=given.lanes_at_once, **how)
    _check_options(asked, job)
    return job


def _check_options(asked: _Asked, job: Any) -> None:
    """Raise a ValueError for an option that this run cannot have."""
    given, name, share = asked.given, asked.experiment.name, asked.share
    has_plan = getattr(job, "plan", None) is not None
    if share is not None:
        if not has_plan:
            raise ValueError(f"processes must be left out: several processes cannot share the methods of {name}")
        if given.log:
            raise ValueError(
                f"--log must be left out with several processes, since none of them has all lanes; got {given.log}"
            )
        share.check(job.num_lanes())
    if given.log and not has_plan:
        raise ValueError(f"--log must be left out: {name} does not report each method; got {given.log}")
    if given.plan and not has_plan:
        raise ValueError(f"--plan must be left out: {name} has no plan")


def _time(asked: _Asked, job: Any) -> None:
    """Print the plan; then time the first tasks of its programs, and print how long a run would take."""
    from cbp_jax.experiments import plan

    print(job.plan.text(), flush=True)
    if not asked.given.quiet:
        print("compiling each program and timing its first tasks; Ctrl-C stops", file=sys.stderr)
    print(plan.time_text(job.timed(asked.share, lambda text: print(f"warning: {text}", file=sys.stderr))))


def _announce(asked: _Asked, job: Any) -> None:
    """Print what will run."""
    print(f"{asked.experiment.name}: {asked.experiment.about}\n{_told(asked.settings)}", file=sys.stderr)
    plan = getattr(job, "plan", None)
    if plan is not None:
        print(plan.text(), file=sys.stderr)


def _told(settings: Any) -> str:
    """Return a line for each setting, as it would be given on the command line."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    width = max(map(len, values))
    shown = {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    return "\n".join(f"  {name:{width}}  {value}" for name, value in shown.items())


def _run_alone(asked: _Asked, job: Any) -> Any:
    """Run everything in this process, and return the results."""
    from cbp_jax import cli_log
    from cbp_jax.cli_progress import Bar

    logs = [cli_log.LOGS[kind](asked.out) for kind in dict.fromkeys(asked.given.log)]
    with Bar(asked.experiment.total(asked.settings), asked.given.quiet) as bar:
        return job(asked.out, cli_log.Logged(bar, logs))


def _run_share(asked: _Asked, job: Any) -> Any:
    """Run the lanes of this process. Return the results of all processes, or None if others are not done."""
    from cbp_jax import report
    from cbp_jax.cli_progress import Bar
    from cbp_jax.experiments import folder

    out, share = asked.out, asked.share
    with folder.claimed(out, share):
        if not asked.processes.detect:
            cli_processes.meet(asked.processes)
        total = asked.experiment.total(asked.settings) * sum(map(len, job.lanes(share))) // job.num_lanes()
        with Bar(total, asked.given.quiet) as bar:
            job(out, bar, share)
    results, joined = folder.join(out)
    if joined:
        return results
    done, of = report.runs.tasks_done(results)
    print(
        f"process {share.index} of {share.count} is done; {done} of {of} tasks of all processes are finished. The last "
        "process joins the results. If one was stopped, run again, with any number of processes"
    )
    return None


def _report(asked: _Asked, results: Any) -> None:
    """Print the table, draw the pictures, and print where the results are."""
    from cbp_jax import report

    cli_show.show(results, asked.out, experiment=asked.experiment)
    print(f"results: {asked.out / report.storage.FILE_NAME}")
