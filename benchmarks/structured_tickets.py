"""Structured tickets of LeNet-300-100: units are pruned, and the smaller dense network is measured.

    python benchmarks/structured_tickets.py
    python benchmarks/structured_tickets.py --dataset mnist --iterations 10000 --rounds 10

Each round trains the network from its initial weights, prunes a fraction of the units of each hidden layer, those with
the lowest utility (`--utility`), and removes them from the network. A row is a round: the units and weights that are
left, the test accuracy of the smaller network after its own training, the largest difference between outputs of the
trained masked network and of the smaller network with its weights, and the times of a training step of the masked
network and of the smaller one, divided by that of the dense network.
"""

import argparse
import functools
import platform

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import interleaved, ratio

import cbp_jax
from cbp_jax import data, nets, tickets


def examples(args):
    """Return images in [0, 1] and labels for training and for testing."""
    train = data.load(args.dataset, data_dir=args.data_dir)
    flat = lambda each: (
        jnp.asarray(each.images.reshape(len(each), -1) / each.max_value, jnp.float32),
        jnp.asarray(each.labels),
    )
    if args.dataset != "digits":
        return flat(train), flat(data.load(args.dataset, "test", data_dir=args.data_dir))
    order = np.random.default_rng(0).permutation(len(train))
    images, labels = flat(train)
    return (images[order[300:]], labels[order[300:]]), (images[order[:300]], labels[order[:300]])


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--hidden", type=int, nargs="+", default=[300, 100])
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--fraction", type=float, default=0.3)
    parser.add_argument("--utility", default="weight")
    parser.add_argument("--timed-steps", type=int, default=200)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"{device.platform} {device.device_kind}, {platform.processor() or platform.machine()}, jax {jax.__version__}"
    )
    (x, y), (x_test, y_test) = examples(args)
    classes = int(y.max()) + 1

    def network(sizes):
        return nets.MLP(sizes, classes, kernel_init=jax.nn.initializers.glorot_normal())

    def training(net, steps):
        def loss(params, batch):
            return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, batch[0]), batch[1]).mean()

        def batch(step):
            rows = jax.random.randint(jax.random.fold_in(jax.random.key(1), step), (args.batch,), 0, len(y))
            return x[rows], y[rows]

        return tickets.Training(loss=loss, optimizer=optax.adam(1.2e-3), batch=batch, steps=steps)

    net = network(args.hidden)
    initial = net.init(jax.random.key(0), x[:1])
    units = cbp_jax.discover_units(net.apply, initial, x[:1])
    with_features = jax.jit(cbp_jax.with_features(net.apply, units))
    keep = {group.name: jnp.ones(group.size, bool) for group in units}
    print(f"{'units':>12} {'weights':>8} {'accuracy':>8} {'difference':>10} {'masked/dense':>12} {'smaller/dense':>13}")
    for _ in range(args.rounds + 1):
        sizes = tuple(int(keep[group.name].sum()) for group in units)
        smaller, mask = network(sizes), tickets.unit_mask(initial, units, keep)
        start = tickets.shrink_params(initial, units, keep)
        full = tickets.full_mask(start)
        trained = training(smaller, args.iterations)(start, full).params
        accuracy = float(jnp.mean(jnp.argmax(smaller.apply(trained, x_test), -1) == y_test))

        dense, small = training(net, args.timed_steps), training(smaller, args.timed_steps)
        timed = {
            "dense": functools.partial(dense, initial, tickets.full_mask(initial)),
            "masked": functools.partial(dense, tickets.apply_mask(initial, mask), mask),
            "smaller": functools.partial(small, start, full),
        }
        seconds = interleaved(timed, 7)

        whole = training(net, args.iterations)(tickets.apply_mask(initial, mask), mask).params
        cut = smaller.apply(tickets.shrink_params(whole, units, keep), x_test)
        difference = float(jnp.abs(cut - net.apply(whole, x_test)).max())
        weights = sum(leaf.size for leaf in jax.tree.leaves(trained))
        ratios = [ratio(seconds, name, "dense") for name in ("masked", "smaller")]
        print(
            f"{'-'.join(map(str, sizes)):>12} {weights:8,} {100 * accuracy:7.2f}% {difference:10.1e} {ratios[0]:12.2f} "
            f"{ratios[1]:13.2f}",
            flush=True,
        )
        _, features = with_features(whole, x[:1000])
        keep = tickets.prune_units(whole, units, args.fraction, keep=keep, utility=args.utility, features=features)


if __name__ == "__main__":
    main()
