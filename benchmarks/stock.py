"""Neighborhood attention out of what JAX has: the alternatives that the benchmarks compare with."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_natten import Neighborhood, reference

# Bytes of intermediate results that fit a GPU of 80 GB.
MEMORY = 68 * 2**30


def alternatives(problem, itemsize: int = 2) -> dict[str, Callable]:
    """Those for a GPU that apply to a problem and fit the memory of one, forward at least, by name."""
    scores = problem.batch * problem.heads * problem.positions**2
    windows = problem.batch * problem.heads * problem.positions * math.prod(problem.kernel_size) * problem.dim
    found = {}
    if is_dense(problem):
        return {"cuDNN": cudnn()}
    if 6 * scores <= MEMORY:  # in float32, and the weights
        found["dense mask"] = dense_mask(problem)
    if itemsize * problem.positions**2 <= MEMORY:
        found["cuDNN mask"] = dense_mask(problem, implementation="cudnn")
    if is_causal_band(problem):
        found["cuDNN window"] = cudnn(is_causal=True, local_window_size=(problem.kernel_size[0] - 1, 0))
    # Keys, values, and one of them in another layout. Every query head has keys of its own.
    if 3 * itemsize * windows <= MEMORY and problem.heads == problem.kv_heads:
        found["gather"] = gather(problem)
    return found


def is_dense(problem) -> bool:
    return problem.kernel_size == problem.grid and not any(problem.is_causal)


def is_causal_band(problem) -> bool:
    """The keys are the last so many of a sequence: the one window that cuDNN knows."""
    return problem.rank == 1 and problem.is_causal[0] and problem.stride == problem.dilation == (1,)


def dense_mask(problem, implementation: str | None = None) -> Callable:
    """All scores of all pairs, those outside the windows masked: what a user of plain JAX writes first."""
    axes = Neighborhood.make(**problem.window, rank=problem.rank).axes(problem.grid)

    def attention(q, k, v):
        # Made on the device, from a mask per axis: for large grids it has billions of elements.
        mask = functools.reduce(outer_and, (jnp.asarray(axis.mask()) for axis in axes))
        return on_rows(jax.nn.dot_product_attention, mask=mask[None, None], implementation=implementation)(q, k, v)

    return attention


def outer_and(a: jax.Array, b: jax.Array) -> jax.Array:
    """The Kronecker product of two square masks."""
    return (a[:, None, :, None] & b[None, :, None, :]).reshape(len(a) * len(b), -1)


def cudnn(**options) -> Callable:
    return on_rows(jax.nn.dot_product_attention, implementation="cudnn", **options)


def on_rows(attention: Callable, **options) -> Callable:
    """``attention`` on ``[batch, positions, heads, dim]``."""

    def run(q, k, v):
        flat = [x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v)]
        return attention(*flat, **options).reshape(q.shape)

    return run


def gather(problem) -> Callable:
    """Every query gathers the keys and values of its window: no wasted products, prod(kernel_size) copies in memory."""
    positions, valid = reference.slot_positions(Neighborhood.make(**problem.window, rank=problem.rank), problem.grid)

    def attention(q, k, v):
        query, key, value = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v))
        scores = jnp.einsum("bxhd,bxshd->bxhs", query, key[:, positions]) * problem.dim**-0.5
        weights = jax.nn.softmax(jnp.where(jnp.asarray(valid)[:, None], scores, -jnp.inf))
        return jnp.einsum("bxhs,bxshd->bxhd", weights, value[:, positions]).reshape(q.shape)

    return attention
