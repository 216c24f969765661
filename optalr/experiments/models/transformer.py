"""A small transformer that predicts the next symbol."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from optalr.experiments.configs.calling import Count, Depth, Part
from optalr.experiments.errors import ExperimentError

# The deviation that GPT-2 starts from.
_init = nn.initializers.normal(0.02)


class Attention(nn.Module):
    """Causal self-attention."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return ``(N, T, width)``."""
        num, length, width = x.shape

        def split(name):
            y = nn.Dense(width, kernel_init=_init, name=name)(x)
            return y.reshape(num, length, self.heads, width // self.heads)

        query, key, value = split("query"), split("key"), split("value")
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / jnp.sqrt(query.shape[-1])
        earlier = jnp.tril(jnp.ones((1, 1, length, length), bool))
        # Finite, so that no infinity can reach a gradient. Its softmax is still zero.
        weights = nn.softmax(jnp.where(earlier, scores, -1e9), axis=-1)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", weights, value).reshape(num, length, width)
        return nn.Dense(width, kernel_init=_init, name="out")(mixed)


class Block(nn.Module):
    """Attention, then dense layers of four times the width, each after a norm and added."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return ``(N, T, width)``."""
        width = x.shape[-1]

        def dropout(y):
            return nn.Dropout(self.dropout, deterministic=not train)(y)

        x = x + dropout(Attention(self.heads)(nn.LayerNorm()(x)))
        y = nn.gelu(nn.Dense(4 * width, kernel_init=_init)(nn.LayerNorm()(x)))
        return x + dropout(nn.Dense(width, kernel_init=_init)(y))


class LanguageModel(nn.Module):
    """Embeddings of symbols and places, blocks, a norm, and a dense layer back to the symbols."""

    symbols: int
    layers: int
    width: int
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return ``(N, T, symbols)`` logits of the next symbol."""
        y = nn.Embed(self.symbols, self.width, embedding_init=_init)(x)
        place = self.param("place", _init, (x.shape[1], self.width))
        y = y + place[None]
        for _ in range(self.layers):
            y = Block(self.heads, self.dropout)(y, train)
        return nn.Dense(self.symbols, kernel_init=_init)(nn.LayerNorm()(y))


def transformer(
    num_classes: int, *, layers: Depth = 2, width: Count = 64, heads: Count = 4, dropout: Part = 0.0
) -> nn.Module:
    """Build a causal transformer over symbols, with norms before its layers (as in GPT-2)."""
    if width % heads:
        raise ExperimentError(f"model.width {width} must be a multiple of model.heads {heads}.")
    return LanguageModel(num_classes, layers=layers, width=width, heads=heads, dropout=dropout)
