r"""The diagonal of a loss's Hessian: exact, by Hutchinson's estimate, and by HesScale.

| | result | cost |
|---|---|---|
| `hessian_diagonal` | exact | about three evaluations of the loss for every entry; only for small networks |
| `hutchinson` | unbiased, noisy | for each sample two to three gradients, and a random sign for every entry; any
network |
| `hesscale` | an approximation without noise | one more backward pass; feed-forward networks |

HesScale (Elsayed et al. 2024, after Becker & Le Cun 1989) propagates, next to the gradient :math:`\partial L / \partial
z` of every array :math:`z` of the network, an approximation :math:`\hat h_z` of :math:`\partial^2 L / \partial z^2`,
entry by entry. For an operation :math:`z = f(u)` the chain rule says

.. math::
    \frac{\partial^2 L}{\partial u_i^2} = \sum_k \frac{\partial L}{\partial z_k} \frac{\partial^2 z_k}{\partial u_i^2}
    + \sum_{k, l} \frac{\partial z_k}{\partial u_i} \frac{\partial z_l}{\partial u_i} \frac{\partial^2 L}{\partial z_k
    \partial z_l},

and the only approximation is to drop terms with :math:`k \ne l`. For the layer :math:`a_l = W_l h_{l-1} + b_l`,
:math:`h_l = \sigma(a_l)` and one example this reads

.. math::
    \hat h_{a_l} = \sigma''(a_l) \frac{\partial L}{\partial h_l} + \sigma'(a_l)^2 \hat h_{h_l}, \qquad
    \hat h_{h_{l-1}} = (W_l^{\circ 2})^\top \hat h_{a_l}, \qquad
    \hat h_{W_l} = \hat h_{a_l} (h_{l-1}^{\circ 2})^\top, \qquad \hat h_{b_l} = \hat h_{a_l}.

It starts from the exact diagonal at the outputs: :math:`q - q^2` for softmax cross-entropy with probabilities q (Becker
& Le Cun treat the softmax like any activation), and 2 for squared errors. So it is exact for the last layer. If the
Hessian of the outputs is diagonal, as for squared errors, it is also exact for the dense layer before it.

References:
  Elsayed, Farrahi, Dangel & Mahmood, `Revisiting scalable Hessian diagonal approximations for applications in
  reinforcement learning <https://arxiv.org/abs/2406.03276>`_, ICML 2024
  Becker & Le Cun, Improving the convergence of back-propagation learning with second order methods, 1989
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.extend import core

from cbp_jax import jaxprs
from cbp_jax.losses import LOSSES
from cbp_jax.units import groups

__all__ = ["hesscale", "hessian_diagonal", "hutchinson"]


# Elementwise primitives that are piecewise linear in several activations at once.
_MEETINGS = frozenset("add add_any max min select_n sub".split())
# Every output element is a sum of operand elements, or selects one: coefficients are 0 or 1, their own squares.
_SELECTIONS = jaxprs.POOLING | frozenset(
    """broadcast_in_dim concatenate cumsum dynamic_slice expand_dims gather pad reduce_max reduce_min reduce_sum reshape
    rev slice split squeeze stack tile transpose""".split()
)


def hessian_diagonal(loss_fn: Callable[[Any], chex.Array], params: Any, *, chunk_size: int = 256) -> Any:
    """Compute the exact diagonal of a loss's Hessian, for small networks.

    Takes the second derivative of the loss along every entry, forward over forward: about three evaluations of the
    loss for every entry of the params, `chunk_size` of them at once. Time is quadratic in the size of the network;
    memory is that of `chunk_size` evaluations.

    Args:
      loss_fn: `loss_fn(params) -> loss`, a scalar.
      params: pytree of float arrays.
      chunk_size: how many entries are computed at once.

    Returns:
      a pytree like params.

    Raises:
      TypeError: a leaf of params is not of a float type.
      ValueError: `chunk_size` is less than 1.

    Example:
      >>> params = {"w": jnp.arange(3.0), "b": 1.0}
      >>> diagonal = hessian_diagonal(lambda p: jnp.sum(p["w"] ** 3) + p["w"][0] * p["b"], params)
      >>> diagonal["w"].tolist(), float(diagonal["b"])
      ([0.0, 6.0, 12.0], 0.0)
    """
    _check_float(params)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    leaves, treedef = jax.tree.flatten(params)
    leaves = [jnp.asarray(leaf) for leaf in leaves]

    def of_leaf(number):
        leaf = leaves[number]

        def loss(value):
            return loss_fn(treedef.unflatten([*leaves[:number], value, *leaves[number + 1 :]]))

        def second_derivative(entry):
            direction = jnp.zeros(leaf.size, leaf.dtype).at[entry].set(1).reshape(leaf.shape)
            return _second_order(loss, (leaf,), (direction,), (jnp.zeros_like(leaf),))[1]

        entries = jnp.arange(leaf.size)
        if leaf.size <= chunk_size:
            return jax.vmap(second_derivative)(entries).reshape(leaf.shape)
        return jax.lax.map(second_derivative, entries, batch_size=chunk_size).reshape(leaf.shape)

    return jax.tree.unflatten(treedef, [of_leaf(number) for number in range(len(leaves))])


def hutchinson(loss_fn: Callable[[Any], chex.Array], params: Any, key: chex.PRNGKey, samples: int = 1) -> Any:
    r"""Compute Hutchinson's unbiased estimate of the diagonal of a loss's Hessian.

    .. math:: \mathrm{diag}(H) = E[v \circ H v], \qquad v_i = \pm 1 \text{ with equal probability}

    The variance of an entry over samples is the sum of the squares of the other entries of its row of the Hessian.
    A sample costs two to three gradients and a random sign for every entry. For small batches the signs are most of the
    cost. Samples are computed one after another.

    Args:
      loss_fn: `loss_fn(params) -> loss`, a scalar, of any network.
      params: pytree of float arrays.
      key: a JAX key.
      samples: how many samples are averaged.

    Returns:
      a pytree like params.

    Raises:
      TypeError: a leaf of params is not of a float type.
      ValueError: `samples` is less than 1.

    Example:
      >>> diagonal = hutchinson(lambda p: jnp.sum(p**3), jnp.arange(3.0), jax.random.key(0))
      >>> diagonal.tolist()  # the Hessian is diagonal, so that a single sample is exact
      [0.0, 6.0, 12.0]

    References:
      Bekas, Kokiopoulou & Saad, An estimator for the diagonal of a matrix, 2007; Yao et al., `AdaHessian
      <https://arxiv.org/abs/2006.00719>`_, AAAI 2021
    """
    _check_float(params)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    leaves, treedef = jax.tree.flatten(params)

    def one(total, key):
        keys = jax.random.split(key, len(leaves))
        signs = treedef.unflatten(
            [
                jax.random.rademacher(k, jnp.shape(leaf), jnp.result_type(leaf))
                for k, leaf in zip(keys, leaves, strict=True)
            ]
        )
        _, products = jax.jvp(jax.grad(loss_fn), (params,), (signs,))
        return jax.tree.map(lambda t, v, hv: t + v * hv, total, signs, products), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(one, zeros, jax.random.split(key, samples))
    return jax.tree.map(lambda t: t / samples, total)


def hesscale(
    apply_fn: Callable[..., Any], params: Any, x: Any, targets: chex.Array, loss: str = "softmax_cross_entropy"
) -> tuple[chex.Array, Any, Any]:
    """Compute HesScale's approximation of the diagonal of a loss's Hessian, with the loss and its gradient.

    The network is traced, and one backward pass through its operations propagates gradient and curvature together; see
    the module's docstring for the recursion. Supported are products and convolutions with parameters, biases,
    elementwise functions (exactly, no matter which primitives they consist of), reshapes, transposes, concatenations,
    sums, gathers, average and max pooling, sums of branches, and dropout. Cross terms are also dropped where a
    parameter is used at several places (positions of a convolution) and where branches meet.

    Args:
      apply_fn: `apply_fn(params, x) -> outputs`, an array [batch, ..., outputs]. Examples must not be mixed.
      params: pytree of float arrays.
      x: inputs, an array [batch, ...] or a pytree of arrays. No derivatives are taken with respect to them.
      targets: for cross-entropy, class numbers [batch, ...] of an integer type, or probabilities [batch, ..., outputs]
        of a float type; for squared errors, values [batch, ..., outputs].
      loss: "softmax_cross_entropy", whose outputs are logits, or "squared_error", the sum over outputs of
        `(output - target)**2`, without a factor of a half. Either is averaged over all axes but the last.

    Returns:
      `(loss, grads, hessian_diagonal)`: a scalar, and two pytrees like params. All are those of the mean loss over the
      batch.

    Raises:
      TypeError: a leaf of params is not of a float type.
      ValueError: the network has an unsupported operation, which the message names, such as the product of two
        activations in normalization and attention; its output is not a single array whose last axis is the outputs;
        targets do not fit the outputs; or the loss is unknown.

    Example:
      >>> def apply(params, x):
      ...   return jnp.tanh(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.ones((1, 2)), "w2": jnp.ones((2, 1))}
      >>> loss, grads, diagonal = hesscale(apply, params, jnp.ones((1, 1)), jnp.zeros((1, 1)), loss="squared_error")
      >>> exact = hessian_diagonal(lambda p: apply(p, jnp.ones((1, 1)))[0, 0] ** 2, params)
      >>> jax.tree.map(lambda a, b: bool(jnp.allclose(a, b)), diagonal, exact)  # one hidden layer, squared error: exact
      {'w1': True, 'w2': True}

    References:
      Elsayed, Farrahi, Dangel & Mahmood, `Revisiting scalable Hessian diagonal approximations for applications in
      reinforcement learning <https://arxiv.org/abs/2406.03276>`_, ICML 2024
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {list(LOSSES)}, got {loss!r}")
    _check_float(params)
    jaxpr, _ = jaxprs.trace(apply_fn, params, x)
    leaves, treedef = jax.tree.flatten(params)
    weights = [_Node(jnp.asarray(leaf), active=True) for leaf in leaves]
    inputs = [_Node(jnp.asarray(leaf), data=True) for leaf in jax.tree.leaves(x)]
    walk = _Walk()
    outputs = walk.run(jaxpr, [*weights, *inputs])
    if len(outputs) != 1 or outputs[0].value.ndim < 2:
        shapes = [node.value.shape for node in outputs]
        raise ValueError(f"apply_fn must return one array [batch, ..., outputs], got arrays of shapes {shapes}")
    value, *derivatives = LOSSES[loss].derivatives(outputs[0].value, jnp.asarray(targets))
    outputs[0].add(*derivatives)
    walk.pull_back()
    grads = [jnp.zeros_like(node.value) if node.grad is None else node.grad for node in weights]
    curves = [jnp.zeros_like(node.value) if node.curve is None else node.curve for node in weights]
    return value, jax.tree.unflatten(treedef, grads), jax.tree.unflatten(treedef, curves)


