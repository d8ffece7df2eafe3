"""A small (Dilated) Neighborhood Attention Transformer: NAT, arXiv 2204.07143, and DiNAT, arXiv 2209.15001."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_natten.flax import NeighborhoodAttention


class ConvTokenizer(nn.Module):
    """Two convolutions make tokens ``[B, H, W, features]`` of an image. Their strides are 1: the images are small."""

    features: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.Conv(self.features // 2, (3, 3))(images)
        x = nn.Conv(self.features, (3, 3))(nn.gelu(x))
        return nn.LayerNorm()(x)


class Block(nn.Module):
    """Neighborhood attention and a two-layer perceptron, each normalised before and added to its input."""

    num_heads: int
    kernel_size: int
    dilation: int
    mlp_ratio: int
    implementation: str | None
    attention: Callable[..., jax.Array] | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x += NeighborhoodAttention(
            num_heads=self.num_heads,
            kernel_size=(self.kernel_size, self.kernel_size),
            dilation=self.dilation,
            rel_pos_bias=True,
            fused_qkv=True,
            implementation=self.implementation,
            attention=self.attention,
            name="attention",
        )(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(self.mlp_ratio * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class ConvDownsampler(nn.Module):
    """Halves the grid and doubles the features."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(2 * x.shape[-1], (3, 3), strides=(2, 2), use_bias=False)(x)
        return nn.LayerNorm()(x)


class NAT(nn.Module):
    """Stages of blocks on ever smaller grids; NAT if every dilation is 1, DiNAT if they alternate.

    Attributes:
      num_classes: length of the output.
      features: features of the first stage; every next one has twice as many.
      head_dim: features of one attention head.
      kernel_size: window size on both axes.
      dilations: for every stage the dilation of each of its blocks; ``kernel_size * dilation`` must fit the grid.
      mlp_ratio: hidden features of the perceptrons, over those of the stage.
      implementation: of the attention, as in ``jax_natten.neighborhood_attention``.
      attention: in the place of ``jax_natten.neighborhood_attention``; for training on several devices.
    """

    num_classes: int = 10
    features: int = 32
    head_dim: int = 16
    kernel_size: int = 5
    dilations: Sequence[Sequence[int]] = ((1, 3), (1, 1))
    mlp_ratio: int = 2
    implementation: str | None = None
    attention: Callable[..., jax.Array] | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[B, num_classes]`` of images ``[B, H, W, channels]``."""
        x = ConvTokenizer(self.features, name="tokenizer")(images)
        for stage, dilations in enumerate(self.dilations):
            if stage > 0:
                x = ConvDownsampler(name=f"downsampler{stage}")(x)
            for block, dilation in enumerate(dilations):
                x = Block(
                    num_heads=x.shape[-1] // self.head_dim,
                    kernel_size=self.kernel_size,
                    dilation=dilation,
                    mlp_ratio=self.mlp_ratio,
                    implementation=self.implementation,
                    attention=self.attention,
                    name=f"stage{stage}_block{block}",
                )(x)
        x = jnp.mean(nn.LayerNorm()(x), axis=(-3, -2))
        return nn.Dense(self.num_classes, name="head")(x)
