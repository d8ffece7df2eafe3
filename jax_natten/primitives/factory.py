"""Builds a JAX primitive with all of its rules but the derivatives.

Every operation becomes two primitives. The *outer* one is what JAX transforms: it carries abstract evaluation,
batching, sharding and (added by the caller) derivatives. The *inner* one is the call on one device: it carries the
choice of the implementation and the custom call. Between them stands ``custom_partitioning``, which has neither a
batching nor a differentiation rule and so cannot be the outer one.

The leading axis of every operand and result is a batch, which makes one batching rule do for all of them: fold the
mapped axis into it.

Additional keys and bias may be absent. The outer primitive then lacks these operands (and the results that are their
gradients), as its parameter ``present`` tells; the inner one always has all of them, absent ones with an axis of length
zero. (Passing empty arrays through JAX instead would make them residuals that nothing reads.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from jax_natten import dispatch
from jax_natten.neighborhood import Neighborhood
from jax_natten.primitives import shim
from jax_natten.primitives.partition import Roles, partitioned, role_lengths


@dataclasses.dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes:
      name: of the primitive.
      abstract_eval: ``(*avals, **params) -> list of avals``, of the complete operands and results.
      xla: the pure JAX implementation, ``(*arrays, **params) -> results``.
      operands, results: axis roles, one string per array.
      native: ``(*avals, **params) -> NativeCall``; None if only the XLA implementation exists.
      gradients: whether the results are gradients of the first operands, so absent where these are.
    """

    name: str
    abstract_eval: Callable[..., list]
    xla: Callable[..., Sequence[jax.Array]]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    native: Callable[..., NativeCall] | None = None
    gradients: bool = False

    def roles(self, present: tuple[bool, ...]) -> Roles:
        """Axis roles of the operands and results that are present."""
        operands = tuple(roles for roles, there in zip(self.operands, present) if there)
        return Roles(operands, tuple(self.present_results(self.results, present)))

    def present_results(self, values: Sequence, present: tuple[bool, ...]) -> list:
        """Of one value per result those whose result is present."""
        return [v for v, there in zip(values, present) if there] if self.gradients else list(values)

    def completed(self, operands: Sequence, present: tuple[bool, ...], neighborhood: Neighborhood) -> list:
        """The operands with an empty array in the place of each absent one."""
        given = iter(operands)
        full = [next(given) if there else None for there in present]
        lengths = role_lengths((roles, array) for roles, array in zip(self.operands, full) if array is not None)

        def empty(roles):
            if roles[0] == "g":
                return jnp.zeros((1, 0, *neighborhood.bias_shape), accumulation_dtype(operands[0].dtype))
            return jnp.zeros([0 if role == "s" else lengths[role] for role in roles], operands[0].dtype)

        return shim.align(*(empty(roles) if array is None else array for roles, array in zip(self.operands, full)))

    def run_xla(self, *operands, present, implementation, tiles=None, **params) -> list[jax.Array]:
        """The XLA implementation on the operands and results that are present."""
        full = self.completed(operands, present, params["neighborhood"])
        return self.present_results(self.xla(*full, **params), present)


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


def bind(primitive: Primitive, *operands, **params) -> list[jax.Array]:
    """Binds an outer primitive to operands that vary over the same mesh axes. None stands for an absent one."""
    present = tuple(x is not None for x in operands)
    return primitive.bind(*shim.align(*(x for x in operands if x is not None)), present=present, **params)


def define(operation: Operation) -> Primitive:
    """The outer primitive of an operation."""
    inner = _inner(operation)
    outer = Primitive(operation.name)
    outer.multiple_results = True
    outer.def_impl(functools.partial(xla.apply_primitive, outer))
    batching.primitive_batchers[outer] = functools.partial(_batch, operation, outer)
    shim.lower_with_devices(outer)

    @outer.def_abstract_eval
    def abstract_eval(*avals, present, **params):
        given = iter(avals)
        full = [next(given) if there else None for there in present]
        return operation.present_results(operation.abstract_eval(*full, **params), present)

    def call(*operands, present, **params):
        full = operation.completed(operands, present, params["neighborhood"])
        return operation.present_results(inner.bind(*full, **params), present)

    def lower(ctx, *operands, **params):
        # One device, or inside any shard_map: operands are local, and skipping the partitioner lets programs be
        # exported and found in the persistent compilation cache (its Python callback prevents both).
        context = ctx.module_context.axis_context
        local = isinstance(context, mlir.SPMDAxisContext) or getattr(context, "num_devices", 1) == 1
        run: Callable = functools.partial(call, **params)
        if not local:
            run = partitioned(operation.roles(params["present"]), run)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)

    mlir.register_lowering(outer, lower)
    return outer


def _inner(operation: Operation) -> Primitive:
    inner = Primitive(operation.name + "_local")
    inner.multiple_results = True
    inner.def_impl(functools.partial(xla.apply_primitive, inner))
    inner.def_abstract_eval(operation.abstract_eval)

    def lower_xla(ctx, *operands, implementation, tiles=None, **params):
        return mlir.lower_fun(operation.xla, multiple_results=True)(ctx, *operands, **params)

    def lower(ctx, *operands, platform, implementation, tiles=None, **params):
        assert operation.native is not None  # registered only then, see below
        call = operation.native(*ctx.avals_in, **params)
        names = dispatch.candidates(call.problem, platform, implementation)
        if names[0] == "xla":
            return lower_xla(ctx, *operands, implementation=implementation, **params)
        names = tuple(name for name in names if name != "xla")
        attributes = call.attributes | {"implementation": ",".join(names)}
        attributes |= dispatch.tile_attribute(call.problem, names, tiles)
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


def _batch(operation: Operation, primitive, operands, dims, *, present, **params):
    size = next(a.shape[d] for a, d in zip(operands, dims) if d is not None)
    operands = [batching.bdim_at_front(a, d, size) for a, d in zip(operands, dims)]
    # Not reshape(-1, ...): the mapped axis may be empty.
    folded = [a.reshape(size * a.shape[1], *a.shape[2:]) for a in operands]
    results = primitive.bind(*shim.align(*folded), present=present, **params)
    every = operation.roles(present)
    leading = {roles[0]: a.shape[1] for roles, a in zip(every.operands, operands)}
    unfolded = [r.reshape(size, leading[roles[0]], *r.shape[1:]) for roles, r in zip(every.results, results)]
    return unfolded, [0] * len(unfolded)
