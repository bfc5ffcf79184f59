"""Time that it takes to find units: python benchmarks/discovery.py [--only NAME].

For networks given only by shapes (without arrays), prints the seconds to trace them and to find their units, and
the number of groups. The second of two calls is timed.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp

import cbp_jax
from cbp_jax import nets


def perceptron(depth, width):
    """Return a deep perceptron."""
    params = {f"layer{n:02d}": jax.ShapeDtypeStruct((width, width), jnp.float32) for n in range(depth)}

    def apply_fn(params, x):
        for name in sorted(params):
            x = jax.nn.relu(x @ params[name])
        return x

    return apply_fn, params, jax.ShapeDtypeStruct((1, width), jnp.float32)


def encoder(depth, width, heads):
    """Return a vision transformer."""
    net, x = nets.ViT(10, depth=depth, width=width, heads=heads, hidden=4 * width), jnp.zeros((1, 32, 32, 3))
    return net.apply, jax.eval_shape(net.init, jax.random.key(0), x), x


def resnet(blocks):
    """Return a residual network with its full width."""
    net, x = nets.ResNet(10, blocks=blocks), jnp.zeros((1, 32, 32, 3))
    return net.apply, jax.eval_shape(net.init, jax.random.key(0), x), x


def decoder(depth, width, heads, hidden, vocabulary, length=16):
    """Return a decoder like Llama: RMS norm, rotary positions, gated perceptrons."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    layer = {
        **{name: shape(width, width) for name in ("query", "key", "value", "out")},
        **{"gate": shape(width, hidden), "up": shape(width, hidden), "down": shape(hidden, width)},
        **{"before_attention": shape(width), "before_perceptron": shape(width)},
    }
    params = {f"layer{n:02d}": layer for n in range(depth)}
    params = {
        "layers": params,
        "table": shape(vocabulary, width),
        "norm": shape(width),
        "head": shape(width, vocabulary),
    }

    def norm(x, scale):
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)).astype(x.dtype) * scale

    def rotate(x):
        half = x.shape[-1] // 2
        angles = jnp.arange(x.shape[1])[:, None, None] / 10_000 ** (jnp.arange(half) / half)
        cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def block(p, x):
        h = norm(x, p["before_attention"])
        split = lambda name: (h @ p[name]).reshape(*x.shape[:2], heads, -1)
        x = x + jax.nn.dot_product_attention(
            rotate(split("query")), rotate(split("key")), split("value"), is_causal=True
        ).reshape(x.shape) @ p["out"]  # fmt: skip
        h = norm(x, p["before_perceptron"])
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    def apply_fn(params, tokens):
        x = params["table"][tokens]
        for name in sorted(params["layers"]):
            x = block(params["layers"][name], x)
        return norm(x, params["norm"]) @ params["head"]

    return apply_fn, params, jax.ShapeDtypeStruct((1, length), jnp.int32)


NETWORKS = {
    "perceptron of 24 x 1,024": functools.partial(perceptron, 24, 1024),
    "transformer of 24 x 1,024": functools.partial(encoder, 24, 1024, 16),
    "residual network of 50 layers": functools.partial(resnet, (3, 4, 6, 3)),
    "decoder of 7B parameters": functools.partial(decoder, 32, 4096, 32, 11008, 32_000),
}


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NETWORKS, help="measure only this network")
    arguments = parser.parse_args()
    print(f"{'network':32s} {'trace':>8s} {'find':>8s} {'groups':>7s} {'left out':>9s}")
    for name, make in NETWORKS.items():
        if arguments.only not in (None, name):
            continue
        apply_fn, params, x = make()
        for _ in range(2):
            start = time.perf_counter()
            jax.make_jaxpr(lambda params, x, apply_fn=apply_fn: apply_fn(params, x))(params, x)
            traced = time.perf_counter()
            units = cbp_jax.discover_units(apply_fn, params, x)
            found = time.perf_counter()
        print(
            f"{name:32s} {traced - start:8.2f} {found - traced:8.2f} {len(units):7d} {len(units.left_out):9d}",
            flush=True,
        )


if __name__ == "__main__":
    main()
