"""Time of a learner's step by width, batch size and number of seeds, compared with bounds of memory and arithmetic.

    python benchmarks/learner_steps.py
    python benchmarks/learner_steps.py --widths 100 2000 --batches 1 --seeds 1 30 --learners sgd cbp    # on a GPU
    python benchmarks/learner_steps.py --widths 100 1000 --batches 1 --seeds 1 --learners sgd redo fire

All learners train the 784-w-w-w-10 ReLU network inside a `lax.scan`; calls are interleaved, and a time is the median
over the rounds, in microseconds for a step of all seeds. Seeds run under `vmap`, but one after another on a CPU;
`--mode` chooses.

Two lower bounds use the speed of the machine, measured at the start. `bytes` is the time to read and write each weight
of all seeds once, in place, at the speed of a large array; with weights that fit into a cache, steps can be faster.
`flops` is the time of six operations for each weight and example, at the speed of a large float32 matrix product of the
same precision as the learners' (JAX's default, which on some accelerators is lower than float32).
`growth` is the time of the first learner's step divided by that with the first number of seeds given.

With `--layouts` each learner runs again, as `NAME*`, without asking XLA for row-major updates
(`cbp_jax/numerics/layout.py`).
"""

import argparse
import platform
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from cbp_overhead import Net
from timing import interleaved

import cbp_jax
from cbp_jax.numerics import periods

LEARNERS = {
    "sgd": lambda units: optax.sgd(0.003),
    "cbp": lambda units: cbp_jax.continual_backprop(optax.sgd(0.003), units, replacement_rate=1e-4, max_replacements=1),
    "upgd": lambda units: cbp_jax.upgd(0.003, sigma=1e-3),
    "redo": lambda units: cbp_jax.redo(optax.sgd(0.003), units, every=1000),
    "adam": lambda units: cbp_jax.adam(1e-4),
    "regrama": lambda units: cbp_jax.regrama(optax.sgd(0.003), units, every=1000),
    "hare_tortoise": lambda units: cbp_jax.hare_and_tortoise(optax.sgd(0.003), every=1000),
    "fire": lambda units: cbp_jax.fire(optax.sgd(0.003), every=1000),
    "nap": lambda units: cbp_jax.normalize_and_project(optax.sgd(0.003), every=10),
}
DEFAULT = ("sgd", "cbp", "upgd", "redo", "adam")


def weights_of(width):
    return 784 * width + 2 * width**2 + 10 * width + 3 * width + 10


def runner(learner, width, batch, seeds, steps, mode):
    """Return a function without arguments that trains `seeds` networks for `steps` steps, as "vmap" or "map"."""
    net = Net(width)
    x = jax.random.uniform(jax.random.key(0), (64, batch, 784))
    y = jax.random.randint(jax.random.key(1), (64, batch), 0, 10)
    units = cbp_jax.discover_units(net.apply, net.init(jax.random.key(2), x[0]), x[0], check=False)
    apply = cbp_jax.with_features(net.apply, units)
    tx = optax.with_extra_args_support(LEARNERS[learner](units))
    looks = learner in ("cbp", "redo", "regrama")

    def loss_fn(params, x, y):
        logits, features = apply(params, x) if looks else (net.apply(params, x), {})
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), features

    def train(carry):
        def step(carry, i):
            params, state = carry
            grads, features = jax.grad(loss_fn, has_aux=True)(params, x[i % 64], y[i % 64])
            updates, state = tx.update(grads, state, params, features=features)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, jnp.arange(steps))[0]

    def start(key):
        params = net.init(key, x[0])
        return params, tx.init(params)

    keys = jax.random.split(jax.random.key(3), seeds)
    if seeds == 1:
        carry, run = start(keys[0]), train
    else:
        carry = jax.jit(jax.vmap(start))(keys)
        run = jax.vmap(train) if mode == "vmap" else lambda carry: jax.lax.map(train, carry)
    run = jax.jit(run, donate_argnums=0)

    def once():
        nonlocal carry
        carry = run(carry)
        return carry

    return once


def in_any_order(*args):
    """Do what `runner` does without asking for row-major updates."""
    with mock.patch.object(periods, "in_row_major", lambda tree: tree):
        once = runner(*args)
        once()  # traces
    return once


def best_seconds(function, *args, rounds=5):
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        found.append(time.perf_counter() - start)
    return min(found)


def machine(size):
    """Measure bytes per second read and written in place, and float32 operations per second of a product of matrices
    [size, size]."""
    x, passes = jnp.ones((16 * size, size)), 8
    # In a loop, so that no new memory is allocated, which can take longer than to write it.
    run = jax.jit(lambda x, passes: jax.lax.fori_loop(0, passes, lambda _, x: x + 1, x).sum())
    once, all_of_them = (best_seconds(run, x, jnp.int32(count)) for count in (1, 1 + passes))
    read_and_write = passes * 2 * x.nbytes / (all_of_them - once)
    square = jnp.ones((size, size))
    product = jax.jit(jnp.dot)
    return read_and_write, 2 * size**3 / best_seconds(product, square, square)


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[100, 500, 1000, 2000, 4000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--learners", nargs="+", default=list(DEFAULT), choices=list(LEARNERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=float, default=1e8, help="weights touched per timed call, at most 2,000 steps")
    parser.add_argument("--size", type=int, default=4096 if jax.default_backend() != "cpu" else 2048)
    parser.add_argument("--mode", choices=["vmap", "map"], default="map" if jax.default_backend() == "cpu" else "vmap")
    parser.add_argument("--layouts", action="store_true", help="run each learner again in XLA's order")
    args = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"jax {jax.__version__}, {device.device_kind} ({device.platform}), {platform.processor() or platform.machine()}"
    )
    bandwidth, flops = machine(args.size)
    print(f"measured: {bandwidth / 1e9:,.0f} GB/s in place, {flops / 1e9:,.0f} GFLOP/s for float32 products")
    variants = {name: (name, runner) for name in args.learners}
    if args.layouts:
        variants |= {f"{name}*": (name, in_any_order) for name in args.learners}
    print(
        f"{'width':>5} {'batch':>5} {'seeds':>5} {'bytes':>9} {'flops':>9} "
        + " ".join(f"{name:>9}" for name in variants)
        + f" {'growth':>7}"
    )
    for width in args.widths:
        for batch in args.batches:
            first = None
            for seeds in args.seeds:
                weights = seeds * weights_of(width)
                steps = max(5, min(2000, int(args.work / weights)))
                how = (width, batch, seeds, steps, args.mode)
                runs = {name: make(learner, *how) for name, (learner, make) in variants.items()}
                seconds = interleaved(runs, args.rounds)
                found = [statistics.median(seconds[name]) / steps * 1e6 for name in variants]
                first = first or found[0]
                bounds = 8 * weights / bandwidth * 1e6, 6 * weights * batch / flops * 1e6
                print(
                    f"{width:5} {batch:5} {seeds:5} "
                    + " ".join(f"{value:9.1f}" for value in (*bounds, *found))
                    + f" {found[0] / first:7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
