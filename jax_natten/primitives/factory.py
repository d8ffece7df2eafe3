"""Builds a JAX primitive with all of its rules but the derivatives.

Every operation becomes two primitives. The *outer* one is what JAX transforms: it carries abstract evaluation,
batching, sharding and (added by the caller) derivatives. The *inner* one is the call on one device: it carries the
choice of the implementation and the custom call. Between them stands ``custom_partitioning``, which has neither a
batching nor a differentiation rule and so cannot be the outer one.

Axes are named by roles, one letter each: ``b`` batch, ``X`` all grid axes, ``h`` query heads, ``k`` key and value
heads, ``g`` batches of the bias; every other letter is an axis that no sharding can split. The leading axis of every
operand and result is a batch, which makes one batching rule do for all of them: fold the mapped axis into it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla
from jax.sharding import NamedSharding, PartitionSpec

from jax_natten import dispatch
from jax_natten.neighborhood import Neighborhood
from jax_natten.primitives import shim


@dataclasses.dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes:
      name: of the primitive, and in error messages.
      abstract_eval: ``(*avals, **params) -> list of avals``.
      xla: the pure JAX implementation, ``(*arrays, **params without implementation) -> results``.
      operands, results: axis roles, one string per array.
      native: ``(*avals, **params) -> NativeCall``; None if only the XLA implementation exists.
    """

    name: str
    abstract_eval: Callable[..., list]
    xla: Callable[..., Sequence[jax.Array]]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    native: Callable[..., NativeCall] | None = None


@dataclasses.dataclass(frozen=True)
class NativeCall:
    """How to reach the compiled kernels."""

    target: str
    problem: dispatch.Problem
    attributes: dict[str, Any]
    workspace: int | None = None  # elements, of the accumulation dtype; None: the call has no such result


def accumulation_dtype(dtype) -> np.dtype:
    """float64 for float64, else float32."""
    return jnp.promote_types(dtype, jnp.float32)


def window_attributes(neighborhood: Neighborhood) -> dict[str, np.ndarray]:
    """The custom-call attributes that describe a neighborhood."""
    fields = ("kernel_size", "stride", "dilation", "is_causal")
    return {field: np.asarray(getattr(neighborhood, field), np.int64) for field in fields}


def bind(primitive: Primitive, *operands, **params):
    """Binds a primitive with operands that vary over the same mesh axes."""
    return primitive.bind(*shim.align(*operands), **params)


def define(operation: Operation) -> Primitive:
    """The outer primitive of an operation."""
    inner = _inner(operation)
    outer = Primitive(operation.name)
    outer.multiple_results = True
    outer.def_impl(functools.partial(xla.apply_primitive, outer))
    outer.def_abstract_eval(operation.abstract_eval)
    batching.primitive_batchers[outer] = functools.partial(_batch, operation, outer)
    shim.lower_with_devices(outer)

    def lower(ctx, *operands, **params):
        # One device, or inside any shard_map: operands are local, and skipping the partitioner lets programs be
        # exported and found in the persistent compilation cache (its Python callback prevents both).
        context = ctx.module_context.axis_context
        local = isinstance(context, mlir.SPMDAxisContext) or getattr(context, "num_devices", 1) == 1
        call = functools.partial(inner.bind, **params)
        run = call if local else _partitioned(operation, call)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)

    mlir.register_lowering(outer, lower)
    return outer


def _inner(operation: Operation) -> Primitive:
    inner = Primitive(operation.name + "_local")
    inner.multiple_results = True
    inner.def_impl(functools.partial(xla.apply_primitive, inner))
    inner.def_abstract_eval(operation.abstract_eval)

    def lower_xla(ctx, *operands, implementation, **params):
        return mlir.lower_fun(operation.xla, multiple_results=True)(ctx, *operands, **params)

    def lower(ctx, *operands, platform, implementation, **params):
        assert operation.native is not None  # registered only then, see below
        call = operation.native(*ctx.avals_in, **params)
        names = dispatch.candidates(call.problem, platform, implementation)
        if names[0] == "xla":
            return lower_xla(ctx, *operands, implementation=implementation, **params)
        attributes = call.attributes | {"implementation": ",".join(name for name in names if name != "xla")}
        if call.workspace is None:
            return jax.ffi.ffi_lowering(call.target)(ctx, *operands, **attributes)
        scratch = jax.core.ShapedArray((call.workspace,), accumulation_dtype(call.problem.dtype))
        extended = ctx.replace(avals_out=[*ctx.avals_out, scratch])
        return jax.ffi.ffi_lowering(call.target)(extended, *operands, **attributes)[:-1]

    if operation.native is None:
        mlir.register_lowering(inner, lower_xla)
    else:
        for platform in ("cpu", "cuda"):
            mlir.register_lowering(inner, functools.partial(lower, platform=platform), platform=platform)
        mlir.register_lowering(inner, functools.partial(lower, platform="other"))
    return inner


