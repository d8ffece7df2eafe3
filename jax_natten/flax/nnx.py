"""Neighborhood attention as a ``flax.nnx`` layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PrecisionLike, PromoteDtypeFn

from jax_natten import layers
from jax_natten.flax.adapter import attention_fn
from jax_natten.neighborhood import Neighborhood

__all__ = ["NeighborhoodAttention", "attention_fn"]

_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()
_RPB_INIT = nnx.initializers.truncated_normal(layers.RPB_STDDEV)


class NeighborhoodAttention(nnx.Module):
    """Multi-head neighborhood attention over a 1-D, 2-D or 3-D grid.

    Arguments, parameter names and parameter shapes are those of ``nnx.MultiHeadAttention``, so that its checkpoints
    load unchanged. The rank of the grid is the length of ``kernel_size``::

        layer = NeighborhoodAttention(num_heads=4, in_features=64, kernel_size=(7, 7), dilation=2, rngs=nnx.Rngs(0))
        out = layer(jnp.ones((8, 32, 32, 64)))                       # [*batch, *grid, features]

    Parameters, checkpoints of NAT and DiNAT (``fused_qkv=True, rel_pos_bias=True``) and dropout are as described for
    :class:`jax_natten.flax.NeighborhoodAttention`.

    Args:
      num_heads: number of query heads.
      in_features: features of the input.
      qkv_features: features of the query, all heads together; by default ``in_features``.
      out_features: features of the output; by default ``in_features``.
      num_kv_heads: number of key and value heads, a divisor of ``num_heads``; by default ``num_heads``.
      in_kv_features: features of the inputs of key and value; by default ``in_features``.
      kernel_size: window size per axis, at most the length of the axis; an int means a 1-D grid.
      stride: queries that share a window, per axis or for all; ``kernel_size`` gives blocked (window) attention.
      dilation: distance between neighboring keys, per axis or for all.
      is_causal: whether a query sees only keys at or before itself, per axis or for all.
      rel_pos_bias: whether to learn a relative position bias ``rpb [num_heads, 2 * K0 - 1, ...]``; no causal axes then.
      fused_qkv: whether one layer ``qkv`` takes the place of ``query``, ``key`` and ``value``; self attention only.
      scale: multiplies query-key products; by default ``head_dim ** -0.5``.
      implementation: which kernels run, as in :func:`jax_natten.neighborhood_attention`.
      attention: takes the place of :func:`jax_natten.neighborhood_attention`, with its arguments: for example
        :func:`jax_natten.distributed.sharded_attention` (context parallelism). Not with dropout or ``sow_weights``.
      dtype: dtype of the computation; by default inferred from inputs and parameters.
      param_dtype: dtype of the parameters.
      broadcast_dropout: drop the same (query, slot) pairs in every batch element and head.
      dropout_rate: probability to drop an attention weight.
      deterministic: whether to leave out dropout; may be given to the call instead.
      precision: of the projections' and the attention's products, see :func:`jax_natten.neighborhood_attention`.
      kernel_init, bias_init: initialise the projections.
      out_kernel_init, out_bias_init: initialise the output projection; by default as the others.
      rpb_init: initialises ``rpb``; by default a truncated normal with standard deviation 0.02.
      use_bias: whether the projections add a bias.
      normalize_qk: whether to apply layer normalisation to query and key (arXiv 2302.05442).
      qkv_promote_dtype, out_promote_dtype, ln_promote_dtype: dtype promotion of the projections of query, key and
        value, of the output projection, and of the layer normalisations.
      rngs: random keys for parameters and dropout.
      keep_rngs: whether to keep a stream for dropout in the layer.
      kernel_metadata, bias_metadata, out_kernel_metadata, out_bias_metadata, query_ln_scale_metadata,
        key_ln_scale_metadata, rpb_metadata: metadata of the parameters, for example their sharding.

    Raises:
      TypeError, ValueError: arguments that do not fit together; names them.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = False,
        fused_qkv: bool = False,
        scale: float | None = None,
        implementation: str | Sequence[str] | None = None,
        attention: Callable[..., jax.Array] | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        broadcast_dropout: bool = True,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        precision: PrecisionLike = None,
        kernel_init: Initializer = _KERNEL_INIT,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = _BIAS_INIT,
        out_bias_init: Initializer | None = None,
        rpb_init: Initializer = _RPB_INIT,
        use_bias: bool = True,
        normalize_qk: bool = False,
        qkv_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        out_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        ln_promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        query_ln_scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        key_ln_scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        rpb_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.neighborhood = Neighborhood.make(kernel_size, stride, dilation, is_causal)
        self.num_heads = num_heads
        self.in_features = in_features
        self.qkv_features = qkv_features or in_features
        self.out_features = out_features or in_features
        self.in_kv_features = in_kv_features or in_features
        self.num_kv_heads, self.head_dim = layers.heads(num_heads, num_kv_heads, self.qkv_features)
        self.fused_qkv = fused_qkv
        self.scale = scale
        self.implementation = _static(implementation)
        self.attention = attention
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.broadcast_dropout = broadcast_dropout
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.precision = precision
        self.use_bias = use_bias
        self.normalize_qk = normalize_qk

        linear = functools.partial(
            nnx.LinearGeneral, dtype=dtype, param_dtype=param_dtype, use_bias=use_bias, precision=precision, rngs=rngs
        )
        project = functools.partial(
            linear,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=qkv_promote_dtype,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        if fused_qkv:
            self.qkv = project(in_features, (num_heads + 2 * self.num_kv_heads, self.head_dim))
        else:
            self.query = project(in_features, (num_heads, self.head_dim))
            self.key = project(self.in_kv_features, (self.num_kv_heads, self.head_dim))
            self.value = project(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        if normalize_qk:
            normalize = functools.partial(
                nnx.LayerNorm,
                self.head_dim,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                promote_dtype=ln_promote_dtype,
                rngs=rngs,
            )
            self.query_ln = normalize(scale_metadata=query_ln_scale_metadata)
            self.key_ln = normalize(scale_metadata=key_ln_scale_metadata)
        self.out = linear(
            (num_heads, self.head_dim),
            self.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            promote_dtype=out_promote_dtype,
            kernel_metadata=out_kernel_metadata or kernel_metadata,
            bias_metadata=out_bias_metadata or bias_metadata,
        )
        self.rel_pos_bias = rel_pos_bias
        if rel_pos_bias:
            shape = (num_heads, *self.neighborhood.bias_shape)
            self.rpb = nnx.Param(rpb_init(rngs.params(), shape, param_dtype), **rpb_metadata)
        self.rngs = rngs.dropout.fork() if keep_rngs and dropout_rate > 0 else None

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
    ) -> jax.Array:
        """Applies neighborhood attention.

        Args:
          inputs_q: ``[*batch, *grid, in_features]``.
          inputs_k: source of the keys, on the same grid; by default ``inputs_q``.
          inputs_v: source of the values, on the same grid; by default ``inputs_k``.
          mask: not supported; there so that a layer which replaces Flax's own can say so.
          deterministic: whether to leave out dropout; only needed if ``dropout_rate > 0``. Goes before the attribute.
          rngs: random keys for dropout; by default the layer's own stream.
          sow_weights: whether to sow the attention weights before dropout, ``[*batch, *grid, num_heads,
            prod(kernel_size)]``, as an ``nnx.Intermediate`` named "attention_weights".

        Returns:
          ``[*batch, *grid, out_features]``.

        Raises:
          TypeError, ValueError: arguments that do not fit together; names them.
          NotImplementedError: a mask, or an implementation that cannot take the case.
        """
        layers.check_mask(mask)
        layers.check_inputs(inputs_q, self.neighborhood)
        if inputs_q.shape[-1] != self.in_features:
            raise ValueError(f"inputs_q must have {self.in_features} features; got shape {inputs_q.shape}")
        inputs_k, inputs_v = layers.key_value_inputs(inputs_q, inputs_k, inputs_v, self.fused_qkv)

        if self.fused_qkv:
            heads = (self.num_heads, self.num_heads + self.num_kv_heads)
            query, key, value = jnp.split(self.qkv(inputs_q), heads, axis=-2)
        else:
            query, key, value = self.query(inputs_q), self.key(inputs_k), self.value(inputs_v)
        if self.normalize_qk:
            query, key = self.query_ln(query), self.key_ln(key)
        query, key, value = dtypes.promote_dtype((query, key, value), dtype=self.dtype)

        dropout_rate, dropout_rng = self.dropout_rate, None
        if dropout_rate > 0.0 and nnx.module.first_from(
            deterministic,
            self.deterministic,
            error_msg="with dropout_rate > 0, pass deterministic to the call or to the layer, or set it by nnx.view",
        ):
            dropout_rate = 0.0
        if dropout_rate > 0.0:
            stream = self.rngs if rngs is None else rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
            if stream is None:
                raise ValueError("dropout needs rngs: pass them to the call, or make the layer with keep_rngs=True")
            dropout_rng = stream()

        def record(weights: jax.Array) -> Any:
            return self.sow(nnx.Intermediate, "attention_weights", weights)

        x = layers.attention(
            query,
            key,
            value,
            self.neighborhood,
            scale=self.scale,
            rpb=self.rpb[...] if self.rel_pos_bias else None,
            dropout_rate=dropout_rate,
            dropout_rng=dropout_rng,
            broadcast_dropout=self.broadcast_dropout,
            record=record if sow_weights else None,
            implementation=self.implementation,
            precision=self.precision,
            attention=self.attention,
        )
        return self.out(x)

    def set_view(self, deterministic: bool | None = None) -> None:
        """What ``nnx.view`` calls.

        Args:
          deterministic: whether to leave out dropout.
        """
        if deterministic is not None:
            self.deterministic = deterministic


def _static(implementation: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    # Attributes of an nnx module that hold no arrays are compared and hashed: lists cannot be.
    return implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)
