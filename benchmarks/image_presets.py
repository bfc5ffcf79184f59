"""Seconds of the image experiments' laptop presets on a CPU, with convolutions as matrix products and as XLA's.

    python benchmarks/image_presets.py
    python benchmarks/image_presets.py --experiments class_incremental --tasks 4

Each preset is run from its settings to its results file, for the first tasks and one seed, including compilation, with
backpropagation and with continual backpropagation. The experiments use `contract_convolutions` by themselves; for
comparison they are also run without it. Runs are interleaved; seconds are medians.
"""

import argparse
import dataclasses
import platform
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import jax
from timing import interleaved, ratio

from cbp_jax.experiments import EXPERIMENTS


def runner(name, method, tasks, contracted):
    """Return a function without arguments that runs the first tasks of a preset's method."""
    experiment = EXPERIMENTS[name]
    settings = dataclasses.replace(experiment.preset("laptop"), methods=(method,), tasks=tasks, seeds=1)

    def once():
        jax.clear_caches()
        with tempfile.TemporaryDirectory() as folder:
            if contracted:
                experiment.run(settings, Path(folder))
            else:
                with mock.patch("cbp_jax.contract_convolutions", lambda function: function):
                    experiment.run(settings, Path(folder))
        return ()

    return once


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["continual_imagenet", "class_incremental"]
    parser.add_argument("--experiments", nargs="+", default=names, choices=names)
    parser.add_argument("--tasks", type=int, default=40, help="with few, images and compilation dominate")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind} ({device.platform}), python {platform.python_version()}")
    print(f"{'preset':>20} {'learner':>8} {'XLA, s':>8} {'products, s':>12} {'times as fast':>14}")
    for name in args.experiments:
        methods = EXPERIMENTS[name].preset("laptop").methods
        for method in (methods[0], next(text for text in methods if text.startswith("cbp"))):
            variants = {"xla": False, "products": True}
            functions = {variant: runner(name, method, args.tasks, on) for variant, on in variants.items()}
            seconds = interleaved(functions, args.rounds)
            medians = [statistics.median(seconds[variant]) for variant in variants]
            times = 1 / ratio(seconds, "products", "xla")
            print(
                f"{name:>20} {method.split(':')[0]:>8} {medians[0]:8.1f} {medians[1]:12.1f} {times:14.1f}", flush=True
            )


if __name__ == "__main__":
    main()
