"""Options of XLA's compiler."""

# For programs that run once or a few times. The default level on a CPU, 3, takes up to four times as long, most of all
# for random numbers. In all that we tried, level 2 gave the same bits; levels below 2 do not.
RUNS_ONCE = {"xla_backend_optimization_level": 2}
