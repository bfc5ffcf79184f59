"""The command line: `cbp-jax list | run EXPERIMENT | plot RUN_DIR | runs DIR | bench | data prepare NAME`."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from cbp_jax import stops


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

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
        resumes = "; the same command resumes the run" if argv[0] in ("run", "bench") else ""
        print(f"cbp-jax: stopped{resumes}", file=sys.stderr)
        return 143 if isinstance(stop, stops.Terminated) else 130
    return 0


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM, which batch systems send to end a process, like Ctrl-C."""

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stops.terminate)
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
    from cbp_jax import cli_run

    cli_run.main(argv, before=_use_all_cores)


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
        help="folder for the pictures, by default that of the run. Several runs need it, also for their joined results",
    )
    parser.add_argument("--formats", nargs="+", default=["png"], help="such as png pdf svg")
    parser.add_argument(
        "--measures",
        nargs="+",
        default=None,
        help="draw only these measures over tasks, a panel for each, in chosen.png; such as accuracy dead_units",
    )
    args = parser.parse_args(argv)
    from cbp_jax import cli_show, report

    report.drawing.check_formats(args.formats)
    first = args.run_dir[0]
    if args.out is None and len(args.run_dir) > 1:
        raise ValueError("--out must name a folder for the results of several runs")
    out = args.out or (first if first.is_dir() else first.parent)
    runs = [path if path.is_dir() else path.parent for path in args.run_dir]
    if len(runs) > 1 and out.resolve() in [path.resolve() for path in runs]:
        raise ValueError(f"--out must not be the folder of one of the runs, whose results would be lost, got {out}")
    results = report.compare_results([report.load_results(path) for path in args.run_dir])
    if len(args.run_dir) > 1:
        print(f"results: {report.save_results(results, out)}")
    cli_show.show(results, out, tuple(args.formats), measures=args.measures)


def _runs(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="cbp-jax runs",
        description="Lists the runs in a folder and its subfolders: experiments, progress, best results, and times.",
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="where to look, by default runs")
    from cbp_jax import report

    folder = parser.parse_args(argv).folder
    print(report.runs_table(report.list_runs(folder), folder))


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


def _use_all_cores() -> None:
    """Let the lanes of a CPU run use every core. Must be called before JAX starts."""
    import jax

    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(RuntimeError):  # JAX has already started
        jax.config.update("jax_num_cpu_devices", cores or 1)


if __name__ == "__main__":
    sys.exit(main())
