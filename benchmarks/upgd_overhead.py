"""One step of UPGD compared with the same step of plain SGD, and the share of the random numbers in it.

    python benchmarks/upgd_overhead.py
    python benchmarks/upgd_overhead.py --widths 1000 --batches 1 --rounds 15

All run inside a `lax.scan` on the 784-w-w-w-10 ReLU network, and their calls are interleaved; the ratio is the median
over the rounds. Columns: `upgd`, unchanged; `no gate`, with utilities, their maximum and noise, but without the gate;
`no noise`, with the gate but without noise; `neither`, with utilities and their maximum only; then UPGD with
`jax.random.normal` in place of this library's generator, with keys of JAX's default implementation and of `rbg`;
`uniform`, with the simplest possible noise, uniform numbers from a hash of two multiplications, as a lower bound for
the cost of any generator that hashes every weight; `table`, with normal numbers that were drawn once and are read from
a random offset in every step; and Adam, whose state is twice as large as UPGD's.
"""

import argparse
import platform
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cbp_overhead import Net
from timing import interleaved, ratio

import cbp_jax
from cbp_jax.numerics import noise

STEP, SIGMA, BETA = 0.003, 1e-3, 0.999


def counter_noise(step, params):
    return noise.normal(jnp.array([0, 1], jnp.uint32), step, params, SIGMA)


def uniform_noise(step, params):
    def draw(leaf):
        word = jax.lax.iota(jnp.uint32, leaf.size) ^ (step.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            word = (word ^ (word >> jnp.uint32(shift))) * jnp.uint32(factor)
        return (SIGMA * 2**-31 * jax.lax.bitcast_convert_type(word, jnp.int32)).reshape(leaf.shape)

    return jax.tree.map(draw, params)


def table_noise(step, params):
    """Read each leaf's noise from one table, as evolution strategies do (Salimans et al. 2017)."""
    offsets = 2**20
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    table = jnp.asarray(np.random.default_rng(0).normal(size=largest + offsets), jnp.float32)
    leaves, treedef = jax.tree.flatten(params)
    starts = noise.element_numbers((len(leaves),)) + step.astype(jnp.uint32) * jnp.uint32(len(leaves))
    starts = (starts * jnp.uint32(0x9E3779B9)) >> jnp.uint32(12)  # below 2**20
    parts = [jax.lax.dynamic_slice(table, (start,), (w.size,)) for start, w in zip(starts, leaves, strict=True)]
    return jax.tree.unflatten(
        treedef, [SIGMA * part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


def jax_noise(impl):
    def draw(step, params):
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0, impl=impl), step), len(leaves))
        drawn = [SIGMA * jax.random.normal(key, w.shape) for key, w in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(treedef, drawn)

    return draw


def parts_of_upgd(draw=None, gate=True):
    """Return global first-order UPGD with or without some of its parts."""

    def init_fn(params):
        return jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update_fn(grads, state, params):
        step, utility = state
        utility = jax.tree.map(lambda u, g, w: u + (1 - BETA) * (-g * w - u), utility, grads, params)
        largest = jnp.max(jnp.stack([jnp.max(u) for u in jax.tree.leaves(utility)]))
        inverse = 1 / jnp.maximum(jnp.abs(largest), 1e-38)
        moves = grads if draw is None else jax.tree.map(jnp.add, grads, draw(step, params))
        if gate:
            moves = jax.tree.map(lambda g, u: g * jax.nn.sigmoid(-u * inverse), moves, utility)
        else:  # the maximum is still needed
            moves = jax.tree.map(lambda g, u: g * (1 - u * inverse), moves, utility)
        return jax.tree.map(lambda u: -STEP * u, moves), (step + 1, utility)

    return optax.GradientTransformation(init_fn, update_fn)


VARIANTS = {
    "sgd": lambda: optax.sgd(STEP),
    "upgd": lambda: cbp_jax.upgd(STEP, sigma=SIGMA, beta_utility=BETA),
    "no gate": lambda: parts_of_upgd(counter_noise, gate=False),
    "no noise": lambda: parts_of_upgd(),
    "neither": lambda: parts_of_upgd(gate=False),
    "threefry": lambda: parts_of_upgd(jax_noise("threefry2x32")),
    "rbg": lambda: parts_of_upgd(jax_noise("rbg")),
    "uniform": lambda: parts_of_upgd(uniform_noise),
    "table": lambda: parts_of_upgd(table_noise),
    "adam": lambda: optax.adam(STEP),
}


def runner(width, batch, tx, steps):
    """Compile a function without arguments that trains a network for `steps` steps."""
    net = Net(width)
    x = jax.random.uniform(jax.random.key(0), (64, batch, 784))
    y = jax.random.randint(jax.random.key(1), (64, batch), 0, 10)

    def loss_fn(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y).mean()

    def train(carry):
        def step(carry, i):
            params, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(params, x[i % 64], y[i % 64]), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, jnp.arange(steps))[0]

    params = net.init(jax.random.key(3), x[0])
    carry, run = (params, tx.init(params)), jax.jit(train, donate_argnums=0)

    def once():
        nonlocal carry
        carry = run(carry)
        return carry

    return once


def main():
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS)[1:], choices=list(VARIANTS)[1:])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=float, default=1.5e8, help="weights touched per timed call")
    args = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{device.platform} {device.device_kind}, {platform.processor() or platform.machine()}, jax {jax.__version__}"
    )
    print(f"{'width':>5} {'batch':>5} {'sgd us/step':>12} " + " ".join(f"{name:>9}" for name in args.variants))
    for width in args.widths:
        for batch in args.batches:
            steps = max(10, min(3000, int(args.work / (784 * width + 2 * width**2 + 10 * width))))
            runs = {name: runner(width, batch, VARIANTS[name](), steps) for name in ("sgd", *args.variants)}
            seconds = interleaved(runs, args.rounds)
            sgd = statistics.median(seconds["sgd"]) / steps * 1e6
            ratios = " ".join(f"{ratio(seconds, name, 'sgd'):9.2f}" for name in args.variants)
            print(f"{width:5} {batch:5} {sgd:12.1f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
