r"""LoRA: low-rank changes of any kernels of any params tree.

An adapter is a separate pytree, and its functions work on trees of parameters. So networks of Flax, Haiku, Equinox or
plain JAX need no changes, and only the adapter is trained:

>>> import jax, jax.numpy as jnp, optax
>>> from cbp_jax import lora
>>> network = lambda params, x: jax.nn.relu(x @ params["w1"]) @ params["w2"]
>>> params = {"w1": jnp.ones((8, 16)), "w2": jnp.ones((16, 4))}
>>> adapter = lora.init(params, jax.random.key(0), rank=2, target_modules=["w1"])
>>> adapted = lora.factored(lambda adapter, x: network(lora.apply(params, adapter), x))
>>> grads = jax.grad(lambda adapter: adapted(adapter, jnp.ones((3, 8))).sum())(adapter)
>>> jax.tree.map(jnp.shape, grads).factors
{'w1': {'lora_A': (8, 2), 'lora_B': (2, 16)}}

Several adapters, one for each task, are a list: `apply(params, adapters)` adds them all, `apply(params, adapters[2])`
chooses one. If the choice is traced, stack the adapters first and select by `jax.tree.map(lambda x: x[task], stacked)`.

References:
  Hu et al., `LoRA: Low-rank adaptation of large language models <https://arxiv.org/abs/2106.09685>`_, ICLR 2022; the
  names and initial values are those of `PEFT <https://github.com/huggingface/peft>`_
"""

from cbp_jax.factored import apply_in_factors as factored
from cbp_jax.lora.adapter import Adapter, Axes, apply, delta, init, merge, unmerge
from cbp_jax.lora.adapter_files import load, save
from cbp_jax.lora.penalties import l1, orthogonality, subspace_overlap

__all__ = [
    "Adapter",
    "Axes",
    "apply",
    "delta",
    "factored",
    "init",
    "l1",
    "load",
    "merge",
    "orthogonality",
    "save",
    "subspace_overlap",
    "unmerge",
]
