"""A step of a residual network with continual backpropagation compared with a step without it.

    taskset -c 1 python benchmarks/resnet_overhead.py --clock process
    taskset -c 1 python benchmarks/resnet_overhead.py --clock process --scales 1 --rounds 3     # ResNet-18 itself
    taskset -c 1 python benchmarks/resnet_overhead.py --clock process --scales 1 --part update  # without the network
    python benchmarks/resnet_overhead.py --scales 1 --steps 20                                  # on an accelerator

The network is ResNet-18 for images of 32x32 with all of its widths divided by `scale`, in training mode: it normalizes
by statistics of the batch and updates the running statistics. The optimizer is that of class-incremental CIFAR-100, SGD
with momentum 0.9 and weight decay 5e-4; CBP has the settings of that experiment, and resets the running statistics of
replaced channels. Calls of the variants are interleaved, and the ratio is the median over the rounds. `untouched` is
CBP with a utility that reads no weights and no activations; `eager` replaces a channel of every group in every step,
which with the paper's settings happens once in hundreds to thousands of steps. `--part update` times only what follows
the gradient, computing the update and applying it.
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
from cbp_jax import nets

PAPER = {"replacement_rate": 1e-5, "maturity_threshold": 1000}
WIDTHS = (64, 128, 256, 512)
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def nothing(view):
    """Return the same utility for all units, without reading weights."""
    return jnp.zeros(view.group.size)


VARIANTS = {
    "inner": None,
    "cbp": PAPER,
    "untouched": {**PAPER, "utility": nothing},
    "eager": {"replacement_rate": 1.0, "maturity_threshold": 0, "max_replacements": 1},
}


def random_like(shapes, key):
    """Draw arrays of the given shapes, without zeros."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        jax.random.uniform(k, leaf.shape, leaf.dtype, 0.1, 0.2) for k, leaf in zip(keys, leaves, strict=True)
    )


def runner(scale, batch, variant, steps, part):
    """Return a function without arguments that trains for `steps` more steps."""
    net = nets.ResNet(100, widths=tuple(width // scale for width in WIDTHS))
    x = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    y = jax.random.randint(jax.random.key(1), (batch,), 0, 100)
    rbg = jax.random.key(2, impl="rbg")  # compiles far sooner than threefry
    variables = jax.jit(net.init)(rbg, x[:1])
    params, batch_stats = variables["params"], variables["batch_stats"]

    def apply_fn(params, batch_stats, x):
        variables = {"params": params, "batch_stats": batch_stats}
        return net.apply(variables, x, train=True, mutable=["batch_stats"])

    tx = optax.with_extra_args_support(optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9)))
    if VARIANTS[variant] is None:
        units, apply = None, lambda *args: (apply_fn(*args), {})
    else:
        units = cbp_jax.discover_units(apply_fn, params, batch_stats, x)
        apply = cbp_jax.with_features(apply_fn, units)
        tx = cbp_jax.continual_backprop(tx, units, **VARIANTS[variant])

    def gradient(params, batch_stats, x):
        def loss_fn(params):
            (logits, new), features = apply(params, batch_stats, x)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, (new["batch_stats"], features)

        return jax.grad(loss_fn, has_aux=True)(params)

    if part == "step":
        inputs = x
    else:  # random arrays in place of the network's values
        inputs = random_like(jax.eval_shape(gradient, params, batch_stats, x), rbg)

    def go_on(carry, inputs):
        def step(carry, _):
            params, batch_stats, state = carry
            if part == "step":
                grads, (batch_stats, features) = gradient(params, batch_stats, inputs)
            else:
                grads, (batch_stats, features) = inputs
            updates, state = tx.update(grads, state, params, features=features)
            if units is not None:
                batch_stats = cbp_jax.reset_batch_stats(batch_stats, units, state.replaced)
            return (optax.apply_updates(params, updates), batch_stats, state), None

        return jax.lax.scan(step, carry, length=steps)[0]

    go_on = jax.jit(go_on, donate_argnums=0)
    carry = params, batch_stats, tx.init(params)

    def once():
        nonlocal carry
        carry = go_on(carry, inputs)
        return carry

    return once


def main():
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", type=int, nargs="+", default=[8], help="divisors of ResNet-18's widths")
    parser.add_argument("--batch", type=int, default=90)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--part", default="step", choices=["step", "update"])
    parser.add_argument("--steps", type=int, default=1, help="steps of a timed call")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="use `process` on a CPU with other work")
    args = parser.parse_args()
    if args.part == "update" and args.steps > 1:
        parser.error("--part update needs --steps 1, since a loop could read the same inputs only once")
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind} ({device.platform}), python {platform.python_version()}")
    print(f"{'widths':>17} {'batch':>5} {'variant':>10} {'ms/' + args.part:>12} {'over ' + args.variants[0]:>11}")
    for scale in args.scales:
        functions = {name: runner(scale, args.batch, name, args.steps, args.part) for name in args.variants}
        seconds = interleaved(functions, args.rounds, CLOCKS[args.clock])
        widths = " ".join(str(width // scale) for width in WIDTHS)
        for name in args.variants:
            milliseconds = statistics.median(seconds[name]) / args.steps * 1e3
            over = ratio(seconds, name, args.variants[0])
            print(f"{widths:>17} {args.batch:5} {name:>10} {milliseconds:12.1f} {over:11.3f}", flush=True)


if __name__ == "__main__":
    main()
