"""HesScale compared with the gradient: the cost of a curvature for every weight.

    python benchmarks/hesscale.py

Each call computes the loss and gradients, and with HesScale also the Hessian's diagonal, `steps` times in a scan. Both
move the parameters a little, so that the compiler can neither remove nor hoist them. Calls are interleaved, and the
ratio is the median over rounds. `hutchinson` is one sample of Hutchinson's estimate, for comparison.
"""

import argparse
import platform
import statistics

import jax
import jax.numpy as jnp
import optax
from timing import interleaved, ratio

from cbp_jax import contract_convolutions
from cbp_jax.curvature import hesscale, hutchinson
from cbp_jax.nets import MLP, ConvNet

MLP_CASE = (MLP((300, 150), 10), (784,))
CONV_CASE = (ConvNet(10, channels=(16, 32), kernel_sizes=(5, 3), hidden=(64,)), (28, 28, 1))
# Network, shape of an input, size of a batch, and whether convolutions are computed as matrix products.
CASES = {
    "784-300-150-10, batch 1": (*MLP_CASE, 1, False),
    "784-300-150-10, batch 32": (*MLP_CASE, 32, False),
    "conv 16-32, dense 64, batch 32": (*CONV_CASE, 32, False),
    "the same, as products": (*CONV_CASE, 32, True),
}


def runners(net, shape, batch, contracted, steps):
    """Compile functions without arguments: the gradient, with HesScale, with Hutchinson's estimate."""
    x = jax.random.normal(jax.random.key(0), (8, batch, *shape))
    y = jax.random.randint(jax.random.key(1), (8, batch), 0, 10)
    params = net.init(jax.random.key(2), x[0])
    apply = contract_convolutions(net.apply) if contracted else net.apply

    def loss_fn(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()

    def move(params, *trees):
        return jax.tree.map(lambda p, *d: p - 1e-6 * sum(d), params, *trees)

    def gradient(params, i):
        return move(params, jax.grad(loss_fn)(params, x[i % 8], y[i % 8])), None

    def with_hesscale(params, i):
        return move(params, *hesscale(apply, params, x[i % 8], y[i % 8])[1:]), None

    def with_hutchinson(params, i):
        loss = lambda params: loss_fn(params, x[i % 8], y[i % 8])
        return move(params, jax.grad(loss)(params), hutchinson(loss, params, jax.random.key(i))), None

    def runner(step):
        run = jax.jit(lambda params: jax.lax.scan(step, params, jnp.arange(steps))[0])
        return lambda: run(params)

    return {"gradient": runner(gradient), "hesscale": runner(with_hesscale), "hutchinson": runner(with_hutchinson)}


def main():
    """Print a table of ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="approximate time of a timed gradient call")
    args = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{device.platform} {device.device_kind}, {platform.processor() or platform.machine()}, jax {jax.__version__}"
    )
    print(f"{'network':>30} {'gradient us':>12} {'+ hesscale':>12} {'+ hutchinson':>13}")
    for name, case in CASES.items():
        once = statistics.median(interleaved({"gradient": runners(*case, 20)["gradient"]}, 3)["gradient"]) / 20
        steps = max(5, min(5000, int(args.seconds / once)))
        seconds = interleaved(runners(*case, steps), args.rounds)
        gradient = statistics.median(seconds["gradient"]) / steps * 1e6
        ratios = ratio(seconds, "hesscale", "gradient"), ratio(seconds, "hutchinson", "gradient")
        print(f"{name:>30} {gradient:12.1f} {ratios[0]:12.2f} {ratios[1]:13.2f}", flush=True)


if __name__ == "__main__":
    main()
