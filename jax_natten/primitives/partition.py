"""Automatic partitioning: batch and heads stay sharded, whatever else is sharded is gathered.

Axes are named by roles, one letter each: ``b`` batch, ``X`` all grid axes, ``h`` query heads, ``k`` key and value
heads, ``g`` batches of the bias, ``s`` additional keys; every other letter is an axis that no sharding can split.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


class Roles(NamedTuple):
    """Axis roles of operands and results, one string per array."""

    operands: tuple[str, ...]
    results: tuple[str, ...]

    def lengths(self, operands, results) -> dict[str, int]:
        """Length of the axis of each role."""
        return role_lengths(zip(self.operands + self.results, (*operands, *results)))


def role_lengths(arrays: Iterable) -> dict[str, int]:
    """Length of the axis of each role, from pairs of roles and array."""
    return {role: length for roles, array in arrays for role, length in zip(_expand(roles, array.ndim), array.shape)}


def partitioned(roles: Roles, call: Callable) -> Callable:
    """``call`` under the automatic partitioner."""

    def partition(mesh, operands, results):
        kept = _kept_mesh_axes(roles, mesh, operands, results)

        def sharding(axes, array):
            return NamedSharding(mesh, PartitionSpec(*(kept.get(role) for role in _expand(axes, array.ndim))))

        in_shardings = tuple(map(sharding, roles.operands, operands))
        out_shardings = tuple(map(sharding, roles.results, results))
        # A result without a batch axis of its own is a sum over the batch, of which each device holds a part.
        partial = [axes[0] == "g" and bool(kept["b"]) and not kept["g"] for axes in roles.results]

        def local(*arrays):
            return tuple(jax.lax.psum(r, kept["b"]) if part else r for part, r in zip(partial, call(*arrays)))

        return mesh, local, out_shardings, in_shardings

    def run(*operands):
        wrapped = custom_partitioning(lambda *arrays: tuple(call(*arrays)))
        rule = _sharding_rule(roles, operands, jax.eval_shape(call, *operands))
        wrapped.def_partition(partition, sharding_rule=rule)
        return wrapped(*operands)

    return run


def _expand(roles: str, ndim: int) -> str:
    """Replaces ``X`` by one letter per grid axis."""
    return roles.replace("X", "xyz"[: ndim - len(roles) + 1])


def _kept_mesh_axes(roles: Roles, mesh, operands, results) -> dict[str, tuple[str, ...]]:
    """Mesh axes over which each role stays sharded, read off the first operand (the queries, or their weights)."""
    lengths = roles.lengths(operands, results)
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

        return " ".join(map(factor, _expand(axes, array.ndim), array.shape))

    left = ", ".join(map(mapping, roles.operands, operands))
    right = ", ".join(map(mapping, roles.results, results))
    return f"{left} -> {right}"
