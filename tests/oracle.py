"""Neighborhood attention and its gradients in numpy, written from the definition and independent of the package.

The windows are the definition's, one query at a time, in Python integers. A dilation group is a small dense problem of
its own, so every grid of the problem table takes a moment even in float64. The gradients are derived by hand;
``test_reference.py`` compares them with JAX's differentiation of ``jax_natten.reference``.

``compute`` and ``storage`` turn the same code into plain attention at a lower precision, the yardstick of
``tolerance.py``: products accumulate in ``compute``; what plain jax.numpy attention stores in the input dtype
(the softmax weights, their cotangent and every result) is rounded to ``storage``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np


def window_of(x: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> tuple[int, int, int]:
    """Dilation group of position x and the in-group interval ``[start, end)`` of the keys that it sees."""
    group, index = x % dilation, x // dilation
    size = math.ceil((length - group) / dilation)
    if causal:
        leader = min((index // stride) * stride + stride - 1, size - 1)
        return group, max(leader - window + 1, 0), index + 1
    leader = min((index // stride) * stride + stride // 2, size - 1)
    start = max(0, min(leader - window // 2, size - window))
    return group, start, start + window


@functools.lru_cache(maxsize=256)
def axis_mask(length: int, window: int, stride: int, dilation: int, causal: bool) -> np.ndarray:
    """Boolean ``[length, length]``: query position x sees key position y."""
    mask = np.zeros((length, length), bool)
    for x in range(length):
        group, start, end = window_of(x, length, window, stride, dilation, causal)
        for y in range(length):
            mask[x, y] = y % dilation == group and start <= y // dilation < end
    return mask


def mask(grid, kernel_size, stride, dilation, is_causal) -> np.ndarray:
    """Boolean ``[N, N]`` over the flattened grid."""
    dense = np.ones((1, 1), bool)
    for axis in zip(grid, kernel_size, stride, dilation, is_causal, strict=True):
        dense = np.kron(dense, axis_mask(*axis)).astype(bool)
    return dense


@dataclasses.dataclass(frozen=True)
class Group:
    """One dilation group of a grid, n positions that attend only to each other."""

    take: tuple[slice, ...]  # its positions, one slice per axis of the grid
    mask: np.ndarray  # [n, n], query sees key
    slots: np.ndarray  # [n, P], key of every window slot
    valid: np.ndarray  # [n, P], whether the slot lies inside a causal axis' limit
    bias: np.ndarray  # [n, n], flat index into the relative position bias; meaningful under the mask


@functools.lru_cache(maxsize=16)
def groups(grid, kernel_size, stride, dilation, is_causal) -> tuple[Group, ...]:
    every = []
    for residues in itertools.product(*map(range, dilation)):
        seen, slots, valid, bias = (np.ones((1, 1), bool), np.zeros((1, 1), int), np.ones((1, 1), bool), 0)
        bias = np.zeros((1, 1), int)
        for length, window, step, gap, causal, residue in zip(grid, kernel_size, stride, dilation, is_causal, residues):
            positions = range(residue, length, gap)
            size = len(positions)
            bounds = np.array([window_of(x, length, window, step, gap, causal)[1:] for x in positions])
            index = np.arange(size)
            inside = (index >= bounds[:, :1]) & (index < bounds[:, 1:])
            key = bounds[:, :1] + np.arange(window)
            distance = np.clip(index[None, :] - index[:, None] + window - 1, 0, 2 * window - 2)
            seen = np.kron(seen, inside).astype(bool)
            slots = _outer(slots * size, np.minimum(key, size - 1))
            valid = _outer(valid, key < bounds[:, 1:], np.logical_and)
            bias = _outer(bias * (2 * window - 1), distance)
        take = tuple(slice(residue, None, gap) for residue, gap in zip(residues, dilation))
        every.append(Group(take, seen, slots, valid, bias))
    return tuple(every)


def _outer(a: np.ndarray, b: np.ndarray, combine=np.add) -> np.ndarray:
    """``[i, j]`` and ``[k, l]`` to ``[i * k, j * l]``, row-major."""
    return combine(a[:, None, :, None], b[None, :, None, :]).reshape(len(a) * len(b), -1)


class _Grid:
    """Reads and writes one group's rows of ``[B, *X, H, D]`` arrays as ``[B, Hkv, H / Hkv * n, D]``."""

    def __init__(self, group: Group, compute):
        self.at = (slice(None), *group.take)
        self.n = len(group.mask)
        self.compute = compute

    def read(self, x: np.ndarray, kv_heads: int) -> np.ndarray:
        batch, heads, dim = x.shape[0], x.shape[-2], x.shape[-1]
        rows = np.moveaxis(x[self.at].reshape(batch, self.n, heads, dim), 2, 1).astype(self.compute)
        return rows.reshape(batch, kv_heads, heads // kv_heads * self.n, dim)

    def write(self, x: np.ndarray, rows: np.ndarray) -> None:
        batch, heads, dim = x.shape[0], x.shape[-2], x.shape[-1]
        target = x[self.at]
        target[...] = np.moveaxis(rows.reshape(batch, heads, self.n, dim), 1, 2).reshape(target.shape)


def attention(operands: dict, window: dict, scale: float, d_out=None, d_lse=None, *, compute=np.float64, storage=None):
    """Fused attention, and its gradients if cotangents are given.

    Args:
      operands: ``query``, ``key``, ``value`` and, if used, ``additional_keys``, ``additional_values``, ``rpb``; with
        one batch axis.
      window: ``Problem.window``.

    Returns:
      ``(results, magnitudes)``: results ``out``, ``lse`` and ``d_<operand>``; and for the gradients the size of the
      terms that they sum, which may cancel to zero.
    """
    stored = (lambda x: x) if storage is None else (lambda x: x.astype(storage).astype(compute))
    query, key, value = operands["query"], operands["key"], operands["value"]
    batch, *grid, heads, dim = query.shape
    kv_heads, value_dim = value.shape[-2:]
    extra = operands.get("additional_keys") is not None
    rpb = operands.get("rpb")
    results = {
        "out": np.zeros((batch, *grid, heads, value_dim), compute),
        "lse": np.zeros((batch, *grid, heads, 1), compute),
    }
    backward = d_out is not None
    if backward:
        results |= {f"d_{name}": np.zeros(x.shape, compute) for name, x in operands.items() if x is not None}
    score_terms = value_terms = 0.0
    if extra:
        more_keys, more_values = (
            np.moveaxis(operands[name], 2, 1).astype(compute) for name in ("additional_keys", "additional_values")
        )
    for group in groups(tuple(grid), *window.values()):
        g = _Grid(group, compute)
        q, k, v = (g.read(x, kv_heads) for x in (query, key, value))
        shape = (batch, kv_heads, heads // kv_heads, g.n)
        scores = (np.asarray(scale, compute) * (q @ k.swapaxes(-1, -2))).reshape(*shape, g.n)
        if rpb is not None:
            table = rpb.reshape(kv_heads, heads // kv_heads, -1).astype(compute)
            scores += table[:, :, group.bias]
        scores = np.where(group.mask, scores, -np.inf)
        if extra:
            more = np.asarray(scale, compute) * (q @ more_keys.swapaxes(-1, -2))
            scores = np.concatenate([scores, more.reshape(*shape, -1)], -1)
            v = np.concatenate([v, more_values], 2)
            k = np.concatenate([k, more_keys], 2)
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        weights /= total
        rounded = stored(weights)
        rows = (batch, kv_heads, heads // kv_heads * g.n, -1)
        g.write(results["out"], rounded.reshape(rows) @ v)
        g.write(results["lse"], (top + np.log(total)).reshape(rows))
        if not backward:
            continue
        do, dl = g.read(d_out, kv_heads), g.read(d_lse[..., None], kv_heads).reshape(*shape, 1)
        d_weights = stored((do @ v.swapaxes(-1, -2)).reshape(weights.shape))
        delta = (weights * d_weights).sum(-1, keepdims=True) - dl
        d_scores = weights * (d_weights - delta)
        score_terms += float(np.sum((weights * (abs(d_weights) + abs(delta))).astype(np.float64) ** 2))
        value_terms += float(np.sum(weights.astype(np.float64) ** 2))
        flat = np.asarray(scale, compute) * d_scores.reshape(rows)
        g.write(results["d_query"], flat @ k)
        d_k, d_v = flat.swapaxes(-1, -2) @ q, rounded.reshape(rows).swapaxes(-1, -2) @ do
        g.write(results["d_key"], d_k[:, :, : g.n])
        g.write(results["d_value"], d_v[:, :, : g.n])
        if extra:
            results["d_additional_keys"] += np.moveaxis(d_k[:, :, g.n :], 1, 2)
            results["d_additional_values"] += np.moveaxis(d_v[:, :, g.n :], 1, 2)
        if rpb is not None:
            over_batch = np.where(group.mask, d_scores[..., : g.n], 0).sum(0).reshape(heads, -1)
            table = results["d_rpb"].reshape(heads, -1)
            for h in range(heads):
                np.add.at(table[h], group.bias.reshape(-1), over_batch[h])
    results["lse"] = results["lse"][..., 0]
    magnitudes = {}
    if backward:
        of_scores, of_values = math.sqrt(score_terms), math.sqrt(value_terms)
        for name, other in (("query", key), ("key", query), ("additional_keys", query)):
            magnitudes[f"d_{name}"] = abs(scale) * of_scores * typical_row(other)
        magnitudes["d_rpb"] = of_scores
        magnitudes["d_value"] = magnitudes["d_additional_values"] = of_values * typical_row(d_out)
    for name in results:
        if name == "d_rpb" and storage is not None:
            results[name] = results[name].astype(rpb.dtype).astype(compute)
        elif name != "lse":
            results[name] = stored(results[name])
    return results, magnitudes


def typical_row(x: np.ndarray) -> float:
    """Root mean square of the norms of the rows."""
    return float(np.sqrt(np.mean(np.sum(np.asarray(x, np.float64) ** 2, -1)))) if x.size else 0.0


def _dense(rows: np.ndarray, group: Group, fill: float) -> np.ndarray:
    """Window slots ``[..., n, P]`` to a dense ``[..., n, n]``."""
    dense = np.full((*rows.shape[:-2], len(group.mask), len(group.mask)), fill, rows.dtype)
    x, slot = np.nonzero(group.valid)
    dense[..., x, group.slots[x, slot]] = rows[..., x, slot]
    return dense


def pn(queries, keys, window, additional_keys=None, rpb=None, *, fill=-np.inf, compute=np.float64, storage=None):
    """Unscaled scores in slots ``[B, *X, H, P + S]``: the forward of QK and the gradient of AV's weights."""
    batch, *grid, heads, _ = queries.shape
    kv_heads = keys.shape[-2]
    extra = 0 if additional_keys is None else additional_keys.shape[1]
    size = math.prod(window["kernel_size"])
    weights = np.zeros((batch, *grid, heads, size + extra), compute)
    for group in groups(tuple(grid), *window.values()):
        g = _Grid(group, compute)
        q, k = g.read(queries, kv_heads), g.read(keys, kv_heads)
        scores = (q @ k.swapaxes(-1, -2)).reshape(batch, heads, g.n, g.n)
        if rpb is not None:
            scores += rpb.reshape(heads, -1).astype(compute)[:, group.bias]
        rows = np.take_along_axis(scores, np.broadcast_to(group.slots, (batch, heads, *group.slots.shape)), -1)
        rows = np.where(group.valid, rows, fill)
        if extra:
            more = q @ np.moveaxis(additional_keys, 2, 1).astype(compute).swapaxes(-1, -2)
            rows = np.concatenate([rows, more.reshape(batch, heads, g.n, extra)], -1)
        g.write(weights, rows)
    return weights if storage is None else weights.astype(storage)


def nn(weights, keys, window, additional_keys=None, *, compute=np.float64, storage=None):
    """Weighted sum of the window's keys: the forward of AV and the gradient of QK's query."""
    batch, *grid, heads, _ = weights.shape
    kv_heads = keys.shape[-2]
    size = math.prod(window["kernel_size"])
    queries = np.zeros((batch, *grid, heads, keys.shape[-1]), compute)
    for group in groups(tuple(grid), *window.values()):
        g = _Grid(group, compute)
        rows, k = g.read(weights, heads), g.read(keys, kv_heads)
        flat = (batch, kv_heads, heads // kv_heads * g.n, -1)
        total = _dense(rows[..., :size], group, 0).reshape(flat) @ k
        if additional_keys is not None:
            total += rows[..., size:].reshape(flat) @ np.moveaxis(additional_keys, 2, 1).astype(compute)
        g.write(queries, total)
    return queries if storage is None else queries.astype(storage)


def inverse(weights, queries, window, kv_heads, *, compute=np.float64, storage=None):
    """Sum over the queries that see a key: the gradients of QK's keys and of AV's values; also the additional ones."""
    batch, *grid, heads, slots = weights.shape
    size = math.prod(window["kernel_size"])
    keys = np.zeros((batch, *grid, kv_heads, queries.shape[-1]), compute)
    additional = np.zeros((batch, slots - size, kv_heads, queries.shape[-1]), compute)
    for group in groups(tuple(grid), *window.values()):
        g = _Grid(group, compute)
        rows, q = g.read(weights, heads), g.read(queries, kv_heads)
        flat = (batch, kv_heads, heads // kv_heads * g.n, -1)
        g.write(keys, _dense(rows[..., :size], group, 0).reshape(flat).swapaxes(-1, -2) @ q)
        additional += np.moveaxis(rows[..., size:].reshape(flat).swapaxes(-1, -2) @ q, 1, 2)
    return (keys, additional) if storage is None else (keys.astype(storage), additional.astype(storage))


def bias_gradient(weights, window, heads, *, compute=np.float64, storage=None):
    """Gradient of the relative position bias of QK: the sum of the scores' cotangent over pairs at one distance."""
    _, *grid, _, _ = weights.shape
    size = math.prod(window["kernel_size"])
    table = np.zeros((heads, math.prod(2 * k - 1 for k in window["kernel_size"])), compute)
    for group in groups(tuple(grid), *window.values()):
        rows = _Grid(group, compute).read(weights, heads)[..., :size].sum(0)
        index = np.take_along_axis(group.bias, group.slots, -1)
        for h in range(heads):
            np.add.at(table[h], index[group.valid], rows[h][group.valid])
    table = table.reshape(heads, *(2 * k - 1 for k in window["kernel_size"]))
    return table if storage is None else table.astype(storage)
