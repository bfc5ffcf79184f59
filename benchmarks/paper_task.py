"""A task of the Nature paper's Online Permuted MNIST with thirty seeds, and the hours that all 800 tasks would take.

    python benchmarks/paper_task.py                  # on an accelerator
    python benchmarks/paper_task.py --seconds 600

A task has 60,000 examples, one in each update of three layers of 2,000 units; images are random bytes. It is run in
`--parts` equal parts, each a short task of its own, so that it can end after `--seconds`, with the time of a whole task
scaled from that of the parts that are done. A first part, with compilation, is not counted.
"""

import argparse
import platform
import time

import jax
import numpy as np
from tasks_and_lanes import images, memory

from cbp_jax import problems, training
from cbp_jax.experiments import learners

TASKS = 800


def parts_of_a_task(method, width, lanes, examples, parts, mode):
    """Yield the seconds of each part of a task of all lanes, after those of a first part with compilation."""
    problem = problems.online_permuted(images(60_000), examples_per_task=examples // parts)
    learner = learners.make_learner([method], (width,) * 3, "relu", problem.input_shape, problem.num_classes)
    numbers = {name: np.full(lanes, value) for name, value in method.hyperparameters.items()}
    # A whole task is measured on 2,000 examples.
    how = {"measured_examples": max(1, min(examples, 2000) // parts), "mode": mode}
    since = time.perf_counter()
    for _ in training.run_tasks(learner, problem, np.arange(lanes), numbers, parts + 1, **how):
        now = time.perf_counter()
        yield now - since
        since = now


def main():
    """Print a line for the first part, and one for the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="cbp")
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--lanes", type=int, default=30)
    parser.add_argument("--examples", type=int, default=60_000, help="examples of a whole task")
    parser.add_argument("--parts", type=int, default=20)
    parser.add_argument("--mode", default="auto", choices=["auto", "vmap", "map"], help="how the lanes of a device run")
    parser.add_argument("--seconds", type=float, default=200, help="begin no part after so many seconds")
    args = parser.parse_args()
    start, device = time.perf_counter(), jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind} ({device.platform}), python {platform.python_version()}")
    print(f"{args.method}, width {args.width}, {args.lanes} lanes, batch 1; a task has {args.examples} examples")
    done = []
    with training.one_blas_thread():
        method = learners.parse_method(args.method)
        parts = parts_of_a_task(method, args.width, args.lanes, args.examples, args.parts, args.mode)
        print(f"a first part, with compilation: {next(parts):.1f} s", flush=True)
        for seconds in parts:
            done.append(seconds)
            if len(done) == 1:
                print(f"a part of {args.examples // args.parts} examples: {seconds:.2f} s", flush=True)
            if time.perf_counter() - start + seconds > args.seconds:
                break
    whole = sum(done) / len(done) * args.parts
    print(
        f"{len(done)} of {args.parts} parts: a task takes {whole:.1f} s, {whole / args.examples * 1e6:.0f} us for an "
        f"update of all lanes, {memory() / 1e6:.0f} MB; {TASKS} tasks would take {whole * TASKS / 3600:.1f} hours"
    )


if __name__ == "__main__":
    main()