@dataclasses.dataclass(eq=False)
class _Node:
    """A value of the network.

    An elementwise function of one other value, its root, stores its derivatives with respect to the root. So a chain of
    primitives, even one that branches and joins again, such as x * sigmoid(x), is differentiated as one function.
    """

    value: chex.Array
    active: bool = False  # depends on parameters
    data: bool = False  # depends on the inputs
    root: "_Node | None" = None
    slope: chex.Array | None = None  # first derivative with respect to the root
    bend: chex.Array | None = None  # second derivative
    grad: chex.Array | None = None  # of the loss
    curve: chex.Array | None = None  # second derivative of the loss

    def add(self, grad: chex.Array, curve: chex.Array) -> None:
        """Add what one consumer passes back, summed over axes along which the value was broadcast."""
        grad, curve = self._fit(grad), self._fit(curve)
        self.grad = grad if self.grad is None else self.grad + grad
        self.curve = curve if self.curve is None else self.curve + curve

    def _fit(self, array: chex.Array) -> chex.Array:
        shape = self.value.shape
        lead = array.ndim - len(shape)
        axes = [axis for axis in range(array.ndim) if axis < lead or array.shape[axis] != shape[axis - lead]]
        return jnp.sum(array, axes).reshape(shape).astype(self.value.dtype) if axes else array.astype(self.value.dtype)


