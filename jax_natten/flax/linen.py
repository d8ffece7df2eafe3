"""Neighborhood attention as a ``flax.linen`` layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PrecisionLike

from jax_natten import layers
from jax_natten.neighborhood import Neighborhood


class NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention over a 1-D, 2-D or 3-D grid.

    The fields, parameter names and parameter shapes are those of ``nn.MultiHeadDotProductAttention``, so that its
    checkpoints load unchanged. The rank of the grid is the length of ``kernel_size``::

        layer = NeighborhoodAttention(num_heads=4, kernel_size=(7, 7), dilation=2)
        images = jnp.ones((8, 32, 32, 64))                            # [*batch, *grid, features]
        variables = layer.init(jax.random.key(0), images)
        out = layer.apply(variables, images)                          # [8, 32, 32, 64]

    Parameters: ``query``, ``key``, ``value`` with kernel ``[features, heads, head_dim]`` and bias ``[heads,
    head_dim]``; ``out`` with kernel ``[num_heads, head_dim, out_features]`` and bias ``[out_features]``; with
    ``normalize_qk`` the scales of ``query_ln`` and ``key_ln``; with ``rel_pos_bias`` ``rpb [num_heads, 2 * K0 - 1,
    ...]``.

    **Checkpoints of NAT and DiNAT.** With ``fused_qkv=True`` one layer ``qkv`` with kernel ``[features, num_heads + 2 *
    num_kv_heads, head_dim]`` makes the heads of the query, then those of the key, then those of the value. Weights of
    the PyTorch layer (``dim`` features, H heads of D) map by transposing and reshaping::

        qkv.kernel = qkv.weight.T.reshape(dim, 3 * H, D)        qkv.bias = qkv.bias.reshape(3 * H, D)
        out.kernel = proj.weight.T.reshape(H, D, dim)           out.bias = proj.bias          rpb = rpb

    with ``rel_pos_bias=True``; the query is scaled before and the bias added after, as there.

    Dropout acts on attention weights, which the fused kernels never hold: with ``dropout_rate > 0`` and
    ``deterministic=False`` the layer takes the unfused operations instead, which need memory for
    ``prod(kernel_size)`` weights per query and head. So does ``sow_weights=True``.

    Attributes:
      num_heads: number of query heads.
      kernel_size: window size per axis, at most the length of the axis; an int means a 1-D grid.
      stride: queries that share a window, per axis or for all; ``kernel_size`` gives blocked (window) attention.
      dilation: distance between neighboring keys, per axis or for all.
      is_causal: whether a query sees only keys at or before itself, per axis or for all.
      num_kv_heads: number of key and value heads, a divisor of ``num_heads``; by default ``num_heads``.
      rel_pos_bias: whether to learn a relative position bias ``rpb``; not with causal axes.
      fused_qkv: whether one layer ``qkv`` takes the place of ``query``, ``key`` and ``value``; self attention only.
      scale: multiplies query-key products; by default ``head_dim ** -0.5``.
      implementation: which kernels run, as in :func:`jax_natten.neighborhood_attention`.
      attention: takes the place of :func:`jax_natten.neighborhood_attention`, with its arguments: for example
        :func:`jax_natten.distributed.sharded_attention` (context parallelism). Not with dropout or ``sow_weights``.
      dtype: dtype of the computation; by default inferred from inputs and parameters.
      param_dtype: dtype of the parameters.
      qkv_features: features of query, key and value, all heads together; by default those of the input.
      out_features: features of the output; by default those of the input.
      broadcast_dropout: drop the same (query, slot) pairs in every batch element and head.
      dropout_rate: probability to drop an attention weight.
      deterministic: whether to leave out dropout; may be given to the call instead.
      precision: of the projections' and the attention's products, see :func:`jax_natten.neighborhood_attention`.
      kernel_init, bias_init: initialise the projections.
      out_kernel_init, out_bias_init: initialise the output projection; by default as the others.
      rpb_init: initialises ``rpb``; by default a truncated normal with standard deviation 0.02.
      use_bias: whether the projections add a bias.
      normalize_qk: whether to apply layer normalisation to query and key (arXiv 2302.05442).
    """

    num_heads: int
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    is_causal: bool | Sequence[bool] = False
    num_kv_heads: int | None = None
    rel_pos_bias: bool = False
    fused_qkv: bool = False
    scale: float | None = None
    implementation: str | Sequence[str] | None = None
    attention: Callable[..., jax.Array] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    qkv_features: int | None = None
    out_features: int | None = None
    broadcast_dropout: bool = True
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()
    out_bias_init: Initializer | None = None
    rpb_init: Initializer = nn.initializers.truncated_normal(layers.RPB_STDDEV)
    use_bias: bool = True
    normalize_qk: bool = False

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
        sow_weights: bool = False,
    ) -> jax.Array:
        """Applies neighborhood attention.

        Args:
          inputs_q: ``[*batch, *grid, features]``.
          inputs_k: source of the keys, on the same grid; by default ``inputs_q``.
          inputs_v: source of the values, on the same grid; by default ``inputs_k``.
          mask: not supported; there so that a layer which replaces Flax's own can say so.
          deterministic: whether to leave out dropout; only needed if ``dropout_rate > 0``.
          dropout_rng: random key for dropout; by default the stream "dropout".
          sow_weights: whether to sow the attention weights before dropout, ``[*batch, *grid, num_heads,
            prod(kernel_size)]``, as "attention_weights" into the collection "intermediates".

        Returns:
          ``[*batch, *grid, out_features]``.

        Raises:
          TypeError, ValueError: arguments that do not fit together; names them.
          NotImplementedError: a mask, or an implementation that cannot take the case.
        """
        neighborhood = Neighborhood.make(self.kernel_size, self.stride, self.dilation, self.is_causal)
        layers.check_mask(mask)
        layers.check_inputs(inputs_q, neighborhood)
        features = inputs_q.shape[-1]
        kv_heads, head_dim = layers.heads(self.num_heads, self.num_kv_heads, self.qkv_features or features)

        project = functools.partial(
            nn.DenseGeneral,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            use_bias=self.use_bias,
            precision=self.precision,
        )
        inputs_k, inputs_v = layers.key_value_inputs(inputs_q, inputs_k, inputs_v, self.fused_qkv)
        if self.fused_qkv:
            qkv = project((self.num_heads + 2 * kv_heads, head_dim), name="qkv")(inputs_q)
            query, key, value = jnp.split(qkv, (self.num_heads, self.num_heads + kv_heads), axis=-2)
        else:
            query = project((self.num_heads, head_dim), name="query")(inputs_q)
            key = project((kv_heads, head_dim), name="key")(inputs_k)
            value = project((kv_heads, head_dim), name="value")(inputs_v)
        if self.normalize_qk:
            normalize = functools.partial(nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype)
            query, key = normalize(name="query_ln")(query), normalize(name="key_ln")(key)
        query, key, value = promote_dtype(query, key, value, dtype=self.dtype)

        rpb = None
        if self.rel_pos_bias:
            shape = (self.num_heads, *neighborhood.bias_shape)
            rpb = self.param("rpb", self.rpb_init, shape, self.param_dtype)

        dropout_rate = self.dropout_rate
        if dropout_rate > 0.0 and nn.merge_param("deterministic", self.deterministic, deterministic):
            dropout_rate = 0.0
        if dropout_rate > 0.0 and dropout_rng is None:
            dropout_rng = self.make_rng("dropout")

        def record(weights: jax.Array) -> Any:
            return self.sow("intermediates", "attention_weights", weights)

        x = layers.attention(
            query,
            key,
            value,
            neighborhood,
            scale=self.scale,
            rpb=rpb,
            dropout_rate=dropout_rate,
            dropout_rng=dropout_rng,
            broadcast_dropout=self.broadcast_dropout,
            record=record if sow_weights else None,
            implementation=self.implementation,
            precision=self.precision,
            attention=self.attention,
        )
        return project(
            self.out_features or features,
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
        )(x)
