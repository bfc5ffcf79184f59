"""Cost of a run by the numbers of its tasks, of its lanes and of devices: seconds and memory.

    python benchmarks/tasks_and_lanes.py
    python benchmarks/tasks_and_lanes.py --devices 1 2 4 --lanes 4 --tasks 100                # host devices of a CPU
    python benchmarks/tasks_and_lanes.py --width 2000 --lanes 30 --examples 6000 --tasks 2    # a tenth of the paper's

A run on Online Permuted images of 28 x 28 random bytes has `--tasks` tasks, and is repeated for each number of lanes.
`s/task` is the time of all lanes together, the median over the last half of the tasks between two lines. Memory is that
in use on the devices after the task if they report it, otherwise that of the process.

`--devices` repeats all this in processes of their own, each with so many host devices, among which a run distributes
its lanes: the time of a task falls up to the number of cores. Devices of accelerators are chosen by, for example,
CUDA_VISIBLE_DEVICES, and without this option.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

import jax
import numpy as np

from cbp_jax import data, problems, training
from cbp_jax.experiments import learners


def memory():
    """Return the bytes in use on all devices, or by the process if devices do not report them."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return sum(each["bytes_in_use"] for each in stats)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def images(count):
    rng = np.random.default_rng(0)
    bytes_ = rng.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
    return data.Dataset(bytes_, rng.integers(0, 10, count).astype(np.int32), 10, "random")


def on_host_devices(counts, words):
    """Run this script in other processes, with each number of host devices."""
    for count in counts:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}".strip()
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, __file__, *words], env=environment, check=True)


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="cbp")
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--examples", type=int, default=200, help="examples of a task")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 8, 32])
    parser.add_argument("--lines", type=int, nargs="+", default=None, help="finished tasks at which to print")
    parser.add_argument("--mode", default="auto", choices=["auto", "vmap", "map"], help="how the lanes of a device run")
    parser.add_argument("--devices", type=int, nargs="+", default=[], help="numbers of host devices; see above")
    args = parser.parse_args()
    if args.devices:
        words = []
        for name, value in vars(args).items():
            if name != "devices" and value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        on_host_devices(args.devices, words)
        return
    device = jax.devices()[0]
    print(
        f"jax {jax.__version__}, {jax.local_device_count()} x {device.device_kind} ({device.platform}), "
        f"{platform.processor() or platform.machine()}"
    )
    print(f"{args.method}, width {args.width}, {args.examples} examples per task, batch 1")
    print(f"{'lanes':>5} {'tasks':>6} {'s/task':>10} {'s/task and lane':>15} {'memory, MB':>11} {'compilation, s':>15}")
    problem = problems.online_permuted(images(max(args.examples, 1000)), examples_per_task=args.examples)
    method = learners.parse_method(args.method)
    lines = set(args.lines or [task for task in (10, 100, 1000, 10_000) if task < args.tasks] + [args.tasks])
    for lanes in args.lanes:
        learner = learners.make_learner([method], (args.width,) * 3, "relu", problem.input_shape, problem.num_classes)
        numbers = {name: np.full(lanes, value) for name, value in method.hyperparameters.items()}
        seconds, first, since = [], None, time.perf_counter()
        how = {"measured_examples": 100, "mode": args.mode}
        with training.one_blas_thread():
            for task, _ in enumerate(
                training.run_tasks(learner, problem, np.arange(lanes), numbers, args.tasks, **how), 1
            ):
                now = time.perf_counter()
                if first is None:
                    first = now - since
                else:
                    seconds.append(now - since)
                since = now
                if task in lines and seconds:
                    each = statistics.median(seconds[len(seconds) // 2 :])
                    print(
                        f"{lanes:5} {task:6} {each:10.4f} {each / lanes:15.5f} {memory() / 1e6:11.1f} {first:15.1f}",
                        flush=True,
                    )
                    seconds = []


if __name__ == "__main__":
    main()
