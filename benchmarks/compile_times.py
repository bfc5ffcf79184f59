"""Seconds that laptop presets spend on compilation: the first time, and again with JAX's persistent cache.

    python benchmarks/compile_times.py
    python benchmarks/compile_times.py --experiments online_permuted --lanes 5

Each experiment runs twice in a process of its own, with an empty cache folder and then with the one that the first
process filled, as `cbp-jax run` keeps it. Where methods run as lanes, every program runs its first task, with `--lanes`
lanes; compilation does not depend on their number. Other experiments run for at most `--seconds` seconds.

Times are those in which JAX traces, lowers, compiles, or reads a program from the cache. `programs` counts those that
XLA compiled or that were read. A star marks an experiment that was stopped by the limit, and may compile more later.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMPILING = tuple(
    f"/jax/core/compile/{part}_duration" for part in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)


class LimitReached(Exception):
    """The time for an experiment is over."""


def stop(*_):
    """Stop the experiment."""
    raise LimitReached


def covered(spans):
    """Return the total length of intervals, which may overlap: tracing is reported again by what calls it."""
    total, until = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def measure(name, lanes, seconds, data_dir):
    """Run the first tasks of an experiment's laptop preset, and print what was measured as JSON."""
    import dataclasses
    import math

    import jax

    from cbp_jax import cli_compiled, training
    from cbp_jax.experiments import EXPERIMENTS
    from cbp_jax.experiments.lanes import arguments_of

    cli_compiled.keep_compiled()
    spans, programs = [], 0

    def note(event, duration, **_):
        nonlocal programs
        if event in COMPILING:
            now = time.perf_counter()
            spans.append((now - duration, now))
            programs += event == COMPILING[-1]

    jax.monitoring.register_event_duration_secs_listener(note)
    experiment = EXPERIMENTS[name]
    settings = experiment.preset("laptop")
    if data_dir is not None and hasattr(settings, "data_dir"):
        settings = dataclasses.replace(settings, data_dir=data_dir)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    finished = False
    try:
        with tempfile.TemporaryDirectory() as out, training.one_blas_thread():
            job = experiment.prepare(settings)
            if getattr(job, "plan", None) is None:
                job(Path(out))
            else:
                for (group, train), own in zip(job.groups, job.lanes(), strict=True):
                    checkpoint = training.Checkpoint(Path(out) / "state", "timed", every=math.inf, lanes=own[:lanes])
                    next(train(*arguments_of(group, own[:lanes]), checkpoint, None))
        finished = True
    except LimitReached:
        pass
    print(json.dumps({"seconds": covered(spans), "programs": programs, "finished": finished}), flush=True)
    os._exit(0)  # an interrupted compilation may go on in another thread


def main():
    """Print a table."""
    from cbp_jax.experiments import EXPERIMENTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=150, help="limit for each experiment")
    parser.add_argument("--data-dir", default=None, help="folder of prepared datasets")
    parser.add_argument("--one", action="store_true", help="measure one experiment in this process, and print JSON")
    args = parser.parse_args()
    if args.one:
        return measure(args.experiments[0], args.lanes, args.seconds, args.data_dir)
    import jax

    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"{'laptop preset':>26} {'first':>7} {'again':>7} {'programs':>9}")
    for name in args.experiments:
        command = [sys.executable, __file__, "--one", "--experiments", name]
        command += ["--lanes", str(args.lanes), "--seconds", str(args.seconds)]
        command += [] if args.data_dir is None else ["--data-dir", args.data_dir]
        with tempfile.TemporaryDirectory() as cache:
            found = []
            for _ in range(2):
                done = subprocess.run(
                    command, env=os.environ | {"XDG_CACHE_HOME": cache}, capture_output=True, text=True
                )
                if done.returncode:
                    found = (done.stderr.strip() or "no output").splitlines()[-1]
                    break
                found.append(json.loads(done.stdout.splitlines()[-1]))
        if isinstance(found, str):
            print(f"{name:>26} {found}", flush=True)
            continue
        first, again = found
        star = "" if first["finished"] and again["finished"] else " *"
        print(f"{name:>26} {first['seconds']:7.1f} {again['seconds']:7.1f} {first['programs']:9}{star}", flush=True)
    return None


if __name__ == "__main__":
    main()
