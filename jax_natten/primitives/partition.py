"""Automatic partitioning: batch and heads stay sharded, whatever else is sharded is gathered.

Axes are named by roles, one letter each: ``b`` batch, ``X`` all grid axes, ``h`` query heads, ``k`` key and value
heads, ``g`` batch of the bias, ``s`` additional keys; every other letter is an axis that no sharding can split.
``expand`` writes one letter per axis where there are several: capital ones for batch axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_natten.primitives import shim

_BATCH = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Roles(NamedTuple):
    """Axis roles of operands and results, one string per array and one letter per axis."""

    operands: tuple[str, ...]
    results: tuple[str, ...]

    def lengths(self, operands, results) -> dict[str, int]:
        """Length of the axis of each role."""
        return role_lengths(zip(self.operands + self.results, (*operands, *results)))


def role_lengths(arrays: Iterable) -> dict[str, int]:
    """Length of the axis of each role, from pairs of roles and array."""
    return {role: length for roles, array in arrays for role, length in zip(roles, array.shape)}


def expand(every: Iterable[str], batch: Sequence[int], bias_batch: Sequence[int], rank: int) -> list[str]:
    """Roles with one letter per axis, given the lengths of the batch axes, those of the bias, and the grid's rank.

    The bias has the batch's letter where it is as long, and ``g`` where it is shared.
    """
    if len(batch) > len(_BATCH):
        raise NotImplementedError(f"at most {len(_BATCH)} batch axes; got {len(batch)}")
    letters = _BATCH[: len(batch)]
    own = "".join(letter if a == b else "g" for letter, a, b in zip(letters, batch, bias_batch))
    return [roles.replace("X", "xyz"[:rank]).replace("b", letters).replace("g", own) for roles in every]


def partitioned(roles: Roles, call: Callable) -> Callable:
    """``call`` under the automatic partitioner."""

    def partition(mesh, operands, results):
        kept = _kept_mesh_axes(roles, mesh, operands, results)

        def sharding(axes, array):
            return NamedSharding(mesh, PartitionSpec(*(kept.get(role) for role in axes)))

        in_shardings = tuple(map(sharding, roles.operands, operands))
        out_shardings = tuple(map(sharding, roles.results, results))

        def local(*arrays):
            return tuple(map(summed, roles.results, call(*arrays)))

        def summed(axes, result):
            # A result without a batch axis of its own is a sum over the batch, of which each device holds a part.
            over = [name for role, names in kept.items() if role in _BATCH and role not in axes for name in names]
            return _sum_p.bind(result, over=tuple(over)) if over else result

        return mesh, local, out_shardings, in_shardings

    def run(*operands):
        wrapped = custom_partitioning(lambda *arrays: tuple(call(*arrays)))
        rule = _sharding_rule(roles, operands, jax.eval_shape(call, *operands))
        wrapped.def_partition(partition, sharding_rule=rule)
        return wrapped(*operands)

    return run


def _lower_sum(ctx, x, *, over):
    with shim.local():
        return mlir.lower_fun(lambda x: jax.lax.psum(x, over), multiple_results=False)(ctx, x)


# The sum over mesh axes of what every device holds.
_sum_p = Primitive("natten_sum")
_sum_p.def_abstract_eval(lambda x, *, over: x)
mlir.register_lowering(_sum_p, _lower_sum)


def _kept_mesh_axes(roles: Roles, mesh, operands, results) -> dict[str, tuple[str, ...]]:
    """Mesh axes over which each role stays sharded, read off the first operand (the queries, or their weights)."""
    lengths = roles.lengths(operands, results)
    first = operands[0]
    spec = tuple(first.sharding.spec) + (None,) * (first.ndim - len(first.sharding.spec))

    def axes(entry, length):
        entry = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        return entry if length % math.prod(mesh.shape[name] for name in entry) == 0 else ()

    kept = {role: axes(entry, lengths[role]) for role, entry in zip(roles.operands[0], spec) if role in _BATCH}
    # Query heads of one group need the same key and value heads, so only whole groups can be split.
    heads = axes(spec[roles.operands[0].index("h")], lengths["k"])
    return kept | {"h": heads, "k": heads}


def _sharding_rule(roles: Roles, operands, results) -> str:
    """The rule of Shardy's propagation: which axes of operands and results correspond."""
    lengths = roles.lengths(operands, results)
    unique = (f"u{i}" for i in itertools.count())

    def mapping(axes, array):
        def factor(role, length):
            if length == 0 or role == "g":
                return next(unique)  # corresponds to nothing
            # Query heads in groups do not correspond to the key heads: as "(k m)" Shardy would split the keys over a
            # part of a mesh axis where the axis is longer than k, which custom_partitioning cannot express.
            return "k" if role == "h" and lengths["h"] == lengths["k"] else role

        return " ".join(map(factor, axes, array.shape))

    left = ", ".join(map(mapping, roles.operands, operands))
    right = ", ".join(map(mapping, roles.results, results))
    return f"{left} -> {right}"
