"""Primitives of unfused attention: three operations, closed under differentiation.

- ``pn`` (pointwise-neighborhood): weights[x, slot] = <queries_x, keys_slot> (+ bias)
- ``nn`` (neighborhood-neighborhood): queries[x] = sum over slots of weights[x, slot] keys_slot
- ``inverse`` (inverse-neighborhood): keys[y] = sum over the x that see y of weights[x, slot of y] queries_x

Each is linear in each of its two sides, and the transposes are the other two. So derivatives of every order and in both
modes are made of the same kernels. Slots are those of the window, row-major, then the additional keys. Additional keys
and bias may be absent: None here, left out among a primitive's operands (see ``factory``).
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad

from jax_natten.bias import bias_gradient
from jax_natten.dispatch import Problem
from jax_natten.primitives import cost, shim, workspace
from jax_natten.primitives.factory import (
    NativeCall,
    Operation,
    bind,
    define,
    precision_attribute,
    restored,
    window_attributes,
)
from jax_natten.xla import unfused as xla

_WEIGHTS, _QUERIES, _KEYS, _ADDITIONAL, _BIAS = "bXhw", "bXhd", "bXkd", "bskd", "ghpqr"


def problem(operation: str, dtype, heads, kv_heads, dim, additional, has_bias, neighborhood) -> Problem:
    """The case of an unfused operation, whose two sides share one head dim."""
    return Problem(operation, neighborhood, dtype, heads, kv_heads, dim, dim, additional, has_bias)


def _pn_avals(queries, keys, additional, bias, *, neighborhood, **_):
    slots = neighborhood.window_size + (0 if additional is None else additional.shape[-3])
    axes = (*range(queries.ndim - 1), None)
    return [shim.derive(queries, (*queries.shape[:-1], slots), axes=axes)]


def _pn_native(queries, keys, additional, bias, *, neighborhood, precision, fill_negative_infinity):
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
    attributes = window_attributes(neighborhood) | precision_attribute(precision)
    return NativeCall("jax_natten_pn", case, attributes | {"fill_negative_infinity": np.bool_(fill_negative_infinity)})


def _nn_avals(weights, keys, additional, **_):
    return [shim.derive(weights, (*weights.shape[:-1], keys.shape[-1]), axes=(*range(weights.ndim - 1), None))]


def _nn_native(weights, keys, additional, *, neighborhood, precision):
    heads, (kv_heads, dim) = weights.shape[-2], keys.shape[-2:]
    case = problem("nn", weights.dtype, heads, kv_heads, dim, additional.shape[1], False, neighborhood)
    return NativeCall("jax_natten_nn", case, window_attributes(neighborhood) | precision_attribute(precision))


def _inverse_avals(weights, queries, *, neighborhood, group, additional, **_):
    *rows, heads, dim = queries.shape
    first = len(rows) - neighborhood.rank  # grid axis
    kv_heads = heads // group
    extra_axes = (*range(first), None, queries.ndim - 2, queries.ndim - 1)
    return [
        shim.derive(queries, (*rows, kv_heads, dim)),
        shim.derive(queries, (*rows[:first], additional, kv_heads, dim), axes=extra_axes),
    ]


def _inverse_native(weights, queries, *, neighborhood, precision, group, additional):
    heads, dim = queries.shape[-2:]
    kv_heads = heads // group
    case = problem("in", queries.dtype, heads, kv_heads, dim, additional, False, neighborhood)
    attributes = window_attributes(neighborhood) | precision_attribute(precision)
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
    keys, additional = (x.aval if _linear(x) else x for x in (keys, additional))
    group, count = weights.shape[-2] // keys.shape[-2], 0 if additional is None else additional.shape[-3]
    return inverse(weights, queries, group=group, additional=count, **params)


def _linear(x) -> bool:
    return x is not None and ad.is_undefined_primal(x)


def _given(*tangents) -> bool:
    return any(t is not None and type(t) is not ad.Zero for t in tangents)


def _instantiated(tangents):
    return [None if t is None else ad.instantiate_zeros(t) for t in tangents]


def _sum(terms, results):
    """Sums lists of tangents; symbolic zeros like ``results`` where there is none."""
    if not terms:
        return [ad.Zero.from_primal_value(r) for r in results]
    return [functools.reduce(jnp.add, column) for column in zip(*terms)]


def _pn_jvp(primals, tangents, *, present, fill_negative_infinity, **params):
    queries, *sides = restored(primals, present)
    t_queries, *t_sides = restored(tangents, present)
    result = pn(queries, *sides, fill_negative_infinity=fill_negative_infinity, **params)
    terms = []  # the tangent of a -inf slot is zero
    if _given(t_queries):
        keys, additional, _ = sides
        terms.append([pn(t_queries, keys, additional, None, **params)])
    if _given(*t_sides):
        terms.append([pn(queries, *_instantiated(t_sides), **params)])
    return [result], _sum(terms, [result])


def _pn_transpose(cotangents, *operands, present, fill_negative_infinity, **params):
    queries, *sides = restored(operands, present)
    keys, additional, bias = sides
    weights = ad.instantiate_zeros(cotangents[0])
    if _linear(queries):
        return [nn(weights, keys, additional, **params)] + [None] * (len(operands) - 1)
    grads = [*_inverse_like(weights, queries, keys, additional, **params), None]
    if _linear(bias):
        grads[2] = bias_gradient(weights, bias.aval.shape, params["neighborhood"])
    return [None, *(g if _linear(x) else None for g, x in zip(grads, sides) if x is not None)]


def _nn_jvp(primals, tangents, *, present, **params):
    weights, *sides = restored(primals, present)
    t_weights, *t_sides = restored(tangents, present)
    result = nn(weights, *sides, **params)
    terms = []
    if _given(t_weights):
        terms.append([nn(t_weights, *sides, **params)])
    if _given(*t_sides):
        terms.append([nn(weights, *_instantiated(t_sides), **params)])
    return [result], _sum(terms, [result])


def _nn_transpose(cotangents, *operands, present, **params):
    weights, *sides = restored(operands, present)
    keys, additional = sides
    queries = ad.instantiate_zeros(cotangents[0])
    if _linear(weights):
        return [pn(queries, keys, additional, None, **params)] + [None] * (len(operands) - 1)
    grads = _inverse_like(weights, queries, keys, additional, **params)
    return [None, *(g if _linear(x) else None for g, x in zip(grads, sides) if x is not None)]


def _inverse_jvp(primals, tangents, *, present, **params):
    results = inverse(*primals, **params)
    terms = []
    for i, tangent in enumerate(tangents):
        if _given(tangent):
            terms.append(inverse(*(tangent if j == i else p for j, p in enumerate(primals)), **params))
    return results, _sum(terms, results)


def _inverse_transpose(cotangents, weights, queries, *, present, group, additional, **params):
    keys, extra = map(ad.instantiate_zeros, cotangents)
    extra = extra if additional else None
    if _linear(weights):
        return [pn(queries, keys, extra, None, **params), None]
    return [None, nn(weights, keys, extra, **params)]


def _flops(weights, rows, neighborhood):
    """One product over the channels of ``rows`` per slot that holds a key."""
    additional = weights.shape[-1] - neighborhood.window_size
    return cost.flops("av", neighborhood, weights.shape[:-1], additional=additional, value_dim=rows.shape[-1])


cost.register(pn_p, lambda operands, results, _, neighborhood: _flops(results[0], operands[0], neighborhood))
cost.register(nn_p, lambda operands, results, _, neighborhood: _flops(operands[0], results[0], neighborhood))
cost.register(inverse_p, lambda operands, results, _, neighborhood: _flops(operands[0], operands[1], neighborhood))

ad.primitive_jvps[pn_p] = _pn_jvp
ad.primitive_transposes[pn_p] = _pn_transpose
ad.primitive_jvps[nn_p] = _nn_jvp
ad.primitive_transposes[nn_p] = _nn_transpose
ad.primitive_jvps[inverse_p] = _inverse_jvp
ad.primitive_transposes[inverse_p] = _inverse_transpose
