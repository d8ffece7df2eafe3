"""Neighborhood attention as a Haiku module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jax_natten import layers
from jax_natten.neighborhood import Neighborhood

try:
    import haiku as hk
except ModuleNotFoundError as error:
    if error.name != "haiku":
        raise
    raise ImportError("jax_natten.haiku needs Haiku: install it with  pip install 'jax_natten[haiku]'") from error

__all__ = ["NeighborhoodAttention"]


class NeighborhoodAttention(hk.Module):
    """Multi-head neighborhood attention over a 1-D, 2-D or 3-D grid.

    Arguments, parameter names and parameter shapes are those of ``hk.MultiHeadAttention``, so that its parameters load
    unchanged under this module's name. The rank of the grid is the length of ``kernel_size``::

        def forward(images):                                          # [*batch, *grid, features]
            return NeighborhoodAttention(num_heads=4, key_size=16, kernel_size=(7, 7), dilation=2)(images)

    Parameters: ``query``, ``key``, ``value`` with ``w [features, heads * size]`` and ``b``; ``linear`` (the output)
    with ``w [num_heads * value_size, model_size]`` and ``b``; with ``rel_pos_bias`` ``rpb [num_heads, 2 * K0 - 1,
    ...]``.

    **Checkpoints of NAT and DiNAT.** With ``fused_qkv=True`` one layer ``qkv`` makes the heads of the query, then those
    of the key, then those of the value; ``w`` of ``qkv`` and ``linear`` are the transposed weights of ``qkv`` and
    ``proj`` of the PyTorch layer. They need ``rel_pos_bias=True``.

    Args:
      num_heads: number of query heads.
      key_size: features of one head of query and key.
      kernel_size: window size per axis, at most the length of the axis; an int means a 1-D grid.
      stride: queries that share a window, per axis or for all; ``kernel_size`` gives blocked (window) attention.
      dilation: distance between neighboring keys, per axis or for all.
      is_causal: whether a query sees only keys at or before itself, per axis or for all.
      num_kv_heads: number of key and value heads, a divisor of ``num_heads``; by default ``num_heads``.
      rel_pos_bias: whether to learn a relative position bias ``rpb``; not with causal axes.
      fused_qkv: whether one layer ``qkv`` takes the place of ``query``, ``key`` and ``value``; self attention only.
      scale: multiplies query-key products; by default ``key_size ** -0.5``.
      dropout_rate: probability to drop an attention weight while training. Dropout takes the unfused operations, which
        need memory for ``prod(kernel_size)`` weights per query and head.
      broadcast_dropout: drop the same (query, slot) pairs in every batch element and head.
      implementation: which kernels run, as in :func:`jax_natten.neighborhood_attention`.
      attention: takes the place of :func:`jax_natten.neighborhood_attention`, with its arguments: for example
        :func:`jax_natten.distributed.sharded_attention` (context parallelism). Not with dropout.
      w_init: initialises the projections' weights; by default as ``hk.Linear``.
      with_bias: whether the projections add a bias.
      b_init: initialises the biases; by default zero.
      rpb_init: initialises ``rpb``; by default a truncated normal with standard deviation 0.02.
      value_size: features of one head of the value; by default ``key_size``.
      model_size: features of the output; by default ``num_heads * key_size``.
      name: of the module.

    Raises:
      TypeError, ValueError: arguments that do not fit together; names them.
    """

    def __init__(
        self,
        num_heads: int,
        key_size: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        *,
        num_kv_heads: int | None = None,
        rel_pos_bias: bool = False,
        fused_qkv: bool = False,
        scale: float | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        implementation: str | Sequence[str] | None = None,
        attention: Callable[..., jax.Array] | None = None,
        w_init: hk.initializers.Initializer | None = None,
        with_bias: bool = True,
        b_init: hk.initializers.Initializer | None = None,
        rpb_init: hk.initializers.Initializer | None = None,
        value_size: int | None = None,
        model_size: int | None = None,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.neighborhood = Neighborhood.make(kernel_size, stride, dilation, is_causal)
        self.num_heads = num_heads
        self.num_kv_heads, _ = layers.heads(num_heads, num_kv_heads)
        self.key_size = key_size
        self.value_size = value_size or key_size
        self.model_size = model_size or key_size * num_heads
        self.rel_pos_bias = rel_pos_bias
        self.fused_qkv = fused_qkv
        self.scale = scale
        self.dropout_rate = dropout_rate
        self.broadcast_dropout = broadcast_dropout
        self.implementation = implementation
        self.attention = attention
        self.w_init = w_init
        self.with_bias = with_bias
        self.b_init = b_init
        self.rpb_init = rpb_init or hk.initializers.TruncatedNormal(layers.RPB_STDDEV)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array | None = None,
        value: jax.Array | None = None,
        mask: None = None,
        *,
        is_training: bool = False,
    ) -> jax.Array:
        """Applies neighborhood attention.

        Args:
          query: source of the queries, ``[*batch, *grid, features]``.
          key: source of the keys, on the same grid; by default ``query``.
          value: source of the values, on the same grid; by default ``key``.
          mask: not supported; there so that a module which replaces Haiku's own can say so.
          is_training: whether to apply dropout; needs ``hk.transform``'s random key if ``dropout_rate > 0``.

        Returns:
          ``[*batch, *grid, model_size]``.

        Raises:
          TypeError, ValueError: arguments that do not fit together; names them.
          NotImplementedError: a mask, or an implementation that cannot take the case.
        """
        layers.check_mask(mask)
        layers.check_inputs(query, self.neighborhood)
        key, value = layers.key_value_inputs(query, key, value, self.fused_qkv)

        def linear(size: int, name: str | None = None) -> hk.Linear:
            return hk.Linear(size, with_bias=self.with_bias, w_init=self.w_init, b_init=self.b_init, name=name)

        def split_heads(x: jax.Array, heads: int) -> jax.Array:
            return x.reshape(*x.shape[:-1], heads, -1)

        sizes = (
            self.num_heads * self.key_size,
            self.num_kv_heads * self.key_size,
            self.num_kv_heads * self.value_size,
        )
        if self.fused_qkv:
            projected = jnp.split(linear(sum(sizes), "qkv")(query), (sizes[0], sizes[0] + sizes[1]), axis=-1)
        else:
            names = ("query", "key", "value")
            projected = [linear(size, name)(x) for size, name, x in zip(sizes, names, (query, key, value), strict=True)]

        rpb = None
        if self.rel_pos_bias:
            shape = (self.num_heads, *self.neighborhood.bias_shape)
            rpb = hk.get_parameter("rpb", shape, query.dtype, init=self.rpb_init)

        dropout_rate = self.dropout_rate if is_training else 0.0
        x = layers.attention(
            split_heads(projected[0], self.num_heads),
            split_heads(projected[1], self.num_kv_heads),
            split_heads(projected[2], self.num_kv_heads),
            self.neighborhood,
            scale=self.scale,
            rpb=rpb,
            dropout_rate=dropout_rate,
            dropout_rng=hk.next_rng_key() if dropout_rate > 0.0 else None,
            broadcast_dropout=self.broadcast_dropout,
            implementation=self.implementation,
            attention=self.attention,
        )
        return linear(self.model_size)(x.reshape(*x.shape[:-2], -1))
