r"""Finds the units of a network in its jaxpr.

A unit in a traced program
--------------------------
A unit is the feature that one column of a kernel computes. It stays the same unit through elementwise maps, pooling,
dropout, reshapes, casts, `jit`, `remat`, custom derivatives and normalization. Units that are combined element by
element become one unit, since neither can be replaced without the other. "Kind" is the kind of the group:

=============================  ======================================================================================
construct                      units
=============================  ======================================================================================
dense, conv (strided,          one for each output: its column is incoming, the rows that read it, in however many
dilated, transposed)           kernels and heads, are outgoing. Behind a flattened convolution a channel has a row for
                               each position. Kinds "dense", "conv".
residual sums, projections     the channels of a stage are one group, which all its blocks write and read; the
                               inside of a block is a group of its own. Kind "residual".
concatenation, slices, splits  units stay what they were; a group owns rows of the same parameters, so one layer
                               may make several groups ("name", "name#2").
batch normalization            scale, offset and running statistics belong to the unit (`reset_batch_stats`).
layer, group, RMS norm,        scale and offset belong to the unit. The statistics mix units and belong to none.
division by the length         Through them a new unit still acts on the output: the group is not `exact`.
products (GLU, gates, squeeze  both factors are one unit, with several incoming kernels.
and excite)
depthwise convolution          the channel stays the same unit; its filters are incoming.
grouped convolution            new units; a channel is read by its own group's filters only.
tied kernels                   one unit for all applications of the kernel, whose rows are read by one unit each.
ensembles by `vmap`            numbered by member and column, all in one group.
layers stacked for `scan`      each layer has its own units; their activations are captured as outputs of the scan.
recurrent cells                a dimension of the state: the columns of all gates are incoming, and its rows in the
(GRU, LSTM, minimal, linear)   state's kernels outgoing, whether the cell is scanned or unrolled.
sums by segment, over devices, units stay what they were, as after a sum over the batch; channels that are added by
padded shortcuts               padding are not units.
sums, means and maxima of      units that are reduced together are one unit: maxout, the mean of an ensemble.
some units at a time
attention                      a head is a unit: its columns of query, key and value are incoming, its rows of the
                               output projection outgoing. Query heads that share keys are one unit. Kind "head". For a
                               single head, or where all share keys and values, each dimension of the values is a unit.
class tokens, mask tokens,     a parameter concatenated to units, tiled, or written over masked ones is their bias;
learned queries                learned queries that a kernel reads are units, as in an embedding.
residual stream                a dimension is a unit: every block writes and reads it. Embeddings are incoming, class
                               tokens and learned positions are its biases. Kind "residual".
low-rank changes of a kernel,  a rank-one component of the change is a unit: a column of A is incoming, a row of B
`W + c A B` (LoRA)             outgoing. The layer's outputs are written by W and B, its inputs are read by W and A.
tied embeddings                a table that embeds tokens and also computes the output is outgoing: in it a new unit
                               starts with 0, and the other kernels that write the stream are resampled.
=============================  ======================================================================================

A parameter that several units share (a scalar; a norm's scale over the dimensions of all heads) belongs to no unit, and
is not reset.

Constructs that are left out
----------------------------
These layers are listed by name in `Units.left_out`, each with a reason. The rest of the network is still found.

- output layers, whose units are the network's output;
- layers inside `while` and `cond`, whose activations cannot be captured from outside;
- the state of a cell that is returned as an output;
- kernels that are computed (weight standardization, spectral norm), sliced or masked;
- activations that only weight others: queries and keys of a single head, routers of experts;
- activations that are sorted, reduced by max or softmax over all units, or mixed over positions by a kernel
  (MLP-Mixer's token mixing), which would make all units one;
- layers whose sum over all units is used for anything but their normalization: a softmax, a gate, a part of the sum. A
  normalization subtracts the mean, or divides by the root of the variance or of the mean or sum of squares;
- activations that are indexed differently in each example (`take_along_axis`, `vmap` of `h[i]`; `h[rows, i]` is
  followed), partly overwritten (`dynamic_update_slice`), or Fourier-transformed;
- activations combined with a parameter other than by sums, products and quotients, such as `clip(h, -p, p)`, and layers
  before a computed kernel, such as that of a cosine classifier;
- networks that contain derivatives with respect to their inputs, whose kernels are used in two ways.

What is found in known networks
-------------------------------
`nets.ConvNet`: 5 groups. Three are of 32, 64 and 128 channels; each of the 128 is read by 4 rows of the first dense
kernel, one for each of the 2x2 positions. Two are of 128 neurons each.

`nets.ResNet`, ResNet-18: 12 groups. Four groups are the channels of the stages, 64, 128, 256 and 512. Each is written
by 3 kernels (the stem or a projection, and the second convolution of both blocks); they are read by 4, 3, 3 and 2
kernels (first convolutions, the next stage's projection, the head). The other groups are the channels inside each of
the 8 blocks.

A 12-layer encoder, `nets.ViT(depth=12)`: 25 groups. One is the residual stream, written by 25 kernels and read by 49.
Each layer has two more: its heads, and the hidden units of its perceptron.

A GRU under `scan` between an embedding and dense layers: 3 groups: the embedding; the cell's state, written by six
kernels and read by the next layer and three kernels of the cell; and the hidden dense layer after it.

By default all groups are replaced, as in the Nature paper, which replaces channels of all convolutions of ResNet-18.
The paper's program lists the layers in order and sets only the next layer's weights to 0. The other kernels that read
or write a stage's channels keep their weights, and projections have no units. Here a stage's channel is replaced as a
whole. `Units.select` chooses groups by name and kind: without "residual", only the channels inside blocks remain.

Running statistics
------------------
`reset_batch_stats` must know which statistics belong to which unit. They are found in the tree of variables under
"batch_stats", and in any input that is a tree of named arrays, by their use: a statistic has a number for each unit,
which is only subtracted as a mean, used under a root as a variance to divide by, or updated from a sum over the batch.
The rest of such a tree is treated as data, such as the state of a cell::

    apply_fn = lambda params, batch_stats, x: net.apply(
        {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"])
    units = discover_units(apply_fn, variables["params"], variables["batch_stats"], x)
    units = discover_units(net.apply, variables, x)  # the same, names with "params/" in front

Statistics that a function holds as constants are not found. The initial value of a statistic is 0, or 1 if it is used
to divide or its name says that it is a variance. New statistics may be among the outputs, under the same name.
"""

