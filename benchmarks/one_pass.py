"""Whether XLA computes an update and the sums of |w| of the new weights, which contribution needs, in one pass.

    JAX_PLATFORMS=cpu python benchmarks/one_pass.py
    JAX_PLATFORMS=cpu python benchmarks/one_pass.py --width 2000 --steps 100

A step of SGD on the 784-w-w-w-10 network at batch size 1, written by hand: forward, backward, update, and the sums over
each unit's outgoing weights. For each variant, the compiled loop over steps is searched for operations that read or
write whole kernels, [784 or w, w]. The variants run in turn; times are medians over rounds.

- `sgd`: no sums.
- `sum`: `jnp.sum(abs(new), 1)` of the new weights.
- `product`: the same as a product with ones.
- `reduce`: one `lax.reduce` with two outputs, the sums of |w| and of w; a reduction cannot return the weights, too.
- `rows`: a `lax.scan` over the rows of a kernel that returns the new row and its sum.
- `before`: the sums of |w| before the update, which is not the algorithm, for comparison.
- `... ordered`: the same, after adding 0 times the gradient at the first hidden layer, so that an update depends on the
  end of the backward pass. Numbers are the same. XLA then knows that the backward pass no longer needs the old weights,
  and updates them in place. An `optimization_barrier` does not have this effect, as it is removed before that decision.
"""

import argparse
import collections
import itertools
import platform
import re
import statistics

import jax
import jax.numpy as jnp
from timing import interleaved, ratio

STEP_SIZE = 0.003


def by_rows(kernel, read, slope):
    """Return the new kernel and its sums of |w|, computed row by row."""

    def row(_, given):
        weights, activation = given
        new = weights - STEP_SIZE * activation * slope[0]
        return None, (new, jnp.sum(jnp.abs(new)))

    return jax.lax.scan(row, None, (kernel, read[0]))[1]


def reduced(new):
    """Return the sums of |w|, by a reduction with two outputs."""
    both = lambda one, other: (one[0] + other[0], one[1] + other[1])
    return jax.lax.reduce((jnp.abs(new), new), (0.0, 0.0), both, (1,))[0]


SUMS = {
    "sgd": lambda new, old: jnp.zeros(len(new)),
    "sum": lambda new, old: jnp.sum(jnp.abs(new), 1),
    "product": lambda new, old: jnp.abs(new) @ jnp.ones(new.shape[1]),
    "reduce": lambda new, old: reduced(new),
    "rows": None,
    "before": lambda new, old: jnp.sum(jnp.abs(old), 1),
}
VARIANTS = [*SUMS, *(f"{name} ordered" for name in SUMS if name != "rows")]


def step(variant, carry, x):
    """Take one step of SGD on a kernel for each layer, and update the running means of utilities."""
    (kernels, utilities), (sums_of, _, ordered) = carry, variant.partition(" ")
    h, read = x, []
    for kernel in kernels:
        read.append(h)
        h = jax.nn.relu(h @ kernel) if len(read) < len(kernels) else h @ kernel
    slopes = [h - 1.0]
    for kernel, h in zip(kernels[:0:-1], read[:0:-1], strict=True):
        slopes.insert(0, (slopes[0] @ kernel.T) * (h > 0))
    if ordered:
        slopes = [slope + 0.0 * slopes[0][0, 0] for slope in slopes]
    if sums_of == "rows":
        found = [by_rows(*given) for given in zip(kernels, read, slopes, strict=True)]
    else:
        new = [kernel - STEP_SIZE * h.T @ slope for kernel, h, slope in zip(kernels, read, slopes, strict=True)]
        found = [(each, SUMS[sums_of](each, kernel)) for each, kernel in zip(new, kernels, strict=True)]
    new, sums = zip(*found, strict=True)
    means = [0.99 * u + 0.01 * jnp.abs(h[0]) * total for u, h, total in zip(utilities, read, sums, strict=True)]
    return (new, tuple(means)), None


def passes(text, width):
    """Count operations of the loop that read or write whole kernels, by what they do, in XLA's text of a program.

    Fusions are named after what they contain. Loops inside the loop, those of `rows`, are not looked into.
    """
    kernel = rf"f32\[(?:784|{width}),{width}\]"
    loops = [body for body in re.findall(r"^%\S+ \([^\n]*\{\n.*?^\}", text, re.S | re.M) if body.count(" dot(") >= 4]
    found = collections.Counter()
    for body in loops:
        shapes = dict(re.findall(r"(%\S+) = (\S+)", body))
        for name, shape, operation, operands in re.findall(r"(%\S+) = (\S+) ([a-z-]+)\((.*?)\)", body):
            if operation in ("get-tuple-element", "tuple", "parameter", "bitcast"):
                continue
            reads = any(re.match(kernel, shapes.get(operand, "")) for operand in re.findall(r"%[^\s,]+", operands))
            writes = re.match(kernel, shape) is not None
            if reads or writes:
                of_reading = "products" if "dot" in name else "sums"
                found["copies" if operation == "copy" else "updates" if writes else of_reading] += 1
    return found


def runner(variant, width, steps):
    """Compile a function without arguments that takes so many steps; also return XLA's text of the program."""
    sizes = [784, width, width, width, 10]
    keys = jax.random.split(jax.random.key(0), len(sizes))
    kernels = tuple(
        jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, shape in zip(keys, itertools.pairwise(sizes), strict=False)
    )
    carry = kernels, tuple(jnp.zeros(len(kernel)) for kernel in kernels)
    x = jax.random.uniform(keys[-1], (steps, 1, 784))
    run = jax.jit(
        lambda carry, x: jax.lax.scan(lambda *given: step(variant, *given), carry, x)[0], donate_argnums=0
    ).lower(carry, x).compile()  # fmt: skip

    def once():
        nonlocal carry
        carry = run(carry, x)
        return carry

    return once, run.as_text()


def main():
    """Print a line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind} ({device.platform}), {platform.machine()}")
    print(f"width {args.width}, batch 1; operations on whole kernels in a step, of three kernels")
    runs = {variant: runner(variant, args.width, args.steps) for variant in VARIANTS}
    seconds = interleaved({variant: once for variant, (once, _) in runs.items()}, args.rounds)
    kinds = ("products", "updates", "sums", "copies")
    print(f"{'variant':>16} " + " ".join(f"{kind:>9}" for kind in kinds) + f" {'us/step':>9} {'over sgd':>9}")
    for variant, (_, text) in runs.items():
        found = passes(text, args.width)
        each = statistics.median(seconds[variant]) / args.steps * 1e6
        counts = " ".join(f"{found[kind]:9}" for kind in kinds)
        print(f"{variant:>16} {counts} {each:9.1f} {ratio(seconds, variant, 'sgd'):9.2f}")


if __name__ == "__main__":
    main()
