"""Primitives of fused attention and their derivatives.

``forward`` and ``backward`` are kernels; ``tangent`` is the derivative of ``forward`` along given tangents, linear in
them, and its transpose is ``backward``. Written so, instead of with ``jax.custom_vjp``, both modes of differentiation
work, and ``jax.grad`` still costs one forward and one backward call. Derivatives of ``backward`` and of ``tangent``
(second order) go through the XLA implementation, which JAX differentiates.

Operands common to all: query, key, value, additional_keys, additional_values, bias (layouts in cuda/common/params.h).
"""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad

from jax_natten.dispatch import Problem
from jax_natten.primitives import cost, shim, workspace
from jax_natten.primitives.factory import (
    NativeCall,
    Operation,
    accumulation_dtype,
    bind,
    define,
    precision_attribute,
    window_attributes,
)
from jax_natten.xla import fused as xla

# Names of the residuals for checkpoint policies, e.g. ``jax.checkpoint_policies.save_only_these_names``.
OUT_NAME, LSE_NAME = "na_out", "na_lse"

_INPUTS = ("bXhd", "bXkd", "bXke", "bskd", "bske", "ghpqr")
_OUT, _LSE = "bXhe", "bXh"


def problem(operation: str, query, key, value, additional_keys, bias, neighborhood) -> Problem:
    """The case that these arrays (or abstract values) make; absent ones are None or empty."""
    sizes = query.shape[:-2] if shim.is_constant(query.shape[:-2]) else (0,) * (query.ndim - 2)
    return Problem(
        operation=operation,
        neighborhood=neighborhood,
        dtype=query.dtype,
        heads=query.shape[-2],
        kv_heads=key.shape[-2],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        additional_keys=0 if additional_keys is None else additional_keys.shape[-3],
        has_bias=bias is not None and bias.shape[-1 - neighborhood.rank] > 0,
        # Of shapes that are known only when a program runs the kernels decide then.
        batch=math.prod(sizes[: -neighborhood.rank]),
        grid=tuple(sizes[-neighborhood.rank :]),
    )


def _forward_avals(query, key, value, *_, **__):
    out = shim.derive(query, (*query.shape[:-1], value.shape[-1]))
    lse = shim.derive(query, query.shape[:-1], accumulation_dtype(query.dtype))
    return [out, lse]


def _native(name, query, key, value, additional_keys, additional_values, bias, *_, neighborhood, scale, precision):
    backward = name == "fused_backward"
    return NativeCall(
        target=f"jax_natten_{name}",
        problem=problem(name, query, key, value, additional_keys, bias, neighborhood),
        attributes=window_attributes(neighborhood) | precision_attribute(precision) | {"scale": np.float64(scale)},
        workspace=workspace.fused_backward(query, value, additional_keys, bias) if backward else None,
    )


_FORWARD = Operation(
    name="natten_fused_forward",
    abstract_eval=_forward_avals,
    xla=xla.forward,
    operands=_INPUTS,
    results=(_OUT, _LSE),
    native=functools.partial(_native, "fused_forward"),
)
_BACKWARD = Operation(
    name="natten_fused_backward",
    abstract_eval=lambda *avals, **_: list(avals[:6]),
    xla=xla.backward,
    operands=(*_INPUTS, _OUT, _LSE, _OUT, _LSE),
    results=_INPUTS,
    native=functools.partial(_native, "fused_backward"),
    gradients=True,
)
_TANGENT = Operation(
    name="natten_fused_tangent",
    abstract_eval=_forward_avals,
    xla=xla.tangent,
    operands=(*_INPUTS, _OUT, _LSE, *_INPUTS),
    results=(_OUT, _LSE),
)
forward_p, backward_p, tangent_p = map(define, (_FORWARD, _BACKWARD, _TANGENT))


def attention(query, key, value, additional_keys, additional_values, bias, **params):
    """``(out, lse)``; additional keys and values, or the bias, may be None.

    Parameters are ``neighborhood``, ``scale``, ``precision``, ``implementation``, and ``tiles``, which only the forward
    has.
    """
    operands = (query, key, value, additional_keys, additional_values, bias)
    return bind(forward_p, *operands, **params)


def _rebind(primitive, *operands, present, **params):
    """Binds a primitive to operands of which only those present are given."""
    return primitive.bind(*shim.align(*operands), present=present, **params)


def _forward_jvp(primals, tangents, *, present, tiles, **params):
    out, lse = _rebind(forward_p, *primals, present=present, tiles=tiles, **params)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    tangents = map(ad.instantiate_zeros, tangents)
    every = (*present, True, True, *present)
    return [out, lse], _rebind(tangent_p, *primals, out, lse, *tangents, present=every, **params)


def _tangent_transpose(cotangents, *operands, present, **params):
    count = sum(present[: len(_INPUTS) + 2])
    residuals, linear = operands[:count], operands[count:]
    cotangents = map(ad.instantiate_zeros, cotangents)
    every = (*present[: len(_INPUTS)], *[True] * 4)
    grads = _rebind(backward_p, *residuals, *cotangents, present=every, **params)
    return [None] * count + [g if ad.is_undefined_primal(x) else None for g, x in zip(grads, linear)]


def _xla_jvp(operation, primals, tangents, **params):
    """Second order: differentiates the XLA implementation."""
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(functools.partial(operation.run_xla, **params), tuple(primals), tangents)


def _flops(operation, operands, _, present, neighborhood):
    query, _, value, *rest = operands
    additional = rest[0].shape[-3] if present[3] else 0
    dims = {"dim": query.shape[-1], "value_dim": value.shape[-1]}
    return cost.flops(operation, neighborhood, query.shape[:-1], additional=additional, **dims)


for _primitive, _name in ((forward_p, "forward"), (backward_p, "backward"), (tangent_p, "tangent")):
    cost.register(_primitive, functools.partial(_flops, _name))

ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_jvps[tangent_p] = functools.partial(_xla_jvp, _TANGENT)
ad.primitive_jvps[backward_p] = functools.partial(_xla_jvp, _BACKWARD)