from collections.abc import Callable
from typing import Any

import jax

from cbp_jax.units import build, collection, guard, modules, tracing, walk


def discover_units(
    apply_fn: Callable[..., Any], params: Any, *example_inputs: Any, check: bool | None = None
) -> collection.Units:
    """Find the groups of units that can be replaced in a network.

    The function is traced. A unit is a feature that a kernel computes along its free axis. Its *incoming* weights are
    that column of the kernel. Its *outgoing* weights are the rows of the kernels that read the array in which it ends
    up, whatever operations lie between. The documentation of this module lists what is found in which constructs and
    networks.

    Args:
      apply_fn: `apply_fn(params, *inputs) -> outputs`, any function that JAX can trace: `flax_model.apply`, a
        function that merges an NNX graph, or plain JAX. For NNX there is a short form: `discover_units(model,
        *example_inputs)`.
      params: pytree of arrays (or of `jax.ShapeDtypeStruct`); leaves under "batch_stats" are running statistics. Or an
        `nnx.Module`, whose `nnx.Param`s are the parameters; the rest of its state may hold running statistics.
      *example_inputs: arrays (or `jax.ShapeDtypeStruct`) of the shapes that the network takes; leaves of trees among
        them, such as the "batch_stats" of Flax, may be running statistics.
      check: whether to run the network with random parameters and test, for every group, that incoming weights do not
        change the output while outgoing weights are 0. Groups that fail are left out. By default only small networks
        are checked, which takes a moment.

    Returns:
      the groups in forward order, a tuple of `UnitGroup` that prints as a table. Its `left_out` names each layer that
      is not in a group, with the reason: the output layer, or a construct that is not understood.

    Raises:
      ValueError: there is no group. The message says what was left out and why.

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
