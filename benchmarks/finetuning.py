"""A step of fine-tuning an encoder, with all weights and with adapters, compared with the matrix products alone.

    python benchmarks/finetuning.py                  # 6 layers of width 384, 16 texts of 64 tokens
    python benchmarks/finetuning.py --depth 2 --rounds 3

A step is a forward and a backward pass and an update by Adam, compiled, outside of a loop; with `--scan`, a `lax.scan`
of eight of them, as in the experiments. `dot` computes the layers' matrix products with `jnp.dot`, three times as in a
step: forward, and for the gradients of inputs and of weights. `full` trains all weights, `lora` adapters of all layers
that are applied in factors (`cbp_jax.lora.factored`), and `merged` adapters that are added to the kernels first. Calls
are interleaved; seconds are medians. With `--processor` they are the processor time of all cores together, for a
machine with other work. The speed is the number of operations in the products of a full step, divided by the
seconds.
"""

import argparse
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import interleaved, ratio

from cbp_jax import lora, nets

VARIANTS = ("dot", "full", "lora", "merged")


def products(batch, length, depth, width, hidden):
    """Return the sizes (rows, in, out) of the layers' products, and the operations in a step, including attention."""
    rows = batch * length
    sizes = depth * ([(rows, width, width)] * 4 + [(rows, width, hidden), (rows, hidden, width)])
    tokens = depth * 2 * 2 * batch * length**2 * width
    return sizes, 3 * (sum(2 * m * k * n for m, k, n in sizes) + tokens)


def runner(variant, args):
    """Return a function without arguments that takes `args.steps` more steps."""
    sizes, _ = products(args.batch, args.length, args.depth, args.width, args.hidden)
    if variant == "dot":
        arrays = {size: (jnp.ones(size[:2]), jnp.ones(size[1:])) for size in set(sizes)}
        dot = jax.jit(jnp.dot)
        return lambda: [dot(*arrays[size]) for _ in range(3 * args.steps) for size in sizes]
    encoder = nets.Bert(30522, args.width, args.depth, args.heads, args.hidden, dropout_rate=0.0, pooler=False)
    net = nets.TextClassifier(5, encoder)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 30000, (args.batch, args.length)), jnp.int32)
    labels = jnp.arange(args.batch) % 5
    params = jax.jit(net.init)(jax.random.key(0), tokens)["params"]
    trained, frozen = params, {}
    apply = lambda params, frozen, tokens: net.apply({"params": params}, tokens)
    if variant != "full":
        frozen = params["encoder"]
        adapter = lora.init(frozen, 0, rank=args.rank, target_modules="layer*")
        trained = {"adapter": adapter, "head": params["head"]}

        def apply(trained, frozen, tokens):
            encoder = lora.apply(frozen, trained["adapter"])
            return net.apply({"params": {"encoder": encoder, "head": trained["head"]}}, tokens)

        apply = lora.factored(apply) if variant == "lora" else apply
    tx = optax.adam(1e-5)

    def many(carry, frozen):
        def loss(trained):
            return optax.softmax_cross_entropy_with_integer_labels(apply(trained, frozen, tokens), labels).mean()

        def step(carry, _=None):
            trained, state = carry
            updates, state = tx.update(jax.grad(loss)(trained), state, trained)
            return (optax.apply_updates(trained, updates), state), None

        return jax.lax.scan(step, carry, None, args.steps)[0] if args.scan else step(carry)[0]

    run = jax.jit(many, donate_argnums=0)
    carry = [jax.tree.map(jnp.copy, (trained, tx.init(trained)))]

    def advance():
        # Frozen arrays are arguments, because constants would be copied in each call.
        carry[0] = run(carry[0], frozen)
        return carry[0]

    return advance


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--processor", action="store_true")
    sizes = {"depth": 6, "width": 384, "heads": 12, "hidden": 1536, "batch": 16, "length": 64, "rank": 8, "rounds": 7}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.steps = 8 if args.scan else 1
    clock = time.process_time if args.processor else time.perf_counter
    seconds = interleaved({variant: runner(variant, args) for variant in args.variants}, args.rounds, clock)
    _, operations = products(args.batch, args.length, args.depth, args.width, args.hidden)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {platform.machine()}; {vars(args)}")
    print("variant   seconds/step     GFLOP/s of a full step   over full")
    for variant in args.variants:
        each = statistics.median(seconds[variant]) / args.steps
        relative = f"{ratio(seconds, variant, 'full'):9.2f}" if "full" in seconds else ""
        print(f"{variant:8}  {each:14.3f}  {operations / each / 1e9:23.1f}   {relative}")


if __name__ == "__main__":
    main()
