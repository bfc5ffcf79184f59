"""PPO on the ant, end to end, with and without continual backpropagation, and with several seeds under vmap.

    python benchmarks/ppo_overhead.py
    python benchmarks/ppo_overhead.py --seeds 1 16 64 --rounds 5      # on an accelerator

An update is one rollout of 32 environments x 64 steps and 10 epochs of 16 minibatches; calls of the variants are
interleaved, and the ratio is the median over the rounds. `adam` is `cbp_jax.adam`, which CBP is wrapped around, and
`optax.adam` the usual one. `ppo_and_brax.py` compares with Brax's own PPO.
"""

import argparse
import platform
import statistics

import jax
import optax
from timing import interleaved, ratio

import cbp_jax
from cbp_jax import envs, nets
from cbp_jax.rl import ppo

OPTIMIZERS = {
    "optax.adam": lambda units: optax.adam(3e-4),
    "adam": lambda units: cbp_jax.adam(3e-4),
    "cbp": lambda units: cbp_jax.continual_backprop(
        cbp_jax.adam(3e-4), units, replacement_rate=1e-4, maturity_threshold=100
    ),
}


def runner(optimizer, seeds, updates):
    """Return a function without arguments that trains `seeds` agents for `updates` more rollouts."""
    env = envs.SlipperyAnt(friction=1.0, clip_actions=True)
    network = nets.ActorCritic(env.action_size, initial_log_std=-0.7)
    init, update = ppo.make(env, network, OPTIMIZERS[optimizer])
    go_on = lambda state: jax.lax.scan(lambda state, _: (update(state)[0], None), state, length=updates)[0]
    if seeds > 1:
        init, go_on = jax.vmap(init), jax.vmap(go_on)
    keys = jax.random.key(0) if seeds == 1 else jax.random.split(jax.random.key(0), seeds)
    state, run = jax.jit(init)(keys), jax.jit(go_on, donate_argnums=0)

    def once():
        nonlocal state
        state = run(state)
        return state.params

    return once


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--updates", type=int, default=2, help="rollouts with their updates in one call")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind} ({device.platform}), python {platform.python_version()}")
    print(f"{'seeds':>5} {'optimizer':>12} {'s/update':>12} {'env steps/s':>12} {'over first':>11}")
    for seeds in args.seeds:
        functions = {name: runner(name, seeds, args.updates) for name in args.optimizers}
        seconds = interleaved(functions, args.rounds)
        for name in args.optimizers:
            update = statistics.median(seconds[name]) / args.updates
            steps = seeds * ppo.Settings().steps / update
            print(f"{seeds:5} {name:>12} {update:12.4f} {steps:12.0f} {ratio(seconds, name, args.optimizers[0]):11.3f}")


if __name__ == "__main__":
    main()
