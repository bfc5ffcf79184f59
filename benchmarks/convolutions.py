"""Steps of convolutional networks in a loop on a CPU: XLA's convolutions compared with matrix products.

    python benchmarks/convolutions.py                      # ResNet-18 with an eighth of its widths; ConvNet
    python benchmarks/convolutions.py --networks resnet --scale 1 --variants products cbp --rounds 1
    taskset -c 0 python benchmarks/convolutions.py --networks convnet --variants xla_pooling products --clock process

A step is a forward and a backward pass and an update by SGD with momentum, in a `lax.scan` as in the training loop.
Variants: `convolutions` uses XLA's convolutions, `outside` the same without a loop, `products` those of
`contract_convolutions`, `xla_pooling` the same but XLA's derivative of pooling. `cbp` and `outside_cbp` are `products`
and `outside` with continual backpropagation. Calls are interleaved; seconds are medians.
"""

import argparse
import platform
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from timing import interleaved, ratio

import cbp_jax
from cbp_jax import nets

WIDTHS = (64, 128, 256, 512)
VARIANTS = ("convolutions", "outside", "outside_cbp", "xla_pooling", "products", "cbp")
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def network(name, scale):
    """Return a network and its batch size."""
    if name == "resnet":
        return nets.ResNet(100, widths=tuple(width // scale for width in WIDTHS)), 90
    return nets.ConvNet(2), 100


def runner(name, scale, variant, steps):
    """Return a function without arguments that trains for `steps` more steps."""
    net, batch = network(name, scale)
    x = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    y = jnp.arange(batch) % 2
    rbg = jax.random.key(2, impl="rbg")  # compiles far sooner than threefry
    variables = jax.jit(net.init)(rbg, x[:1])
    mutable = ["batch_stats"] if "batch_stats" in variables else []

    def apply_fn(params, rest, x):
        return net.apply({**rest, "params": params}, x, train=True, mutable=mutable)

    params, rest = variables["params"], {key: tree for key, tree in variables.items() if key != "params"}
    apply, units = lambda *args: (apply_fn(*args), {}), None
    tx = optax.with_extra_args_support(optax.sgd(0.01, momentum=0.9))
    if variant.endswith("cbp"):
        units = cbp_jax.discover_units(apply_fn, params, rest, x)
        apply = cbp_jax.with_features(apply_fn, units)
        tx = cbp_jax.continual_backprop(tx, units, replacement_rate=1e-5, maturity_threshold=1000)
    if variant in ("xla_pooling", "products", "cbp"):
        apply = cbp_jax.contract_convolutions(apply)
    if variant == "xla_pooling":
        apply = mock.patch("cbp_jax.pooling.is_followed", lambda eqn: False)(apply)

    def step(carry, _=None):
        params, rest, state = carry

        def loss_fn(params):
            (logits, new), features = apply(params, rest, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (new, features)

        grads, (new, features) = jax.grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, features=features)
        if units is not None and mutable:
            new = cbp_jax.reset_batch_stats(new, units, state.replaced)
        return (optax.apply_updates(params, updates), dict(new), state), None

    one = jax.jit(lambda carry: step(carry)[0], donate_argnums=0)
    many = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0], donate_argnums=0)
    carry = params, rest, tx.init(params)

    def once():
        nonlocal carry
        if variant.startswith("outside"):
            for _ in range(steps):
                carry = one(carry)
        else:
            carry = many(carry)
        return carry

    return once


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet", "convnet"], choices=["resnet", "convnet"])
    parser.add_argument("--scale", type=int, default=8, help="divides the widths of ResNet-18")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=2, help="steps of a timed call; the loop needs more than 1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="use `process` on a CPU with other work")
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind} ({device.platform}), python {platform.python_version()}")
    print(f"{'network':>8} {'variant':>13} {'s/step':>9} {'of ' + args.variants[0]:>16}")
    for name in args.networks:
        functions = {variant: runner(name, args.scale, variant, args.steps) for variant in args.variants}
        seconds = interleaved(functions, args.rounds, CLOCKS[args.clock])
        for variant in args.variants:
            median = statistics.median(seconds[variant]) / args.steps
            print(
                f"{name:>8} {variant:>13} {median:9.4f} {ratio(seconds, variant, args.variants[0]):16.3f}", flush=True
            )


if __name__ == "__main__":
    main()
