"""The command line: `cbp-jax list | run EXPERIMENT | plot RUN_DIR | runs DIR | bench | data prepare NAME`."""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the arguments of the command line, by default those of the process.

    Returns:
      the exit status: 0; 2 for a user error, reported in one line; 130 if the user stopped it; 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"list": _list, "run": _run, "plot": _plot, "runs": _runs, "bench": _bench, "data": _data}
    parser = argparse.ArgumentParser(prog="cbp-jax", description=__doc__)
    parser.add_argument("command", choices=commands, help="`cbp-jax COMMAND --help` shows its options")
    if not argv or argv[0] not in commands:
        parser.parse_args(argv[:1])
        parser.error("a command is needed")
    try:
        with _terminated_as_interrupted():
            commands[argv[0]](argv[1:])
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        if os.environ.get("CBP_JAX_TRACEBACK"):
            raise
        print(f"cbp-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("cbp-jax: stopped; the results of the tasks that were finished are saved", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, by which batch systems end a process, ends it as Ctrl-C does."""

    def stop(*_: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _list(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="cbp-jax list", description="Lists experiments, presets, learners and datasets."
    )
    parser.add_argument(
        "what", nargs="?", choices=["figures"], help="the papers' figures, with the commands that reproduce them"
    )
    from cbp_jax import bench, data, experiments, nets
    from cbp_jax.experiments import figures, learners

    if parser.parse_args(argv).what == "figures":
        for figure in figures.FIGURES:
            print(f"{figure.paper}, {figure.name}: {figure.about}")
            print(f"  cbp-jax run {figure.command}")
            print(f"  cost: {figure.cost}; run here: {figure.here or 'no'}")
        return

    print("experiments")
    for name, experiment in experiments.EXPERIMENTS.items():
        print(f"  {name:26} {experiment.about} Presets: {', '.join(experiment.presets)}.")
    print("  `cbp-jax list figures` shows which command reproduces which figure of the papers")
    print("learners (as in --methods bp cbp:replacement_rate=1e-5)")
    for name, learner in learners.LEARNERS.items():
        settings = ", ".join(f"{key}={value}" for key, value in learners.defaults_of(learner).items())
        print(f"  {name:26} {learner.about} ({settings})")
        print(f"  {'':26} searched by `bench`: {learners.told(learner.space)}")
    print("  and a function of your own that makes an optax transformation: my_module:my_factory(learning_rate=0.01)")
    print("suites of the benchmark (as in `cbp-jax bench --suite smoke --method bp cbp`)")
    for name, suite in bench.SUITES.items():
        print(f"  {name:26} {suite.about}: {', '.join(problem.name for problem in suite.problems)}")
    print("networks (as in --network vit:depth=2,width=32)")
    for name in nets.NETWORKS:
        print(f"  {name:26} {nets.read(name).about}")
    print("  and a Flax module of your own: my_module:MyNet(width=64)")
    print("datasets")
    print(f"  {', '.join(data.names())}, other image datasets of tensorflow-datasets that are prepared,")
    print("  and array files: the path of an .npz with images, or features, and labels")
    print("texts (as in --tasks docstrings/kind films.jsonl)")
    print(f"  {', '.join(data.text.EMBEDDED)}, text classification datasets of tensorflow-datasets that are prepared,")
    print("  and files: the path of a .jsonl or .csv, gzipped or not, with text, label and split")


def _run(argv: list[str]) -> None:
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
    parser.add_argument("--dataset", default=None, help="images; the preset's sizes may depend on it")
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
        help="only print what would be compiled, how many lanes (methods times seeds) would run, and their memory",
    )
    parser.add_argument(
        "--lanes-at-once",
        type=int,
        default=None,
        metavar="N",
        help="the most lanes that the devices hold, for the same results in less memory; found if not given",
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
        help="compile everything anew. Otherwise compiled programs are cached in the user's cache folder, or in "
        "JAX_COMPILATION_CACHE_DIR",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("-h", "--help", action="store_true")
    from cbp_jax import cli_processes

    cli_processes.add_options(parser)
    given, rest = parser.parse_known_args(argv)
    processes = cli_processes.read(given)
    from cbp_jax.experiments import learners

    grid = learners.read_grid(given.grid)
    if given.experiment is None:
        parser.print_help()
        return
    share = processes.share
    if processes.detect and not given.help and not given.plan:
        share = cli_processes.meet(processes)  # which may choose devices, so that it comes before JAX starts
    experiment = _experiment(given.experiment)
    start = experiment.preset(given.preset, given.dataset)
    if given.help:
        parser.print_help()
        rest = ["--help"]
    settings = _parse(f"cbp-jax run {given.experiment}", start, rest)
    if grid:
        settings = _swept(experiment, settings, grid)
    out = given.out or Path("runs") / f"{experiment.name}-{given.preset}-{_hash(settings)}"
    from cbp_jax import cli_compiled, cli_log, report
    from cbp_jax.cli_progress import Bar
    from cbp_jax.experiments import folder

    if not given.no_compilation_cache and (kept := cli_compiled.keep_compiled()):
        print(f"compiled programs are cached in {kept} (turn this off by --no-compilation-cache)", file=sys.stderr)

    if share is not None and share.count == 1:
        share = None
    if not given.plan:
        folder.check(out, experiment.name, settings, share)
    _use_all_cores()  # before importing a user's module, which may start JAX
    asked_for = [name for name, value in vars(settings).items() if value != getattr(start, name)]
    how = {} if share is None else {"processes": share.count}
    job = experiment.prepare(settings, asked_for, lanes_at_once=given.lanes_at_once, **how)
    plan = getattr(job, "plan", None)
    if share is not None:
        if plan is None:
            raise ValueError(f"processes must be left out: the methods of {experiment.name} are no lanes of programs")
        if given.log:
            raise ValueError(
                f"--log must be left out with several processes, of which none has all lanes; got {given.log}"
            )
        share.check(job.num_lanes())
    if given.log and plan is None:
        raise ValueError(f"--log must be left out: {experiment.name} tells of no single method; got {given.log}")
    if given.plan:
        if plan is None:
            raise ValueError(f"--plan must be left out: the methods of {experiment.name} are no lanes of programs")
        print(plan.text())
        return
    print(f"{experiment.name}: {experiment.about}\n{_told(settings)}", file=sys.stderr)
    if plan is not None:
        print(plan.text(), file=sys.stderr)
    logs = [cli_log.LOGS[kind](out) for kind in dict.fromkeys(given.log)]
    total = experiment.total(settings)
    if share is None:
        with Bar(total, given.quiet) as bar:
            results = job(out, cli_log.Logged(bar, logs))
    else:
        with folder.claimed(out, share):
            if not processes.detect:
                cli_processes.meet(processes)
            total = total * sum(map(len, job.lanes(share))) // job.num_lanes()
            with Bar(total, given.quiet) as bar:
                job(out, cli_log.Logged(bar, logs), share)
        results, joined = folder.join(out)
        if not joined:
            done, of = report.records.tasks_done(results)
            print(
                f"process {share.index} of {share.count} is done, and {done} of {of} tasks of all are; the process "
                "that ends last joins the results. If one was stopped, run again, with any number of processes"
            )
            return
    _show(results, out, experiment=experiment)
    print(f"results: {out / report.results.FILE_NAME}")


def _plot(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="cbp-jax plot", description="Draws the pictures of a run and prints its table."
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        nargs="+",
        help="folder of a run, finished or not; or several folders, with other seeds or methods",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder for the pictures, by default that of the run; for several runs also for their joined results",
    )
    parser.add_argument("--formats", nargs="+", default=["png"], help="such as png pdf svg")
    parser.add_argument(
        "--measures",
        nargs="+",
        default=None,
        help="draws only these measures over tasks, a panel each: chosen.png; such as accuracy dead_units",
    )
    args = parser.parse_args(argv)
    from cbp_jax import report

    first = args.run_dir[0]
    if args.out is None and len(args.run_dir) > 1:
        raise ValueError("--out must name a folder for the results of several runs")
    out = args.out or (first if first.is_dir() else first.parent)
    results = report.join_results([report.load_results(path) for path in args.run_dir])
    if len(args.run_dir) > 1:
        print(f"results: {report.save_results(results, out)}")
    _show(results, out, tuple(args.formats), measures=args.measures)


def _swept(experiment: Any, settings: Any, grid: dict[str, tuple[str, ...]]) -> Any:
    """The settings with a method for each combination of the grid's values."""
    from cbp_jax.experiments import learners

    methods = experiment.check(settings)
    if not hasattr(settings, "methods") or not all(isinstance(method, learners.Method) for method in methods):
        raise ValueError(f"grid must be left out: {experiment.name} compares no learners; got {' '.join(grid)}")
    return dataclasses.replace(settings, methods=learners.expand(settings.methods, grid))


def _runs(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="cbp-jax runs",
        description="Lists the runs in a folder and its subfolders: settings, progress, and best results.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="where to look, by default runs")
    from cbp_jax import report

    folder = parser.parse_args(argv).folder
    print(report.runs_table(report.list_runs(folder), folder))


def _told(settings: Any) -> str:
    """A line for each setting, as it would be given on the command line."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    width = max(map(len, values))
    shown = {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()}
    return "\n".join(f"  {name:{width}}  {value}" for name, value in shown.items())


def _show(
    results: Any,
    out: Path,
    formats: tuple[str, ...] = ("png",),
    experiment: Any = None,
    measures: list[str] | None = None,
) -> None:
    """Prints the table of a run and draws its pictures, as its experiment defines them, or of the measures alone."""
    from cbp_jax import experiments, report
    from cbp_jax.experiments import learners

    results = learners.with_looks(results)
    experiment = experiment or experiments.EXPERIMENTS.get(results.attrs["experiment"], experiments.stream)
    print(experiment.summary(results))
    if measures is None:
        pictures = experiment.plot(results, out, formats)
    else:
        pictures = report.save_figures({"chosen": report.plot_tasks(results, measures=measures)}, out, formats)
    for picture in pictures:
        print(f"picture: {picture}")


def _bench(argv: list[str]) -> None:
    from cbp_jax import cli_bench

    cli_bench.main(argv, before=_use_all_cores)


def _data(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="cbp-jax data", description="Prepares datasets from files on this machine.")
    actions = parser.add_subparsers(dest="action", required=True)
    prepare = actions.add_parser("prepare", help="creates a tensorflow-datasets dataset from local files")
    prepare.add_argument("name", help="mnist, fashion_mnist, kmnist or cifar10")
    prepare.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        help="folder with the four IDX files, gzipped or not, or the six binary batches of CIFAR-10",
    )
    prepare.add_argument(
        "--data-dir",
        type=Path,
        default=None,
        help="folder of the datasets, by default that of tensorflow-datasets",
    )
    args = parser.parse_args(argv)
    from cbp_jax import data

    data.prepare(args.name, args.source, data_dir=args.data_dir)
    print(f"prepared {data.load(args.name, data_dir=args.data_dir)!r}")


def _experiment(name: str) -> Any:
    from cbp_jax import by_path, experiments

    if name in experiments.EXPERIMENTS:
        return experiments.EXPERIMENTS[name]
    if ":" in name:
        _use_all_cores()
    found = by_path.read(name, "experiment")
    if found is None:
        raise ValueError(f"experiment must be one of {list(experiments.EXPERIMENTS)}, got {name!r}")
    if not isinstance(found.value, experiments.Experiment):
        raise ValueError(f"{name} must be a cbp_jax.experiments.Experiment, got {type(found.value).__name__}")
    return found.value


def _parse(program: str, start: Any, argv: list[str]) -> Any:
    """Reads the options that the dataclass of settings has, with `start` as defaults."""
    try:
        tyro = importlib.import_module("tyro")
    except ImportError as error:
        raise ImportError('the command line needs tyro: pip install "cbp-jax[cli]"') from error
    return tyro.cli(type(start), prog=program, default=start, args=argv, config=(tyro.conf.FlagConversionOff,))


def _hash(settings: Any) -> str:
    text = json.dumps(dataclasses.asdict(settings), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _use_all_cores() -> None:
    """Lets the lanes of a CPU run use every core. Must be called before JAX starts."""
    import jax

    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(RuntimeError):  # JAX has already started
        jax.config.update("jax_num_cpu_devices", cores or 1)


if __name__ == "__main__":
    sys.exit(main())
