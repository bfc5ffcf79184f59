"""Times variants of a training step side by side in one process."""

import statistics
import time

import jax


def interleaved(functions, rounds, clock=time.perf_counter):
    """Seconds of calls of each compiled function, in turn, `rounds` times, after one call of each as a warm-up.

    Args:
      functions: dict from name to a function of no arguments that returns arrays.
      rounds: number of timed calls of each.
      clock: the clock to read. `time.process_time` counts only this process's work, for a CPU that others use, too.

    Returns:
      dict from name to the list of seconds.
    """
    seconds = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            jax.block_until_ready(function())
            seconds[name].append(clock() - start)
    return seconds


def ratio(seconds, name, base):
    """Median over rounds of one variant's time divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
