r"""Finds the units of a network in its jaxpr.

What a unit is
--------------
A unit is what one column of a kernel makes. It stays the same unit through elementwise maps, pooling, dropout,
reshapes, casts, `jit`, `remat`, custom derivatives and normalization. Where units meet element by element they become
one unit, since neither can be replaced without the other. In each row, "kind" is that of the group:

=============================  ======================================================================================
construct                      units
=============================  ======================================================================================
dense, conv (strided,          one for each output: its column is incoming, the rows that read it, in however many
dilated, transposed)           kernels and heads, are outgoing. Behind a flattened convolution a channel has a row for
                               each position. Kinds "dense", "conv".
residual sums, projections     the channels of a stage are one group, which all its blocks write into and read from; the
                               inside of a block is a group of its own. Kind "residual".
concatenation, slices, splits  stay what they were; a group is what owns rows of the same parameters, so that one layer
                               may make several groups ("name", "name#2").
batch normalization            scale, offset and running statistics belong to the unit (`reset_batch_stats`).
layer, group, RMS norm,        scale and offset belong to the unit. The statistics mix units and are of none: they are
division by the length         the one way in which a fresh unit still acts on the output, and the group says so: it is
                               not `exact`.
products (GLU, gates, squeeze  both factors are one unit, with several incoming kernels.
and excite)
depthwise convolution          the channel goes on as itself; its filters are incoming.
grouped convolution            new units; a channel is read by its own group's filters only.
tied kernels                   one unit for all applications of the kernel, whose rows are read by one unit each.
ensembles by `vmap`            numbered by member and column, all in one group.
layers stacked for `scan`      each layer has its own; what a kernel reads is captured as an output of the scan.
recurrent cells                a dimension of the state: the columns of all gates are incoming, and its rows in the
(GRU, LSTM, minimal, linear)   state's kernels outgoing, whether the cell is scanned or unrolled.
sums by segment, over devices, stay what they were, as after a sum over the batch; channels that are added by
padded shortcuts               padding are none.
sums, means and maxima of      those that are taken together are one unit: maxout, the mean of an ensemble.
some units at a time
attention                      a head: its columns of query, key and value are incoming, its rows of the output
                               projection outgoing. Query heads that share keys are one unit. Kind "head". Of a single
                               head, or where all share keys and values, each dimension of the values is a unit.
class tokens, mask tokens,     a parameter put beside units, tiled or in place of what is masked, is their bias; learned
learned queries                queries that a kernel reads are units, as of an embedding.
residual stream                a dimension of it: everything writes and reads it. Embeddings are incoming, class tokens
                               and positions added as parameters are its biases. Kind "residual".
low-rank changes of a kernel,  a rank-one component of the change is a unit: a column of A is incoming, a row of B
`W + c A B` (LoRA)             outgoing. W and B write, and W and A read, the units on either side.
tied embeddings                a table that embeds tokens and also makes the output is outgoing: in it a fresh unit
                               starts with 0, and what else writes the stream is drawn anew.
=============================  ======================================================================================

A parameter that several units share (a scalar; a norm's scale over the dimensions of all heads) is
of no unit, and is not reset.

What is left out
----------------
Listed by name in `Units.left_out`, each with its reason; everything around is found all the same.

- output layers: what they make is the network's output;
- `while` and `cond`: what they compute cannot be captured from outside;
- the state of a cell that is returned: it is output;
- kernels that are computed (weight standardization, spectral norm), cut or masked;
- activations that only weigh others: queries and keys of a single head, routers of experts;
- activations that are sorted, maximized or soft-maxed over all units, or mixed over positions by a kernel (MLP-Mixer's
  token mixing): all units become one there;
- sums over all units of a layer that are used other than for their normalization: a softmax, a gate, a part of the sum.
  A normalization is the mean subtracted, or a division by the root of the mean or sum of squares or of the variance;
- activations that are taken by an index of each example (`take_along_axis`, `vmap` of `h[i]`; `h[rows, i]` is
  followed), of which some are overwritten (`dynamic_update_slice`), or that are Fourier-transformed;
- what meets a parameter other than by sums, products and quotients, such as `clip(h, -p, p)`, and layers in front of a
  computed kernel, such as that of a cosine classifier;
- networks with derivatives by their inputs inside, whose kernels are used in two ways.

What is found in known networks
-------------------------------
`nets.ConvNet`: 5 groups, of 32, 64 and 128 channels (of these, each is read by 4 rows of the first dense kernel, one
for each of 2x2 positions), 128 and 128 neurons.

`nets.ResNet`, ResNet-18: 12 groups. For each of the 4 stages, of 64, 128, 256 and 512 channels, the channels of the
stage, written by 3 kernels (the stem or a projection, and the second convolution of both blocks) and read by 4, 3, 3
and 2 (first convolutions, the next stage's projection, the head); and the channels inside each of the 8 blocks.

A 12-layer encoder, `nets.ViT(depth=12)`: 25 groups. The residual stream, written by 25 kernels and read by 49; for each
layer its heads, and the hidden units of its perceptron.

A GRU under `scan` between an embedding and dense layers: 3 groups, the embedding, the cell's state, which six kernels
write and the next layer and three of the cell's own read, and the hidden dense layer behind it.

By default all groups are replaced, as in the Nature paper, which replaces channels of all convolutions of ResNet-18.
Its program lists them in order and sets only the next one's weights to 0; the other readers of a stage's channels, and
the other kernels that write them, keep theirs, and projections have no units. Here a stage's channel is replaced as a
whole. `Units.select` chooses groups by name and kind: without "residual", what is left are the insides of blocks.

Running statistics
------------------
`reset_batch_stats` needs to know which statistics are whose. They are found in any input that is a tree of named
arrays, by their use - a number for each unit, which is subtracted as a mean, or under a root divides as a variance, or
is updated from a sum over the batch, and nothing else; the rest of such a tree is data, as the state of a cell - and in
the tree of variables under "batch_stats"::

    apply_fn = lambda params, batch_stats, x: net.apply(
        {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"])
    units = discover_units(apply_fn, variables["params"], variables["batch_stats"], x)
    units = discover_units(net.apply, variables, x)  # the same, names with "params/" in front

Statistics that a function holds as constants are unknown. A mean starts at 0; where it is used to divide, or its name
says variance, a statistic starts at 1. New statistics may be among the outputs, under the same name.
"""

