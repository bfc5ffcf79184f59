"""One step of training under a mask, compared with the same step without a mask.

    python benchmarks/masked_overhead.py
    python benchmarks/masked_overhead.py --hidden 1000 1000 --batches 60 --density 0.05

Both run inside a `lax.scan` on LeNet-300-100, and their calls are interleaved; the ratio is the median over the rounds.
The script also times pruning a fifth of the network.
"""

import argparse
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from timing import interleaved, ratio

import cbp_jax
from cbp_jax import nets, tickets

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, 0.9),
    "optax.adam": lambda: optax.adam(1.2e-3),
    "adam": lambda: cbp_jax.adam(1.2e-3),
}


def runner(net, params, mask, tx, batch, steps):
    """Compile a function without arguments that trains for some steps."""
    x = jax.random.uniform(jax.random.key(0), (64, batch, 784))
    y = jax.random.randint(jax.random.key(1), (64, batch), 0, 10)
    if mask is not None:
        tx, params = tickets.masked(tx, mask), tickets.apply_mask(params, mask)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y).mean()

    @jax.jit
    def run(carry):
        def step(carry, number):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, x[number % 64], y[number % 64]), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, jnp.arange(steps))[0]

    carry = params, tx.init(params)

    def once():
        nonlocal carry
        carry = run(carry)
        return carry

    return once


def main():
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[300, 100])
    parser.add_argument("--batches", type=int, nargs="+", default=[60])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=["perf_counter", "process_time"], default="perf_counter")
    args = parser.parse_args()
    clock = getattr(time, args.clock)
    device = jax.devices()[0]
    print(
        f"{device.platform} {device.device_kind}, {platform.processor() or platform.machine()}, jax {jax.__version__}"
    )
    net = nets.MLP(args.hidden, 10, kernel_init=jax.nn.initializers.glorot_normal())
    params = net.init(jax.random.key(2), jnp.zeros((1, 784)))
    full = tickets.full_mask(params)
    mask = tickets.prune(params, full, 1 - args.density)
    print(f"{'batch':>5} {'inner':>10} {'inner us/step':>14} {'masked':>7}")
    for batch in args.batches:
        for name in args.optimizers:
            case = (net, params), OPTIMIZERS[name], (batch, args.steps)
            runs = {
                each: runner(*case[0], each_mask, case[1](), *case[2])
                for each, each_mask in (("inner", None), ("masked", mask))
            }
            seconds = interleaved(runs, args.rounds, clock)
            inner = statistics.median(seconds["inner"]) / args.steps * 1e6
            print(f"{batch:5} {name:>10} {inner:14.1f} {ratio(seconds, 'masked', 'inner'):7.2f}", flush=True)
    prune = jax.jit(lambda params, mask: tickets.prune(params, mask, 0.2))
    seconds = interleaved({"prune": lambda: prune(params, full)}, args.rounds, clock)["prune"]
    print(f"pruning {sum(leaf.size for leaf in jax.tree.leaves(params)):,} weights: {statistics.median(seconds):.4f} s")


if __name__ == "__main__":
    main()
