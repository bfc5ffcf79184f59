"""Slowdown of a run on a CPU by other processes: two host devices of one process compared with two processes.

A run spreads its lanes over the cores as host devices of one process, which wait for each other at the end of every
task. This script times the same work, one lane per core, with and without busy loops in other processes: as one
process, and as one process per lane. The fair share is the time if the scheduler divides the cores evenly among all
busy threads.

    python benchmarks/host_devices.py > benchmarks/results/host_devices_cpu.txt
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

LANES = """
import dataclasses, json, sys, tempfile, time, jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
from cbp_jax.experiments import online_permuted
settings = online_permuted.preset("laptop")
settings = dataclasses.replace(settings, methods=("bp",), seeds=int(sys.argv[1]), tasks=int(sys.argv[2]) + 1)
ends = []
with tempfile.TemporaryDirectory() as out:
    online_permuted.run(settings, out, lambda *_: ends.append(time.monotonic()))
print(json.dumps((ends[-1] - ends[0]) / int(sys.argv[2])))
"""


def seconds_per_task(processes: int, devices: int, tasks: int, busy: int) -> float:
    """Return the seconds per task of the slowest process, without compilation."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        runs = [
            subprocess.Popen([sys.executable, "-c", LANES, str(devices), str(tasks)], stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        return max(json.loads(run.communicate()[0]) for run in runs)
    finally:
        for loop in loops:
            loop.kill()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2, 5])
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores; {args.tasks} tasks of Online Permuted digits, {cores} lanes, medians of {args.repeats} runs")
    print(
        f"{'busy loops':>10}  {'one process, s/task':>22}  {'process per lane':>17}  {'ratio':>5}  {'fair share':>10}"
    )
    quiet = None
    for busy in args.busy:
        pairs = [
            (seconds_per_task(1, cores, args.tasks, busy), seconds_per_task(cores, 1, args.tasks, busy))
            for _ in range(args.repeats)
        ]
        one, several = (statistics.median(column) for column in zip(*pairs, strict=True))
        quiet = quiet or one
        share = quiet * (cores + busy) / cores
        print(f"{busy:>10}  {one:>21.3f}  {several:>16.3f}  {one / several:>5.2f}  {share:>10.3f}", flush=True)


if __name__ == "__main__":
    main()