# (grads, curves) of an operation's outputs -> those of its operands.
_Pull = Callable[[list[chex.Array], list[chex.Array]], tuple[Sequence[chex.Array], Sequence[chex.Array]]]


class _Walk:
    """Evaluates a jaxpr, and records how gradients and curvatures are passed back through it."""

    def __init__(self):
        self.tape: list[tuple[list[_Node], list[_Node], _Pull]] = []

    def pull_back(self) -> None:
        """Pass gradients and curvatures from the outputs to whatever they depend on."""
        for operands, results, pull in reversed(self.tape):
            if all(node.grad is None for node in results):
                continue
            for node in results:
                if node.grad is None:
                    node.grad = node.curve = jnp.zeros_like(node.value)
            grads, curves = pull([node.grad for node in results], [node.curve for node in results])
            for node, grad, curve in zip(operands, grads, curves, strict=True):
                node.add(grad, curve)

    def run(self, closed: core.ClosedJaxpr, inputs: list[_Node]) -> list[_Node]:
        """Evaluate a jaxpr."""
        env = dict(zip(closed.jaxpr.constvars, map(_Node, closed.consts), strict=True))
        env.update(zip(closed.jaxpr.invars, inputs, strict=True))

        def read(atom):
            return _Node(jnp.asarray(atom.val, atom.aval.dtype)) if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxprs.live_equations(closed.jaxpr):
            env.update(zip(eqn.outvars, self.step(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def step(self, eqn: core.JaxprEqn, nodes: list[_Node]) -> list[_Node]:
        """Evaluate one equation."""
        name, data = eqn.primitive.name, any(node.data for node in nodes)
        differentiable = any(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in eqn.outvars)  # type: ignore[attr-defined]
        if name == "stop_gradient" or not differentiable or not any(node.active for node in nodes):
            return [_Node(value, data=data) for value in jaxprs.bind(eqn, [node.value for node in nodes])]
        if name in jaxprs.CONTRACTIONS:
            return self.contraction(eqn, nodes)
        if name in jaxprs.SMOOTH:
            return self.elementwise(eqn, nodes)
        if name in _SELECTIONS:
            return self.selection(eqn, nodes)
        body = jaxprs.call_body(eqn)
        if body is None or name.startswith("custom_vjp"):
            raise ValueError(_not_followed(name, "no rule is known for it"))
        if name != "custom_jvp_call":
            return self.run(body, nodes)
        if [inner.primitive.name in jaxprs.POOLING for inner in body.jaxpr.eqns] == [True]:
            return self.selection(eqn, nodes)
        # A call is treated as one function only if its body is elementwise. Then the call's own derivatives are used.
        start, root = len(self.tape), _common_root(nodes)
        results = self.run(body, nodes)
        del self.tape[start:]
        if root is None or any(node.root is not root for node in results):
            raise ValueError(_not_followed(name, "its body is no elementwise function of one activation"))
        return self.elementwise(eqn, nodes)

    def contraction(self, eqn: core.JaxprEqn, nodes: list[_Node]) -> list[_Node]:
        """Follow a product or convolution: linear in each operand, with the other operand's entries as coefficients."""
        if all(node.active and node.data for node in nodes):
            raise ValueError(_not_followed(eqn.primitive.name, "it is a product of two activations"))

        def pull(grads, curves):
            pairs = []
            for number, node in enumerate(nodes):
                if node.active:
                    other = nodes[1 - number].value
                    pairs.append((transposed(number, other, grads), transposed(number, other**2, curves)))
            return zip(*pairs, strict=True)

        def transposed(number, other, cotangents):
            apply = lambda value: jaxprs.bind(eqn, [value, other] if number == 0 else [other, value])
            (result,) = jax.linear_transpose(apply, nodes[number].value)(cotangents)
            return result

        data = any(node.data for node in nodes)
        results = [_Node(value, True, data) for value in jaxprs.bind(eqn, [node.value for node in nodes])]
        self.tape.append(([node for node in nodes if node.active], results, pull))
        return results

    def selection(self, eqn: core.JaxprEqn, nodes: list[_Node]) -> list[_Node]:
        """Follow a map whose coefficients are 0 and 1."""
        operands, apply = _of_active(eqn, nodes)
        values, transpose = jax.vjp(apply, *(node.value for node in operands))

        def pull(grads, curves):
            curves = transpose(curves)
            if eqn.primitive.name in ("reduce_max", "reduce_min"):  # k tied entries have coefficients 1/k
                curves = [c * w for c, w in zip(curves, transpose([jnp.ones_like(v) for v in values]), strict=True)]
            return transpose(grads), curves

        results = [_Node(value, True, any(node.data for node in nodes)) for value in values]
        self.tape.append((operands, results, pull))
        return results

    def elementwise(self, eqn: core.JaxprEqn, nodes: list[_Node]) -> list[_Node]:
        """Follow an elementwise function of a root that all operands share, or of each operand separately."""
        operands, apply = _of_active(eqn, nodes)
        values = tuple(node.value for node in operands)
        (value,) = apply(*values)
        result = _Node(value, True, any(node.data for node in nodes))
        root = _common_root(nodes)
        if root is not None and root.value.shape == value.shape:
            slopes = tuple(jnp.ones_like(v) if n is root else n.slope for n, v in zip(operands, values, strict=True))
            bends = tuple(jnp.zeros_like(v) if n is root else n.bend for n, v in zip(operands, values, strict=True))
            derivatives = [_second_order(lambda *v: apply(*v)[0], values, slopes, bends)]
            operands, result.root, (result.slope, result.bend) = [root], root, derivatives[0]
        elif sum(node.data for node in operands) > 1 and eqn.primitive.name not in _MEETINGS:
            raise ValueError(_not_followed(eqn.primitive.name, "two different activations meet in it"))
        else:
            derivatives = []
            for number, v in enumerate(values):
                alone = lambda u, number=number: apply(*values[:number], u, *values[number + 1 :])[0]
                derivatives.append(_second_order(alone, (v,), (jnp.ones_like(v),), (jnp.zeros_like(v),)))

        def pull(grads, curves):
            (grad,), (curve,) = grads, curves
            return zip(*((s * grad, s * s * curve + b * grad) for s, b in derivatives), strict=True)

        self.tape.append((operands, [result], pull))
        return [result]


def _second_order(f: Callable[..., chex.Array], values: tuple, slopes: tuple, bends: tuple) -> tuple[Any, Any]:
    """Return the first and second derivative of f along a curve through `values` with these derivatives."""
    first = lambda values, slopes: jax.jvp(f, values, slopes)[1]
    return jax.jvp(first, (values, slopes), (slopes, bends))


def _common_root(nodes: list[_Node]) -> _Node | None:
    """Return the one value that all active operands are elementwise functions of."""
    roots = [node.root or node for node in nodes if node.active]
    return roots[0] if all(root is roots[0] for root in roots) else None


def _of_active(eqn: core.JaxprEqn, nodes: list[_Node]) -> tuple[list[_Node], Callable[..., list[chex.Array]]]:
    """Return the operands of an equation that depend on parameters, and the equation as a function of their values."""

    def apply(*values):
        rest = iter(values)
        return jaxprs.bind(eqn, [next(rest) if node.active else node.value for node in nodes])

    return [node for node in nodes if node.active], apply


def _not_followed(name: str, reason: str) -> str:
    return (
        f"hesscale does not follow `{name}` here: {reason}. It follows feed-forward networks of dense and "
        "convolutional layers with elementwise activations, pooling and dropout; for others there is hutchinson"
    )


def _check_float(params: Any) -> None:
    for path, leaf in groups.leaves_by_path(params).items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"params must be of float types, but {path!r} is {jnp.result_type(leaf)}")
