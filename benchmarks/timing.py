"""Times variants of a training step side by side in one process."""

import statistics
import time

import jax


def interleaved(functions, rounds, clock=time.perf_counter):
    """Time calls of each compiled function in turn, `rounds` times, after one warm-up call of each.

    Args:
      functions: dict from name to a function without arguments that returns arrays.
      rounds: number of timed calls of each.
      clock: the clock to read. `time.process_time` counts only this process, which helps on a CPU with other work.

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
    """Return the median over rounds of one variant's time divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
