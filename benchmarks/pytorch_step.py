"""Times a step of continual backpropagation here and in PyTorch, where it is written like the public programs.

    pip install -c constraints.txt -e '.[pytorch]'
    python benchmarks/pytorch_step.py
    python benchmarks/pytorch_step.py --program path/to/loss-of-plasticity     # times that clone's own classes

Both train the 784-w-w-w-10 ReLU network of Online Permuted MNIST with SGD, on single examples or minibatches, and
replace units by contribution utility. In PyTorch a step is a forward pass, a backward pass, a step of the optimizer,
and a Python loop over the layers that updates utilities and ages and replaces units. In cbp_jax the steps run in a
`lax.scan`. Calls are interleaved in one process, and times are medians over the rounds.
"""

import argparse
import itertools
import os
import platform
import statistics
import sys

import jax
import torch
import torch.nn.functional as F
from cbp_overhead import runner
from timing import interleaved, ratio

REPLACEMENT_RATE, DECAY_RATE, MATURITY_THRESHOLD, STEP_SIZE = 1e-4, 0.99, 100, 0.003


class Net(torch.nn.Module):
    """The network of `cbp_overhead.Net`, which also returns the outputs of its units."""

    def __init__(self, width):
        super().__init__()
        sizes = [784, width, width, width, 10]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*size) for size in itertools.pairwise(sizes))
        for layer in self.layers:
            torch.nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            torch.nn.init.zeros_(layer.bias)

    def predict(self, x):
        features = []
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
            features.append(x)
        return self.layers[-1](x), features


class ContinualBackprop:
    """Continual backpropagation in eager PyTorch: all state in lists with one tensor per layer."""

    def __init__(self, net, step_size=STEP_SIZE):
        self.net, hidden = net, net.layers[:-1]
        self.optimizer = torch.optim.SGD(net.parameters(), lr=step_size)
        self.utility = [torch.zeros(layer.out_features) for layer in hidden]
        self.mean_feature = [torch.zeros(layer.out_features) for layer in hidden]
        self.age = [torch.zeros(layer.out_features) for layer in hidden]
        self.to_replace = [0.0] * len(hidden)

    def learn(self, x, y):
        output, features = self.net.predict(x)
        loss = F.cross_entropy(output, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for i, feature in enumerate(features):
                self.replace(i, feature)
        return loss.detach()

    def replace(self, i, feature):
        """Run Algorithm 1 of the paper for one layer."""
        layer, following = self.net.layers[i], self.net.layers[i + 1]
        self.age[i] += 1
        correction = 1 - DECAY_RATE ** self.age[i]
        self.mean_feature[i] += (1 - DECAY_RATE) * (feature.mean(0) - self.mean_feature[i])
        contribution = following.weight.abs().mean(0) * feature.abs().mean(0)
        self.utility[i] += (1 - DECAY_RATE) * (contribution - self.utility[i])
        mature = torch.where(self.age[i] > MATURITY_THRESHOLD)[0]
        self.to_replace[i] += REPLACEMENT_RATE * len(mature)
        count = int(self.to_replace[i])
        if not count:
            return
        self.to_replace[i] -= count
        utility = self.utility[i] / correction
        units = mature[torch.topk(-utility[mature], count)[1]]
        bound = (6 / layer.in_features) ** 0.5
        layer.weight[units] = torch.empty(count, layer.in_features).uniform_(-bound, bound)
        layer.bias[units] = 0
        following.bias += following.weight[:, units] @ (self.mean_feature[i] / correction)[units]
        following.weight[:, units] = 0
        self.utility[i][units] = 0
        self.mean_feature[i][units] = 0
        self.age[i][units] = 0


def published(program, width):
    """Return the learner of a clone of the Nature paper's program."""
    sys.path.insert(0, program)
    from lop.algos.cbp import ContinualBackprop as Published
    from lop.nets.deep_ffnn import DeepFFNN

    net = DeepFFNN(input_size=784, num_features=width, num_outputs=10, num_hidden_layers=3)
    return Published(
        net,
        step_size=STEP_SIZE,
        loss="nll",
        replacement_rate=REPLACEMENT_RATE,
        decay_rate=DECAY_RATE,
        maturity_threshold=MATURITY_THRESHOLD,
        accumulate=True,
    )


def pytorch_runner(learner, batch, steps):
    """Return a function of no arguments that trains for `steps` steps."""
    x, y = torch.rand(64, batch, 784), torch.randint(0, 10, (64, batch))

    def run():
        for i in range(steps):
            learner.learn(x[i % 64], y[i % 64])

    return run


def main():
    """Print a table of times and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[100, 1000, 2000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--program", help="clone of the paper's public program, to time its own classes")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = jax.devices()[0]
    machine = f"{device.platform} {device.device_kind}, {platform.processor() or platform.machine()}"
    whose = "the public program" if args.program else "the PyTorch of this script"
    print(f"{machine}, {os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}")
    print(f"PyTorch: {whose}, {args.threads} threads")
    print(f"{'width':>5} {'batch':>5} {'pytorch us/step':>16} {'cbp_jax us/step':>16} {'pytorch / cbp_jax':>18}")
    for width in args.widths:
        for batch in args.batches:
            weights = 784 * width + 2 * width**2 + 10 * width
            steps = max(10, min(1000, int(1e8 / weights)))
            learner = published(args.program, width) if args.program else ContinualBackprop(Net(width))
            settings = {"replacement_rate": REPLACEMENT_RATE, "maturity_threshold": MATURITY_THRESHOLD}
            seconds = interleaved(
                {
                    "pytorch": pytorch_runner(learner, batch, steps),
                    "cbp_jax": runner(width, batch, "sgd", 1, steps, "map", utility="contribution", **settings),
                },
                args.rounds,
            )
            torch_time, jax_time = (statistics.median(seconds[name]) / steps * 1e6 for name in ("pytorch", "cbp_jax"))
            print(
                f"{width:5} {batch:5} {torch_time:16.1f} {jax_time:16.1f} {ratio(seconds, 'pytorch', 'cbp_jax'):18.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
