"""One step of continual backpropagation compared with the same step of its inner optimizer.

    python benchmarks/cbp_overhead.py
    python benchmarks/cbp_overhead.py --widths 1000 --batches 1 16 --optimizers sgd --seeds 1
    python benchmarks/cbp_overhead.py --utilities all --reinitializations all --widths 100 --optimizers sgd --seeds 1

Both run inside a `lax.scan` on the 784-w-w-w-10 ReLU network, and their calls are interleaved; the ratio is the median
over the rounds. `untouched` is CBP with a utility that reads no weights, to show what the pass over the outgoing
weights costs. Utilities are timed with the reinitialization `resample`, and reinitializations with the utility
`contribution`. Times of second-order utilities include HesScale, the second backward pass that they need.
"""

import argparse
import platform
import statistics

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from timing import interleaved, ratio

import cbp_jax
from cbp_jax.replacement import REINITIALIZATIONS, UTILITIES, needs_curvature


class Net(nn.Module):
    """The network of Online Permuted MNIST."""

    width: int

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Dense(self.width, kernel_init=nn.initializers.he_uniform())(x))
        return nn.Dense(10, kernel_init=nn.initializers.he_uniform())(x)


OPTIMIZERS = {"sgd": lambda: optax.sgd(0.003), "adam": lambda: cbp_jax.adam(1e-4)}


def nothing(view):
    """Return the same utility for all units, without reading weights."""
    return jnp.zeros(view.group.size)


def runner(width, batch, optimizer, seeds, steps, lanes, utility=None, **settings):
    """Compile a function without arguments that trains `seeds` networks for `steps` steps.

    Without a utility, only the inner optimizer trains them; `settings` are arguments of `continual_backprop`.
    """
    net = Net(width)
    x = jax.random.uniform(jax.random.key(0), (64, batch, 784))
    y = jax.random.randint(jax.random.key(1), (64, batch), 0, 10)
    params = net.init(jax.random.key(2), x[0])
    units = cbp_jax.discover_units(net.apply, params, x[0])
    apply = cbp_jax.with_features(net.apply, units)
    tx = optax.with_extra_args_support(OPTIMIZERS[optimizer]())
    if utility:
        tx = cbp_jax.continual_backprop(tx, units, utility=utility, **settings)
    curvature = utility is not None and needs_curvature(utility)

    def loss_fn(params, x, y):
        logits, features = apply(params, x) if utility else (net.apply(params, x), {})
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), features

    def train(carry):
        def step(carry, i):
            params, state = carry
            grads, features = jax.grad(loss_fn, has_aux=True)(params, x[i % 64], y[i % 64])
            extra = {}
            if curvature:
                extra["hessian_diag"] = cbp_jax.curvature.hesscale(net.apply, params, x[i % 64], y[i % 64])[2]
            updates, state = tx.update(grads, state, params, features=features, **extra)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, jnp.arange(steps))[0]

    def start(key):
        params = net.init(key, x[0])
        return params, tx.init(params)

    if seeds == 1:
        carry, run = start(jax.random.key(3)), train
    else:
        carry = jax.vmap(start)(jax.random.split(jax.random.key(3), seeds))
        run = jax.vmap(train) if lanes == "vmap" else lambda carry: jax.lax.map(train, carry)
    run = jax.jit(run, donate_argnums=0)

    def once():
        nonlocal carry
        carry = run(carry)
        return carry

    return once


def main():
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[100, 1000, 2000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adam"], choices=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 10])
    named = {"utilities": UTILITIES, "reinitializations": REINITIALIZATIONS}
    for name, default in (("utilities", ["contribution"]), ("reinitializations", [])):
        parser.add_argument(f"--{name}", nargs="+", default=default, choices=["all", *named[name]])
    parser.add_argument("--replacement-rate", type=float, default=1e-4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=float, default=3e8, help="weights touched per timed call")
    parser.add_argument("--lanes", default="vmap" if jax.default_backend() != "cpu" else "map", choices=["vmap", "map"])
    args = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{device.platform} {device.device_kind}, {platform.processor() or platform.machine()}, jax {jax.__version__}"
    )
    chosen = {
        name: list(table) if "all" in getattr(args, name) else getattr(args, name) for name, table in named.items()
    }
    variants = {name: {"utility": name} for name in chosen["utilities"]}
    variants |= {name: {"utility": "contribution", "reinitialization": name} for name in chosen["reinitializations"]}
    variants["untouched"] = {"utility": nothing}
    print(
        f"{'width':>5} {'batch':>5} {'inner':>5} {'seeds':>5} {'inner us/step':>14} "
        + " ".join(f"{name:>22}" for name in variants)
    )
    for width in args.widths:
        weights = 784 * width + 2 * width**2 + 10 * width
        for batch in args.batches:
            for optimizer in args.optimizers:
                for seeds in args.seeds:
                    steps = max(10, min(5000, int(args.work / weights / seeds)))
                    case, rate = (width, batch, optimizer, seeds, steps, args.lanes), args.replacement_rate
                    runs = {"inner": runner(*case)}
                    runs |= {name: runner(*case, replacement_rate=rate, **how) for name, how in variants.items()}
                    seconds = interleaved(runs, args.rounds)
                    inner = statistics.median(seconds["inner"]) / steps * 1e6
                    ratios = " ".join(f"{ratio(seconds, name, 'inner'):22.2f}" for name in variants)
                    print(f"{width:5} {batch:5} {optimizer:>5} {seeds:5} {inner:14.1f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
