"""Argument checks shared by the fused and the unfused interface. All of them run at trace time."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_natten.neighborhood import Neighborhood

DTYPES = ("float16", "bfloat16", "float32", "float64")


def arrays(**named) -> dict[str, jax.Array]:
    """Converts named arguments to JAX arrays of one supported floating dtype.

    Raises:
      TypeError: not an array, an unsupported dtype, or dtypes that differ from the first argument's.
    """
    converted: dict[str, jax.Array] = {}
    for name, value in named.items():
        if not isinstance(value, jax.Array | np.ndarray):
            raise TypeError(f"{name} must be an array; got {type(value).__name__}")
        array = jnp.asarray(value)
        if array.dtype.name not in DTYPES:
            raise TypeError(f"{name} must have one of the dtypes {', '.join(DTYPES)}; got {array.dtype.name}")
        converted[name] = array
        first_name, first = next(iter(converted.items()))
        if array.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype.name}; got {array.dtype.name}")
    return converted


def split(name: str, array: jax.Array, window: Neighborhood) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Splits ``[*batch, *X, heads, D]`` into batch and grid shape and checks that the windows fit the grid."""
    rank = window.rank
    if array.ndim < rank + 2:
        raise ValueError(
            f"{name} must have shape [*batch, {', '.join('XYZ'[:rank])}, heads, dim], at least {rank + 2} axes for "
            f"kernel_size {window.kernel_size}; got shape {array.shape}"
        )
    batch, grid = array.shape[: array.ndim - rank - 2], array.shape[array.ndim - rank - 2 : -2]
    try:
        window.check_grid(grid)
    except jax.errors.InconclusiveDimensionOperation:
        least = tuple(k * d for k, d in zip(window.kernel_size, window.dilation))
        raise ValueError(
            f"the windows must fit the symbolic grid {grid}, whose lengths must be at least {least}: say so by the "
            "constraints of jax.export.symbolic_shape"
        ) from None
    if array.shape[-1] == 0 or array.shape[-2] == 0:
        raise ValueError(f"{name} must have at least one head and one channel; got shape {array.shape}")
    return batch, grid


def same_grid(name: str, array: jax.Array, other_name: str, other: jax.Array) -> None:
    """Batch and grid axes of two arrays must agree."""
    if array.ndim != other.ndim or array.shape[:-2] != other.shape[:-2]:
        raise ValueError(
            f"{name} must have the batch and grid axes of {other_name}, {other.shape[:-2]}; got shape {array.shape}"
        )


def groups(query_name: str, heads: int, key_name: str, kv_heads: int) -> None:
    """Query heads must be a multiple of the key heads."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"the heads of {query_name} must be a multiple of the heads of {key_name}; got {heads} and {kv_heads}"
        )


def channels(name: str, array: jax.Array, other_name: str, dim: int) -> None:
    """The last axis must have a given length."""
    if array.shape[-1] != dim:
        raise ValueError(f"the last axis of {name} must be that of {other_name}, {dim}; got shape {array.shape}")


def additional(name: str, array, like_name: str, like: jax.Array, batch: tuple[int, ...], heads: int, dim: int):
    """Additional keys or values ``[*batch, S, heads, dim]`` of the dtype of ``like``; None if there are none."""
    if array is None:
        return None
    array = arrays(**{like_name: like, name: array})[name]
    expected = (*batch, "S", heads, dim)
    if array.ndim != len(expected) or any(e not in ("S", got) for e, got in zip(expected, array.shape)):
        raise ValueError(f"{name} must have shape {expected}; got {array.shape}".replace("'", ""))
    return array if array.shape[-3] else None


def bias(rpb, batch: tuple[int, ...], heads: int, window: Neighborhood, dtype) -> jax.Array | None:
    """The bias operand in the accumulation dtype, with a batch axis of length 1 for each one of the query; or None."""
    if rpb is None:
        return None
    if not isinstance(rpb, jax.Array | np.ndarray) or not jnp.issubdtype(rpb.dtype, jnp.floating):
        raise TypeError(f"rpb must be a floating-point array; got {getattr(rpb, 'dtype', type(rpb).__name__)}")
    expected = (heads, *window.bias_shape)
    if rpb.shape != expected:
        raise ValueError(f"rpb must have shape [heads, *(2 * kernel_size - 1)] = {expected}; got {rpb.shape}")
    if any(window.is_causal):
        raise ValueError(f"rpb cannot be combined with causal axes; got is_causal {window.is_causal}")
    return jnp.expand_dims(jnp.asarray(rpb, jnp.promote_types(dtype, jnp.float32)), tuple(range(len(batch))))


def scale(value, dim: int) -> float:
    """The factor of the scores, a finite Python number; None means ``dim ** -0.5``."""
    if value is None:
        return dim**-0.5
    if isinstance(value, jax.core.Tracer):
        raise TypeError("scale must be known at trace time; multiply the query by a learned or traced scale instead")
    number = isinstance(value, numbers.Real | np.ndarray | jax.Array) and not isinstance(value, bool)
    if not number or getattr(value, "ndim", 0) != 0:
        raise TypeError(f"scale must be None or a number; got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite; got {value!r}")
    return float(value)


_PRECISIONS = ("default", "fastest", "high", "highest", "bfloat16", "bfloat16_3x", "tensorfloat32", "float32")
# What an algorithm that jax.default_matmul_precision may name asks for at least; DEFAULT for those left out.
_ALGORITHMS = {
    "BF16_BF16_F32_X3": lax.Precision.HIGH,
    "BF16_BF16_F32_X6": lax.Precision.HIGHEST,
    "BF16_BF16_F32_X9": lax.Precision.HIGHEST,
    "TF32_TF32_F32": lax.Precision.HIGH,
    "TF32_TF32_F32_X3": lax.Precision.HIGHEST,
    "F32_F32_F32": lax.Precision.HIGHEST,
    "F64_F64_F64": lax.Precision.HIGHEST,
}


def precision(value) -> lax.Precision:
    """The precision of float32 products; None means ``jax.default_matmul_precision``, and HIGHEST if that is not set.

    Unlike a matrix product of JAX, attention does not round its operands unless somebody asks for it: kernels of every
    implementation then agree to float32.
    """
    if value is None:
        value = jax.config.jax_default_matmul_precision
        if value is None:
            return lax.Precision.HIGHEST
        if value in lax.DotAlgorithmPreset.__members__:
            return _ALGORITHMS.get(value, lax.Precision.DEFAULT)
    if isinstance(value, lax.Precision):
        return value
    if not isinstance(value, str):
        raise TypeError(f"precision must be None, a jax.lax.Precision or its name; got {value!r}")
    if value not in _PRECISIONS:
        raise ValueError(f"precision must be among {', '.join(_PRECISIONS)}; got {value!r}")
    return lax.Precision(value)


Function = TypeVar("Function", bound=Callable)


def with_rank(rank: int, function: Function, name: str) -> Function:
    """``function``, which takes its rank from ``kernel_size``, for one rank.

    An int ``kernel_size`` then holds for every axis.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def ranked(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        size = call.arguments["kernel_size"]
        if not isinstance(size, Sequence):
            call.arguments["kernel_size"] = (size,) * rank
        elif len(size) != rank:
            raise ValueError(f"kernel_size of {name} must be an int or have {rank} entries; got {size!r}")
        return function(*call.args, **call.kwargs)

    ranked.__name__ = ranked.__qualname__ = name
    ranked.__doc__ = (
        f"{rank}-D case of :func:`{function.__name__}`: the same arguments; an int ``kernel_size`` holds for every "
        "axis."
    )
    return ranked  # type: ignore[return-value]
