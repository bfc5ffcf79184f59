"""A benchmark: methods on the problems of a suite, all tuned with the same budget; `cbp-jax bench` runs it."""

from cbp_jax.bench.running import Entry, entries, read_method, relative_cost, run, total
from cbp_jax.bench.suites import ANT, FULL, SMALL, SMOKE, SUITES, Problem, Suite
from cbp_jax.bench.tables import collect, rows, title, write

__all__ = [
    "ANT",
    "FULL",
    "SMALL",
    "SMOKE",
    "SUITES",
    "Entry",
    "Problem",
    "Suite",
    "collect",
    "entries",
    "read_method",
    "relative_cost",
    "rows",
    "run",
    "title",
    "total",
    "write",
]
