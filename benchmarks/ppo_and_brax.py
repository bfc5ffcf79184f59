"""PPO here, with Adam and with continual backpropagation, and Brax's own: environment steps per second, and returns.

    python benchmarks/ppo_and_brax.py                          # about ten minutes on two cores
    python benchmarks/ppo_and_brax.py --steps 3000000 --points 20

All three train on Brax's ant (backend spring), whose episodes always begin with an environment's first state, with the
same numbers of environments and steps in a rollout, of epochs and minibatches, with networks of the same sizes, the
same step size, discount, GAE and clipping. They take turns in one process: after each of `--points` parts of Brax's
training, ours train for as many steps. A return is that of one episode with sampled actions in each of `--evaluated`
environments, for all three. Times are those of training alone, without evaluation; steps per second are the median over
the parts after the first one, which includes compilation.

What differs:
- Actions: Brax squashes samples by tanh, and its standard deviation depends on the observation; ours is one parameter
  for each action, and samples are clipped to [-1, 1].
- Brax computes advantages anew in each minibatch, with the values of the moment, and normalizes them there; ours are
  computed and normalized once for a rollout. Its minibatches are whole sequences of steps; ours are single steps.
- Initial weights: both draw them with LeCun's variance, Brax from a uniform and ours from a normal distribution.
- Observations are normalized by none, or with `--normalize` by all: Brax includes the rollout that it learns from.
"""

import argparse
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import optax

import cbp_jax
from cbp_jax import envs, nets
from cbp_jax.envs.walker import brax, make_brax_env
from cbp_jax.rl import ppo

OURS = {
    "ours, adam": lambda units: optax.adam(STEP_SIZE),
    "ours, cbp": lambda units: cbp_jax.continual_backprop(
        cbp_jax.adam(STEP_SIZE), units, replacement_rate=1e-4, maturity_threshold=100
    ),
}
STEP_SIZE = 3e-4
BRAX = "brax"


class Curve:
    """Training of an agent.

    Attributes:
      points: number of steps and the mean return after them.
      seconds: of each part of the training.
    """

    def __init__(self):
        self.points, self.seconds = [], []

    def steps_per_second(self, steps):
        """Return the median over the parts after the first, which includes compilation, if there are more."""
        return steps / statistics.median(self.seconds[1:] or self.seconds)

    def steps_to(self, value):
        """Return the steps after which the return first is at least `value`, on lines between the points."""
        for (before, low), (after, high) in zip(self.points, self.points[1:], strict=False):
            if high >= value:
                return before if low >= value else before + (after - before) * (value - low) / (high - low)
        return None


def ours(optimizer, settings, hidden, updates, evaluated, episode_length):
    """Return functions that evaluate an agent, and that train it for `updates` rollouts."""
    env = envs.Walker("ant", clip_actions=True, episode_length=episode_length, random_reset=False)
    network = nets.ActorCritic(env.action_size, hidden, initial_log_std=-0.7)
    init, update = ppo.make(env, network, optimizer, settings)
    state = jax.jit(init)(jax.random.key(0))
    go_on = jax.jit(
        lambda state: jax.lax.scan(lambda state, _: (update(state)[0], None), state, length=updates)[0],
        donate_argnums=0,
    )

    @jax.jit
    def episodes(params, statistics, key):
        first_key, key = jax.random.split(key)
        seen = statistics if settings.normalize_observations else None

        def step(carry, key):
            states, alive, total = carry
            states = jax.vmap(env.step)(states, ppo.act(network, params, states.obs, key, seen))
            total += alive * states.reward
            return (states, alive * (1 - states.done), total), None

        states = jax.vmap(env.reset)(jax.random.split(first_key, evaluated))
        carry = states, jnp.ones(evaluated), jnp.zeros(evaluated)
        return jnp.mean(jax.lax.scan(step, carry, jax.random.split(key, episode_length))[0][-1])

    def evaluate(key):
        return float(episodes(state.params, state.statistics, key))

    def train():
        nonlocal state
        state = jax.block_until_ready(go_on(state))

    return evaluate, train


def replicated(tree, devices):
    """Return arrays [devices, ...], placed as Brax's training returns them, so that it is compiled only once."""
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, ("i",)), jax.sharding.PartitionSpec("i"))
    return jax.tree.map(lambda x: jax.device_put(jnp.stack([x] * len(devices)), sharding), tree)


