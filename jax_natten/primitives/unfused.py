"""Primitives of unfused attention: three operations, closed under differentiation.

- ``pn`` (pointwise-neighborhood): weights[x, slot] = <queries_x, keys_slot> (+ bias)
- ``nn`` (neighborhood-neighborhood): queries[x] = sum over slots of weights[x, slot] keys_slot
- ``inverse`` (inverse-neighborhood): keys[y] = sum over the x that see y of weights[x, slot of y] queries_x

Each is linear in each of its two sides, and the transposes are the other two. So derivatives of every order and in both
modes are made of the same kernels. Slots are those of the window, row-major, then the additional keys. What is absent
(additional keys, bias) has an axis of length zero.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad

from jax_natten.bias import bias_gradient
from jax_natten.dispatch import Problem
from jax_natten.primitives import shim, workspace
from jax_natten.primitives.factory import NativeCall, Operation, accumulation_dtype, bind, define, window_attributes
from jax_natten.xla import unfused as xla

_WEIGHTS, _QUERIES, _KEYS, _ADDITIONAL, _BIAS = "bXhw", "bXhd", "bXkd", "bskd", "ghpqr"


def problem(operation: str, dtype, heads, kv_heads, dim, additional, has_bias, neighborhood) -> Problem:
    """The case of an unfused operation, whose two sides share one head dim."""
    return Problem(operation, neighborhood, dtype, heads, kv_heads, dim, dim, additional, has_bias)


def empty_bias(neighborhood, dtype):
    """The bias operand that stands for none."""
    return jnp.zeros((1, 0, *neighborhood.bias_shape), accumulation_dtype(dtype))


def _pn_avals(queries, keys, additional, bias, *, neighborhood, **_):
    slots = neighborhood.window_size + additional.shape[1]
    axes = (*range(queries.ndim - 1), None)
    return [shim.derive(queries, (*queries.shape[:-1], slots), axes=axes)]


def _pn_native(queries, keys, additional, bias, *, neighborhood, fill_negative_infinity):
    case = problem(
        "pn",
        queries.dtype,
        queries.shape[-2],
        keys.shape[-2],
        queries.shape[-1],
        additional.shape[1],
        bias.shape[1] > 0,
        neighborhood,
    )
    attributes = window_attributes(neighborhood) | {"fill_negative_infinity": np.bool_(fill_negative_infinity)}
    return NativeCall("jax_natten_pn", case, attributes)


def _nn_avals(weights, keys, additional, **_):
    return [shim.derive(weights, (*weights.shape[:-1], keys.shape[-1]), axes=(*range(weights.ndim - 1), None))]


def _nn_native(weights, keys, additional, *, neighborhood):
    heads, (kv_heads, dim) = weights.shape[-2], keys.shape[-2:]
    case = problem("nn", weights.dtype, heads, kv_heads, dim, additional.shape[1], False, neighborhood)
    return NativeCall("jax_natten_nn", case, window_attributes(neighborhood))


def _inverse_avals(weights, queries, *, group, additional, **_):
    batch, *grid, heads, dim = queries.shape
    kv_heads = heads // group
    rank = len(grid)
    return [
        shim.derive(queries, (batch, *grid, kv_heads, dim)),
        shim.derive(queries, (batch, additional, kv_heads, dim), axes=(0, None, rank + 1, rank + 2)),
    ]


def _inverse_native(weights, queries, *, neighborhood, group, additional):
    heads, dim = queries.shape[-2:]
    kv_heads = heads // group
    case = problem("in", queries.dtype, heads, kv_heads, dim, additional, False, neighborhood)
    attributes = window_attributes(neighborhood)
    return NativeCall("jax_natten_in", case, attributes, workspace.inverse(queries, kv_heads, additional))


def _inverse_xla(weights, queries, *, group, **params):
    return xla.inverse(weights, queries, kv_heads=queries.shape[-2] // group, **params)


pn_p = define(
    Operation(
        name="natten_pn",
        abstract_eval=_pn_avals,
        xla=xla.pn,
        operands=(_QUERIES, _KEYS, _ADDITIONAL, _BIAS),
        results=(_WEIGHTS,),
        native=_pn_native,
    )
)
nn_p = define(
    Operation(
        name="natten_nn",
        abstract_eval=_nn_avals,
        xla=xla.nn,
        operands=(_WEIGHTS, _KEYS, _ADDITIONAL),
        results=(_QUERIES,),
        native=_nn_native,
    )
)
inverse_p = define(
    Operation(
        name="natten_in",
        abstract_eval=_inverse_avals,
        xla=_inverse_xla,
        operands=(_WEIGHTS, _QUERIES),
        results=(_KEYS, _ADDITIONAL),
        native=_inverse_native,
    )
)


def pn(queries, keys, additional, bias, *, fill_negative_infinity=False, **params):
    """weights[x, slot] = <queries_x, keys_slot> + bias; a causal slot past the query holds -inf or 0."""
    return bind(pn_p, queries, keys, additional, bias, fill_negative_infinity=fill_negative_infinity, **params)[0]


def nn(weights, keys, additional, **params):
    """queries[x] = sum over slots of weights[x, slot] keys_slot."""
    return bind(nn_p, weights, keys, additional, **params)[0]


def inverse(weights, queries, *, group, additional, **params):
    """``(keys, additional_keys)``: keys[y] = sum over the x that see y of weights[x, slot of y] queries_x.

    ``group`` query heads share a key head (the quotient, unlike the number of key heads, is the same on every device).
    """
    return bind(inverse_p, weights, queries, group=group, additional=additional, **params)


def _inverse_like(weights, queries, keys, additional, **params):
    """``inverse`` with results like these keys, which may be undefined primals."""
    keys, additional = (x.aval if ad.is_undefined_primal(x) else x for x in (keys, additional))
    group = weights.shape[-2] // keys.shape[-2]
    return inverse(weights, queries, group=group, additional=additional.shape[1], **params)


def _given(*tangents) -> bool:
    return any(type(t) is not ad.Zero for t in tangents)


def _sum(terms, zero):
    """Sum of lists of arrays; ``zero`` where there is none."""
    if not terms:
        return [ad.Zero.from_primal_value(z) for z in zero]
    return [functools.reduce(jnp.add, column) for column in zip(*terms)]


def _pn_jvp(primals, tangents, *, fill_negative_infinity, **params):
    queries, keys, additional, bias = primals
    result = pn(*primals, fill_negative_infinity=fill_negative_infinity, **params)
    t_queries, *t_others = tangents
    terms = []
    if _given(t_queries):
        none = empty_bias(params["neighborhood"], queries.dtype)
        terms.append([pn(t_queries, keys, additional, none, **params)])
    if _given(*t_others):
        terms.append([pn(queries, *map(ad.instantiate_zeros, t_others), **params)])
    return [result], _sum(terms, [result])


def _pn_transpose(cotangents, queries, keys, additional, bias, *, fill_negative_infinity, **params):
    weights = ad.instantiate_zeros(cotangents[0])
    if ad.is_undefined_primal(queries):
        return [nn(weights, keys, additional, **params), None, None, None]
    sides = (keys, additional, bias)
    grads = [*_inverse_like(weights, queries, keys, additional, **params), None]
    if ad.is_undefined_primal(bias):
        grads[2] = bias_gradient(weights, bias.aval.shape, params["neighborhood"])
    return [None, *(g if ad.is_undefined_primal(x) else None for g, x in zip(grads, sides))]


def _nn_jvp(primals, tangents, **params):
    weights, *sides = primals
    t_weights, *t_sides = tangents
    result = nn(*primals, **params)
    terms = []
    if _given(t_weights):
        terms.append([nn(t_weights, *sides, **params)])
    if _given(*t_sides):
        terms.append([nn(weights, *map(ad.instantiate_zeros, t_sides), **params)])
    return [result], _sum(terms, [result])


def _nn_transpose(cotangents, weights, keys, additional, **params):
    queries = ad.instantiate_zeros(cotangents[0])
    if ad.is_undefined_primal(weights):
        none = empty_bias(params["neighborhood"], queries.dtype)
        return [pn(queries, keys, additional, none, **params), None, None]
    grads = _inverse_like(weights, queries, keys, additional, **params)
    return [None, *(g if ad.is_undefined_primal(x) else None for g, x in zip(grads, (keys, additional)))]


def _inverse_jvp(primals, tangents, **params):
    results = inverse(*primals, **params)
    terms = []
    for i, tangent in enumerate(tangents):
        if _given(tangent):
            terms.append(inverse(*(tangent if j == i else p for j, p in enumerate(primals)), **params))
    return results, _sum(terms, results)


def _inverse_transpose(cotangents, weights, queries, *, group, additional, **params):
    keys, extra = map(ad.instantiate_zeros, cotangents)
    if ad.is_undefined_primal(weights):
        none = empty_bias(params["neighborhood"], queries.dtype)
        return [pn(queries, keys, extra, none, **params), None]
    return [None, nn(weights, keys, extra, **params)]


ad.primitive_jvps[pn_p] = _pn_jvp
ad.primitive_transposes[pn_p] = _pn_transpose
ad.primitive_jvps[nn_p] = _nn_jvp
ad.primitive_transposes[nn_p] = _nn_transpose
ad.primitive_jvps[inverse_p] = _inverse_jvp
ad.primitive_transposes[inverse_p] = _inverse_transpose
