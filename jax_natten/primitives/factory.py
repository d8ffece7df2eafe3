"""Builds a JAX primitive with all of its rules but the derivatives.

Every operation becomes two primitives. The *outer* one is what JAX transforms: it carries abstract evaluation,
batching, sharding and (added by the caller) derivatives. The *inner* one is the call on one device: it carries the
choice of the implementation and the custom call. Between them stands ``custom_partitioning``, which has neither a
batching nor a differentiation rule and so cannot be the outer one.

Every operand and result of the outer primitive has the same batch axes in front, any number of them, which makes one
batching rule do for all of them: the mapped axis is one more. They become one axis only inside the inner primitive, on
one device, where that moves no data, whatever axes are sharded. A bias has length 1 on the batch axes that share it,
which come last.

Additional keys and bias may be absent. The outer primitive then lacks these operands (and the results that are their
gradients), as its parameter ``present`` tells; the inner one always has all of them, absent ones with an axis of length
zero. (Passing empty arrays through JAX instead would make them residuals that nothing reads.)
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
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from jax_natten import dispatch
from jax_natten.neighborhood import Neighborhood
from jax_natten.primitives import shim
from jax_natten.primitives.partition import Roles, expand, partitioned, role_lengths


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

    def batch_axes(self, operands: Sequence, neighborhood: Neighborhood) -> int:
        """The number of batch axes."""
        return operands[0].ndim - neighborhood.rank - 2  # heads and channels

    def expanded(self, operands: Sequence, present: tuple[bool, ...], neighborhood: Neighborhood) -> list[str]:
        """Axis roles of every operand and then every result, one letter per axis."""
        first = self.batch_axes(operands, neighborhood)
        lengths = operands[0].shape[:first]
        there = [roles for roles, there in zip(self.operands, present) if there]
        biases = [x.shape[:first] for roles, x in zip(there, operands) if roles[0] == "g"]
        return expand(
            (*self.operands, *self.results), lengths, biases[0] if biases else (1,) * first, neighborhood.rank
        )

    def roles(self, operands: Sequence, present: tuple[bool, ...], neighborhood: Neighborhood) -> Roles:
        """Axis roles of the operands and results that are present."""
        every = self.expanded(operands, present, neighborhood)
        count = len(self.operands)
        there = tuple(roles for roles, there in zip(every[:count], present) if there)
        return Roles(there, tuple(self.present_results(every[count:], present)))

    def present_results(self, values: Sequence, present: tuple[bool, ...]) -> list:
        """Of one value per result those whose result is present."""
        return [v for v, there in zip(values, present) if there] if self.gradients else list(values)

    def completed(self, operands: Sequence, present: tuple[bool, ...], neighborhood: Neighborhood) -> list:
        """The operands with an empty array in the place of each absent one."""
        full = restored(operands, present)
        every = self.expanded(operands, present, neighborhood)
        lengths = role_lengths((roles, array) for roles, array in zip(every, full) if array is not None)
        batch = (1,) * self.batch_axes(operands, neighborhood)

        def empty(own, roles):
            if own[0] == "g":
                return jnp.zeros((*batch, 0, *neighborhood.bias_shape), accumulation_dtype(operands[0].dtype))
            return jnp.zeros([0 if role == "s" else lengths[role] for role in roles], operands[0].dtype)

        pairs = zip(self.operands, every, full)
        return shim.align(*(empty(own, roles) if array is None else array for own, roles, array in pairs))

    def run_xla(self, *operands, present, implementation, tiles=None, **params) -> list[jax.Array]:
        """The XLA implementation on the operands and results that are present."""
        neighborhood = params["neighborhood"]
        first = self.batch_axes(operands, neighborhood)
        avals = restored(list(map(jax.typeof, operands)), present)
        like = self.present_results(self.abstract_eval(*avals, **params), present)
        folded = [shim.reshape(x, folded_shape(x.shape, first)) for x in operands]
        results = self.evaluate_xla(*self.completed(folded, present, neighborhood), **params)
        return [shim.reshape(r, x.shape) for r, x in zip(self.present_results(results, present), like)]

    def evaluate_xla(self, *operands, **params) -> Sequence[jax.Array]:
        """The XLA implementation on complete operands with one batch axis.

        Walks over a symbolic batch (``jax.export``) one element at a time.
        """
        if all(shim.is_constant(x.shape) for x in operands):
            return self.xla(*operands, **params)
        if not all(shim.is_constant(x.shape[1:]) for x in operands):
            raise NotImplementedError("the 'xla' implementation, which runs on this platform, needs a constant grid")
        batched = [roles[0] == "b" for roles in self.operands]
        if not all(x.shape[0] == 1 for x, has_batch in zip(operands, batched) if not has_batch):
            raise NotImplementedError("the 'xla' implementation takes one bias for a symbolic batch, no batch of them")

        def element(mine):
            given = iter(mine)
            return self.xla(*(next(given)[None] if has else x for x, has in zip(operands, batched)), **params)

        results = jax.lax.map(element, [x for x, has_batch in zip(operands, batched) if has_batch])
        return [r[:, 0] if roles[0] == "b" else r.sum(0) for r, roles in zip(results, self.results)]


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


def precision_attribute(precision: lax.Precision) -> dict[str, str]:
    """The custom-call attribute that says how far float32 products may be rounded: its name in lower case."""
    return {"precision": precision.name.lower()}


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
    batching.primitive_batchers[outer] = functools.partial(_batch, outer)
    shim.lower_with_devices(outer)

    @outer.def_abstract_eval
    def abstract_eval(*avals, present, **params):
        return operation.present_results(operation.abstract_eval(*restored(avals, present), **params), present)

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
            run = partitioned(operation.roles(ctx.avals_in, params["present"], params["neighborhood"]), run)
        return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)

    mlir.register_lowering(outer, lower)
    return outer


def _inner(operation: Operation) -> Primitive:
    inner = Primitive(operation.name + "_local")
    inner.multiple_results = True
    inner.def_impl(functools.partial(xla.apply_primitive, inner))
    inner.def_abstract_eval(operation.abstract_eval)

    def folding(rule):
        """Makes one batch axis of all of them around a lowering rule."""

        def lower(ctx, *operands, **params):
            first = operation.batch_axes(ctx.avals_in, params["neighborhood"])
            # The operands are local: that mesh axes shard them, or vary over them, no longer matters.
            avals_in, avals_out = (
                [jax.core.ShapedArray(a.shape, a.dtype) for a in avals] for avals in (ctx.avals_in, ctx.avals_out)
            )
            folded_in, folded_out = (
                [a.update(shape=folded_shape(a.shape, first)) for a in avals] for avals in (avals_in, avals_out)
            )
            with shim.local():
                operands = _reshape(ctx, operands, avals_in, folded_in)
                results = rule(ctx.replace(avals_in=folded_in, avals_out=folded_out), *operands, **params)
                return _reshape(ctx, results, folded_out, avals_out)

        return lower

    def lower_xla(ctx, *operands, implementation, tiles=None, **params):
        return mlir.lower_fun(operation.evaluate_xla, multiple_results=True)(ctx, *operands, **params)

    def lower(ctx, *operands, platform, implementation, tiles=None, **params):
        assert operation.native is not None  # registered only then, see below
        call = operation.native(*ctx.avals_in, **params)
        names = dispatch.candidates(call.problem, platform, implementation)
        if names[0] == "xla":
            return lower_xla(ctx, *operands, implementation=implementation, **params)
        names = tuple(name for name in names if name != "xla")
        attributes = call.attributes | {"implementation": ",".join(names)}
        attributes |= dispatch.tile_attributes(call.problem, names, tiles)
        if call.workspace is None:
            return jax.ffi.ffi_lowering(call.target)(ctx, *operands, **attributes)
        scratch = jax.core.ShapedArray((call.workspace,), accumulation_dtype(call.problem.dtype))
        extended = ctx.replace(avals_out=[*ctx.avals_out, scratch])
        return jax.ffi.ffi_lowering(call.target)(extended, *operands, **attributes)[:-1]

    if operation.native is None:
        mlir.register_lowering(inner, folding(lower_xla))
    else:
        for platform in ("cpu", "cuda"):
            rule = functools.partial(lower, platform=platform)
            mlir.register_lowering(inner, folding(rule), platform=platform)
        mlir.register_lowering(inner, folding(functools.partial(lower, platform="other")))
    return inner


def folded_shape(shape: Sequence[int], batch_axes: int) -> tuple[int, ...]:
    """The shape with one batch axis."""
    return (math.prod(shape[:batch_axes]), *shape[batch_axes:])


def _reshape(ctx, values, avals, new_avals):
    """Reshapes values of a lowering rule."""
    if all(old.shape == new.shape for old, new in zip(avals, new_avals)):
        return values

    def reshape(*arrays):
        return [array.reshape(new.shape) for array, new in zip(arrays, new_avals)]

    context = ctx.replace(avals_in=avals, avals_out=new_avals)
    return mlir.lower_fun(reshape, multiple_results=True)(context, *values)


def restored(operands: Sequence, present: tuple[bool, ...]) -> list:
    """Operands of an outer primitive with None for those absent."""
    given = iter(operands)
    return [next(given) if there else None for there in present]


def _batch(primitive, operands, dims, **params):
    size = next(a.shape[d] for a, d in zip(operands, dims) if d is not None)
    operands = [batching.bdim_at_front(a, d, size) for a, d in zip(operands, dims)]
    results = primitive.bind(*shim.align(*operands), **params)
    return results, [0] * len(results)