def compare(args):
    """Train all agents in turn, and return their curves by name, and the number of steps of a part."""
    settings = ppo.Settings(
        num_envs=args.num_envs,
        rollout_length=args.rollout_length,
        epochs=args.epochs,
        minibatches=args.minibatches,
        normalize_observations=args.normalize,
    )
    hidden = tuple(args.hidden)
    updates = -(-args.steps // (args.points * settings.steps))
    part = updates * settings.steps
    agents = {
        name: ours(optimizer, settings, hidden, updates, args.evaluated, args.episode_length)
        for name, optimizer in OURS.items()
    }
    curves = {name: Curve() for name in (*agents, BRAX)}

    def go_on(done, found):
        """Record a point of Brax's agent, and let ours train as far."""
        if done:
            curves[BRAX].seconds.append(part / found["training/sps"])
        curves[BRAX].points.append((done, float(found["eval/episode_reward"])))
        for name, (evaluate, train) in agents.items():
            if done:
                start = time.perf_counter()
                train()
                curves[name].seconds.append(time.perf_counter() - start)
            curves[name].points.append((done, evaluate(jax.random.key(done))))
        speeds = [f"{part / curve.seconds[-1]:12.0f}" if done else f"{'':12}" for curve in curves.values()]
        print(
            f"{done:10} " + " ".join([*(f"{curve.points[-1][1]:12.1f}" for curve in curves.values()), *speeds]),
            flush=True,
        )

    names = " ".join(f"{name:>12}" for name in curves)
    print(
        f"{args.num_envs} environments x {args.rollout_length} steps, {args.epochs} epochs x {args.minibatches} "
        f"minibatches, hidden {args.hidden}\n\nafter so many environment steps, the mean return of {args.evaluated} "
        f"episodes, and environment steps per second, at first with compilation\n{'steps':>10} {names} {names}",
        flush=True,
    )
    if not hasattr(jax, "device_put_replicated"):  # newer versions of JAX have removed what Brax 0.14 calls
        jax.device_put_replicated = replicated
    networks = brax("training.agents.ppo.networks")
    brax("training.agents.ppo.train").train(
        environment=make_brax_env("ant", "spring"),
        num_timesteps=args.points * part,
        num_envs=settings.num_envs,
        episode_length=args.episode_length,
        unroll_length=settings.rollout_length,
        # Sequences of a rollout's length, one for each environment.
        batch_size=settings.num_envs // settings.minibatches,
        num_minibatches=settings.minibatches,
        num_updates_per_batch=settings.epochs,
        learning_rate=STEP_SIZE,
        entropy_cost=settings.entropy_coefficient,
        discounting=settings.discount,
        gae_lambda=settings.gae_lambda,
        clipping_epsilon=settings.clip,
        vf_loss_coefficient=2 * settings.value_coefficient,  # which Brax halves
        normalize_observations=settings.normalize_observations,
        network_factory=lambda *shapes, **how: networks.make_ppo_networks(
            *shapes, policy_hidden_layer_sizes=hidden, value_hidden_layer_sizes=hidden, activation=jax.nn.relu, **how
        ),
        num_evals=args.points + 1,
        num_eval_envs=args.evaluated,
        max_devices_per_host=1,
        progress_fn=go_on,
    )
    return curves, part


def main():
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000, help="environment steps of each agent")
    parser.add_argument("--points", type=int, default=10, help="evaluations after equal parts of the steps")
    parser.add_argument("--evaluated", type=int, default=16, help="episodes of an evaluation")
    parser.add_argument("--num-envs", type=int, default=32, help="a multiple of minibatches, for Brax's sequences")
    parser.add_argument("--rollout-length", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--minibatches", type=int, default=16)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--episode-length", type=int, default=1000)
    parser.add_argument("--normalize", action="store_true", help="normalize observations")
    args = parser.parse_args()
    if args.num_envs % args.minibatches:
        parser.error(f"--num-envs must be a multiple of --minibatches, got {args.num_envs} and {args.minibatches}")
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind} ({device.platform}), python {platform.python_version()}")
    start = time.perf_counter()
    curves, part = compare(args)
    lowest = min(curve.points[-1][1] for curve in curves.values())
    print(f"\nuntil the return is {lowest:.1f}, the lowest of the last row; without compilation")
    print(f"{'agent':>12} {'env steps/s':>12} {'steps':>10} {'seconds':>8}")
    for name, curve in curves.items():
        speed, needed = curve.steps_per_second(part), curve.steps_to(lowest)
        print(f"{name:>12} {speed:12.0f} {needed:10.0f} {needed / speed:8.1f}")
    print(f"took {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