def _batch(operation: Operation, primitive, operands, dims, **params):
    size = next(a.shape[d] for a, d in zip(operands, dims) if d is not None)
    operands = [batching.bdim_at_front(a, d, size) for a, d in zip(operands, dims)]
    # Not reshape(-1, ...): the mapped axis may be empty.
    folded = [a.reshape(size * a.shape[1], *a.shape[2:]) for a in operands]
    results = bind(primitive, *folded, **params)
    leading = {roles[0]: a.shape[1] for roles, a in zip(operation.operands, operands)}
    unfolded = [r.reshape(size, leading[roles[0]], *r.shape[1:]) for roles, r in zip(operation.results, results)]
    return unfolded, [0] * len(unfolded)


def _partitioned(operation: Operation, call: Callable) -> Callable:
    """``call`` under the automatic partitioner: batch and heads stay sharded, the rest is gathered."""

    def partition(mesh, operands, results):
        kept = _kept_mesh_axes(operation, mesh, operands, results)

        def sharding(roles, array):
            axes = (kept.get(role) if size else None for role, size in zip(_expand(roles, array.ndim), array.shape))
            return NamedSharding(mesh, PartitionSpec(*axes))

        in_shardings = tuple(map(sharding, operation.operands, operands))
        out_shardings = tuple(map(sharding, operation.results, results))
        # A result without a batch axis of its own is a sum over the batch, of which each device holds a part.
        partial = [roles[0] == "g" and bool(kept["b"]) and not kept["g"] for roles in operation.results]

        def local(*arrays):
            sums = (jax.lax.psum(r, kept["b"]) if part and r.size else r for part, r in zip(partial, call(*arrays)))
            return tuple(sums)

        return mesh, local, out_shardings, in_shardings

    def run(*operands):
        results = jax.eval_shape(call, *operands)
        wrapped = custom_partitioning(lambda *arrays: tuple(call(*arrays)))
        rule, factors = _sharding_rule(operation, operands, results)
        wrapped.def_partition(partition, sharding_rule=rule, **factors)
        return wrapped(*operands)

    return run


def _expand(roles: str, ndim: int) -> str:
    """Replaces ``X`` by one letter per grid axis."""
    return roles.replace("X", "xyz"[: ndim - len(roles) + 1])


def _lengths(operation: Operation, operands, results) -> dict[str, int]:
    """Length of the axis of each role. (An absent bias has no heads: the larger length counts.)"""
    lengths: dict[str, int] = {}
    for roles, array in zip(operation.operands + operation.results, (*operands, *results)):
        for role, length in zip(_expand(roles, array.ndim), array.shape):
            lengths[role] = max(length, lengths.get(role, 0))
    return lengths


def _kept_mesh_axes(operation: Operation, mesh, operands, results) -> dict[str, tuple[str, ...]]:
    """Mesh axes over which each role stays sharded, read off the first operand (the queries, or their weights)."""
    lengths = _lengths(operation, operands, results)
    first = operands[0]
    spec = tuple(first.sharding.spec) + (None,) * (first.ndim - len(first.sharding.spec))

    def axes(entry, *must_divide):
        entry = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        parts = math.prod(mesh.shape[name] for name in entry)
        return entry if all(length % parts == 0 for length in must_divide) else ()

    bias_batches = lengths.get("g", 1)
    batch = axes(spec[0], lengths["b"], *([bias_batches] if bias_batches > 1 else []))
    # Query heads of one group need the same key and value heads, so only whole groups can be split.
    heads = axes(spec[-2], lengths["k"])
    return {"b": batch, "g": batch if bias_batches > 1 else (), "h": heads, "k": heads}


def _sharding_rule(operation: Operation, operands, results) -> tuple[str, dict[str, int]]:
    """The rule of Shardy's propagation: which axes of operands and results correspond."""
    lengths = _lengths(operation, operands, results)
    group = lengths["h"] // lengths["k"]
    unique = (f"u{i}" for i in range(1000))

    def mapping(roles, array):
        factors = []
        for role, length in zip(_expand(roles, array.ndim), array.shape):
            if length == 0 or role == "g":
                factors.append(next(unique))
            elif role == "h" and group > 1:
                factors.append("(k m)")
            else:
                factors.append("k" if role == "h" else role)
        return " ".join(factors)

    left = ", ".join(map(mapping, operation.operands, operands))
    right = ", ".join(map(mapping, operation.results, results))
    return f"{left} -> {right}", {"m": group} if group > 1 else {}
