"""The encoder of BERT and RoBERTa, and a classifier of texts."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from cbp_jax.nets.activations import get_activation

_ACTIVATIONS = {"gelu": lambda x: nn.gelu(x, approximate=False), "gelu_new": nn.gelu, "gelu_pytorch_tanh": nn.gelu}


def activation_of(name: str) -> Callable[[jax.Array], jax.Array]:
    """Return the activation of a name that Hugging Face libraries or `get_activation` know."""
    return _ACTIVATIONS.get(name) or get_activation(name)


class Bert(nn.Module):
    """The encoder of BERT and RoBERTa: layers of self-attention and a perceptron, normalized after each ("post-LN").

    Attributes:
      vocabulary: number of tokens.
      width: size of a token's vector.
      depth: number of layers.
      heads: number of attention heads; divides the width.
      hidden: number of hidden units of each perceptron.
      positions: number of position vectors.
      types: number of token types, such as 2 for the first and second text of a pair.
      position_offset: index of the first token's position vector. If above 0, as in RoBERTa (2), masked tokens are not
        counted, and get the position vector before it.
      pad: the padding token.
      activation: activation of the hidden units: "gelu" (exact), "gelu_new" or "gelu_pytorch_tanh" (approximate), or a
        name of `get_activation`.
      epsilon: of layer normalization.
      dropout_rate: dropout rate of activations and attention weights in training.
      pooler: whether to apply a dense layer with tanh to the first token.

    Example:
      >>> net = Bert(vocabulary=50, width=8, depth=2, heads=2, hidden=16, positions=12)
      >>> tokens = jnp.array([[3, 4, 5, 0], [6, 7, 0, 0]])
      >>> variables = jax.eval_shape(net.init, jax.random.key(0), tokens)
      >>> jax.tree.map(jnp.shape, jax.eval_shape(net.apply, variables, tokens))
      ((2, 4, 8), (2, 8))

    References:
      Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, NAACL 2019; Liu et al., `RoBERTa
      <https://arxiv.org/abs/1907.11692>`_, 2019
    """

    vocabulary: int
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    types: int = 2
    position_offset: int = 0
    pad: int = 0
    activation: str = "gelu"
    epsilon: float = 1e-12
    dropout_rate: float = 0.1
    pooler: bool = True

    @nn.compact
    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Map tokens to vectors.

        Args:
          tokens: int [batch, length].
          mask: bool [batch, length], which tokens are not padding; by default those that are not `pad`.
          types: int [batch, length]; by default 0.
          train: whether to apply dropout, which needs `rngs={"dropout": key}`.

        Returns:
          vectors of the tokens [batch, length, width], and of the text [batch, width], or None without a pooler.

        Raises:
          ValueError: texts have more tokens than there are positions.
        """
        if tokens.shape[1] > self.positions - self.position_offset:
            raise ValueError(
                f"tokens must be at most {self.positions - self.position_offset} of a text, as many as there are "
                f"positions, got {tokens.shape[1]}"
            )
        act = activation_of(self.activation)
        init = nn.initializers.normal(0.02)
        dense = lambda size, name: nn.Dense(size, kernel_init=init, name=name)
        norm = lambda name: nn.LayerNorm(epsilon=self.epsilon, name=name)
        embed = lambda count, name: nn.Embed(count, self.width, embedding_init=init, name=name)
        drop = nn.Dropout(self.dropout_rate, deterministic=not train)

        mask = tokens != self.pad if mask is None else mask.astype(bool)
        types = jnp.zeros_like(tokens) if types is None else types
        places = jnp.arange(tokens.shape[1])[None]
        if self.position_offset:
            places = jnp.cumsum(mask, 1) * mask + self.position_offset - 1
        x = embed(self.vocabulary, "word_embeddings")(tokens)
        x = x + embed(self.positions, "position_embeddings")(places)
        x = x + embed(self.types, "token_type_embeddings")(types)
        x = drop(norm("embeddings_norm")(x))
        for layer in range(self.depth):
            attention = nn.MultiHeadDotProductAttention(
                self.heads,
                dropout_rate=self.dropout_rate,
                broadcast_dropout=False,
                deterministic=not train,
                kernel_init=init,
                name=f"layer{layer}_attention",
            )
            x = norm(f"layer{layer}_norm1")(x + drop(attention(x, mask=mask[:, None, None])))
            h = dense(self.width, f"layer{layer}_mlp2")(act(dense(self.hidden, f"layer{layer}_mlp1")(x)))
            x = norm(f"layer{layer}_norm2")(x + drop(h))
        return x, jnp.tanh(dense(self.width, "pooler")(x[:, 0])) if self.pooler else None


class TextClassifier(nn.Module):
    """A text classifier: an encoder, pooling to one vector for each text, and a linear head.

    Attributes:
      num_outputs: number of outputs.
      encoder: the encoder, such as :class:`Bert`; its parameters are under "encoder".
      pooling: the text's vector: the "mean" over its tokens, the "first" token, or the encoder's "pooler".

    Example:
      >>> net = TextClassifier(3, Bert(vocabulary=50, width=8, depth=1, heads=2, hidden=16, positions=12, pooler=False))
      >>> tokens = jnp.array([[3, 4, 5, 0], [6, 7, 0, 0]])
      >>> jax.eval_shape(net.init_with_output, jax.random.key(0), tokens)[0].shape
      (2, 3)
    """

    num_outputs: int
    encoder: nn.Module
    pooling: Literal["mean", "first", "pooler"] = "mean"

    def setup(self):
        """Create the head. The encoder exists already."""
        self.head = nn.Dense(self.num_outputs)

    def features(
        self, tokens: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Return the vectors of texts [batch, width], which are the head's inputs. Arguments are those of the
        encoder."""
        if self.pooling not in ("mean", "first", "pooler"):
            raise ValueError(f"pooling must be 'mean', 'first' or 'pooler', got {self.pooling!r}")
        mask = tokens != self.encoder.pad if mask is None else mask
        x, pooled = self.encoder(tokens, mask, types, train=train)
        if self.pooling == "pooler":
            if pooled is None:
                raise ValueError("pooling must be 'mean' or 'first', as this encoder has no pooler, got 'pooler'")
            return pooled
        if self.pooling == "first":
            return x[:, 0]
        weights = mask.astype(x.dtype)[..., None]
        return jnp.sum(x * weights, 1) / jnp.maximum(jnp.sum(weights, 1), 1)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, types: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Map texts to outputs [batch, num_outputs]; arguments are those of the encoder."""
        return self.head(self.features(tokens, mask, types, train=train))