from collections.abc import Callable
from typing import Any

import jax

from cbp_jax.units import build, collection, guard, modules, tracing, walk


def discover_units(
    apply_fn: Callable[..., Any], params: Any, *example_inputs: Any, check: bool | None = None
) -> collection.Units:
    """Finds the groups of units that can be replaced in a network.

    The function is traced. A unit is whatever a kernel makes along its free axis: its *incoming* weights
    are that column, and its *outgoing* weights are the rows of the kernels that contract the array it ends up
    in, whatever lies between. The documentation of this module tells what is found in which architectures.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`, any function that JAX can trace: `flax_model.apply`, a
        function that merges an NNX graph, bare JAX. For NNX in short: `discover_units(model, *example_inputs)`.
      params: pytree of arrays (or of `jax.ShapeDtypeStruct`); leaves under "batch_stats" are running statistics. Or an
        `nnx.Module`, whose `nnx.Param`s are meant; the rest of its state may hold running statistics.
      *example_inputs: arrays (or `jax.ShapeDtypeStruct`) of the shapes that the network takes; leaves of trees among
        them, such as the "batch_stats" of Flax, may be running statistics.
      check: whether the network is also run, with random parameters, to see of every group that its incoming weights do
        not change the output where its outgoing ones are 0; a group of which that is not so is left out. By default
        that is done for small networks, where it takes a moment.

    Returns:
      the groups in forward order, a tuple of `UnitGroup` that prints as a table. Its `left_out` names each layer
      that is no group, with the reason: the output layer, or a construct that is not understood.

    Raises:
      ValueError: there is no group; the message names what was left out and why.

    Example:
      >>> import jax.numpy as jnp
      >>> def apply(params, x):
      ...   return jnp.maximum(x @ params["w1"] + params["b1"], 0) @ params["w2"]
      >>> params = {"w1": jnp.ones((4, 3)), "b1": jnp.zeros(3), "w2": jnp.ones((3, 2))}
      >>> print(discover_units(apply, params, jnp.ones((1, 4))))
      group  size  kind   incoming  bias  outgoing
      w1        3  dense  w1        b1    w2
      left out: w2 (2 units): it is part of the network's output
    """
    if modules.is_module(apply_fn):
        apply_fn, params, example_inputs = (lambda model, *inputs: model(*inputs)), apply_fn, (params, *example_inputs)
    if not callable(apply_fn):
        raise TypeError(f"apply_fn must be a function of (params, *inputs); found {type(apply_fn).__name__}")
    if modules.is_module(params):
        apply_fn, params, rest = modules.pure(apply_fn, params)
        example_inputs = (rest, *example_inputs)
    found = walk.walk(tracing.trace_network(apply_fn, params, *example_inputs))
    if not (guard.is_cheap(found.trace.jaxpr) if check is None else check):
        return build.build(found)
    inputs = jax.tree.leaves((params, *example_inputs))
    return build.build(found, lambda groups, sums: guard.refuted(found.trace, inputs, groups, sums, found.checked))
