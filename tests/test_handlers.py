"""Custom calls whose buffers do not match return an error status that names the buffer; they never crash."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_natten import native
from jax_natten.primitives import workspace

pytestmark = pytest.mark.skipif(native.cpu is None, reason="the CPU extension is not built")

B, X, HQ, HKV, D, DV, S = 3, (6, 7), 4, 2, 5, 3, 2
WINDOW = {
    "kernel_size": np.array([3, 4], np.int64),
    "stride": np.array([1, 2], np.int64),
    "dilation": np.array([2, 1], np.int64),
    "is_causal": np.array([0, 0], np.int64),
}
SLOTS = 12 + S
F, A = jnp.float32, jnp.float32

QUERY, KEY, VALUE = (B, *X, HQ, D), (B, *X, HKV, D), (B, *X, HKV, DV)
OUT, LSE = (B, *X, HQ, DV), (B, *X, HQ)
MORE_KEYS, MORE_VALUES, BIAS = (B, S, HKV, D), (B, S, HKV, DV), (1, HQ, 5, 7)
INPUTS = {
    "query": QUERY,
    "key": KEY,
    "value": VALUE,
    "additional_keys": MORE_KEYS,
    "additional_values": MORE_VALUES,
    "bias": BIAS,
}


def _workspace(function, *arguments):
    structs = [jax.ShapeDtypeStruct(a, F) if isinstance(a, tuple) else a for a in arguments]
    return (function(*structs),)


# Target: (operands, results, attributes), each buffer by name.
CALLS = {
    "jax_natten_fused_forward": (INPUTS, {"out": OUT, "lse": LSE}, {"scale": np.float64(0.5)}),
    "jax_natten_fused_backward": (
        INPUTS | {"out": OUT, "lse": LSE, "d_out": OUT, "d_lse": LSE},
        {f"d_{name}": shape for name, shape in INPUTS.items()}
        | {"workspace": _workspace(workspace.fused_backward, QUERY, VALUE, MORE_KEYS, BIAS)},
        {"scale": np.float64(0.5)},
    ),
    "jax_natten_pn": (
        {"queries": QUERY, "keys": KEY, "additional_keys": MORE_KEYS, "bias": BIAS},
        {"weights": (B, *X, HQ, SLOTS)},
        {"fill_negative_infinity": np.bool_(True)},
    ),
    "jax_natten_nn": (
        {"weights": (B, *X, HQ, SLOTS), "keys": KEY, "additional_keys": MORE_KEYS},
        {"queries": QUERY},
        {},
    ),
    "jax_natten_in": (
        {"weights": (B, *X, HQ, SLOTS), "queries": QUERY},
        {"keys": KEY, "additional_keys": MORE_KEYS, "workspace": _workspace(workspace.inverse, QUERY, HKV, S)},
        {},
    ),
}


def call(target, operands=None, results=None, attributes=None, remove=()):
    """Calls a target directly with some shapes, dtypes or attributes replaced."""
    right_operands, right_results, right_attributes = CALLS[target]

    def buffers(right, changed):
        described = {name: jax.ShapeDtypeStruct(shape, F) for name, shape in right.items()} | (changed or {})
        return [struct for name, struct in described.items() if name not in remove]

    arguments = [np.ones(s.shape, s.dtype) for s in buffers(right_operands, operands)]
    shapes = tuple(buffers(right_results, results))
    named = WINDOW | right_attributes | {"implementation": "cpu", "precision": "highest"} | (attributes or {})
    named = {name: value for name, value in named.items() if name not in remove}
    return jax.block_until_ready(jax.ffi.ffi_call(target, shapes)(*arguments, **named))


def assert_refused(target, *words, **changes):
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        call(target, **changes)
    message = str(raised.value)
    assert "INVALID_ARGUMENT" in message and target in message, message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


EVERY_BUFFER = [
    pytest.param(target, kind, name, shape, id=f"{target.removeprefix('jax_natten_')}-{kind}-{name}")
    for target, (operands, results, _) in CALLS.items()
    for kind, table in (("operands", operands), ("results", results))
    for name, shape in table.items()
]


@pytest.mark.parametrize("target", CALLS)
def test_a_call_that_matches_succeeds(target):
    for result in call(target):
        assert result.dtype == jnp.float32


@pytest.mark.parametrize("target, kind, name, shape", EVERY_BUFFER)
def test_a_buffer_of_another_shape_or_dtype_is_refused(target, kind, name, shape):
    changed = {
        "fewer axes": jax.ShapeDtypeStruct(shape[:-1], F),
        "more axes": jax.ShapeDtypeStruct((*shape, 1), F),
        "integers": jax.ShapeDtypeStruct(shape, jnp.int32),
        "another float": jax.ShapeDtypeStruct(shape, jnp.bfloat16),
    }
    for axis, length in enumerate(shape):
        longer = (*shape[:axis], length + 1, *shape[axis + 1 :])
        if name != "workspace":  # which may be larger than needed
            changed[f"axis {axis} longer"] = jax.ShapeDtypeStruct(longer, F)
        shorter = (*shape[:axis], length - 1, *shape[axis + 1 :])
        changed[f"axis {axis} shorter"] = jax.ShapeDtypeStruct(shorter, F)
    for what, struct in changed.items():
        try:
            assert_refused(target, **{kind: {name: struct}})
        except BaseException as error:
            error.add_note(f"{name} with {what}")
            raise


@pytest.mark.parametrize("target", CALLS)
def test_a_missing_buffer_is_refused(target):
    operands, results, _ = CALLS[target]
    assert_refused(target, remove=(list(operands)[-1],))
    if len(results) > 1:  # XLA removes a call without results
        assert_refused(target, remove=(list(results)[-1],))


@pytest.mark.parametrize("target", CALLS)
def test_a_surplus_buffer_is_refused(target):
    assert_refused(target, "operands", operands={"surplus": jax.ShapeDtypeStruct((2,), F)})
    assert_refused(target, "results", results={"surplus": jax.ShapeDtypeStruct((2,), F)})


def _ints(*values):
    return np.array(values, np.int64)


BAD_ATTRIBUTES = {
    "window too long": ({"kernel_size": _ints(3, 8)}, ["kernel_size", "8", "7", "axis 1"]),
    "dilated window too long": ({"dilation": _ints(3, 1)}, ["kernel_size * dilation", "3 * 3", "6", "axis 0"]),
    "huge dilation": ({"dilation": _ints(2**62, 1)}, ["dilation"]),
    "huge window": ({"kernel_size": _ints(2**62, 4)}, ["kernel_size"]),
    "window of zero": ({"kernel_size": _ints(0, 4)}, ["kernel_size", "0"]),
    "negative window": ({"kernel_size": _ints(-3, 4)}, ["kernel_size", "-3"]),
    "stride above the window": ({"stride": _ints(1, 5)}, ["stride", "5", "4"]),
    "stride of zero": ({"stride": _ints(0, 1)}, ["stride", "0"]),
    "negative dilation": ({"dilation": _ints(1, -1)}, ["dilation", "-1"]),
    "causal of two": ({"is_causal": _ints(0, 2)}, ["is_causal", "2"]),
    "no axes": ({name: _ints() for name in WINDOW}, ["kernel_size", "0 entries"]),
    "four axes": ({name: _ints(1, 1, 1, 1) for name in WINDOW}, ["kernel_size", "4 entries"]),
    "another rank": ({name: _ints(1) for name in WINDOW}, ["rank"]),
    "strides of another rank": ({"stride": _ints(1)}, ["stride", "1"]),
    "causal axes of another rank": ({"is_causal": _ints(0, 0, 0)}, ["is_causal", "3"]),
    "int32 window": ({"kernel_size": np.array([3, 4], np.int32)}, ["kernel_size"]),
    "window of floats": ({"kernel_size": np.array([3.0, 4.0])}, ["kernel_size"]),
    "scalar stride": ({"stride": np.int64(1)}, ["stride"]),
    "implementation of another platform": ({"implementation": "naive"}, ["implementation", "naive"]),
    "empty implementation": ({"implementation": ""}, ["implementation"]),
    "implementation of an int": ({"implementation": np.int64(1)}, ["implementation"]),
    "unknown precision": ({"precision": "exact"}, ["precision", "exact", "highest"]),
    "precision of an int": ({"precision": np.int64(2)}, ["precision"]),
    "surplus attribute": ({"tile": np.int64(8)}, ["attributes"]),
}


@pytest.mark.parametrize("name", BAD_ATTRIBUTES)
def test_a_bad_attribute_is_refused(name):
    attributes, words = BAD_ATTRIBUTES[name]
    for target in CALLS:
        with pytest.raises(jax.errors.JaxRuntimeError) as raised:
            call(target, attributes=attributes)
        message = str(raised.value)
        assert "INVALID_ARGUMENT" in message, message
        assert all(word in message for word in words), message


@pytest.mark.parametrize("target", CALLS)
def test_a_missing_attribute_is_refused(target):
    for name in (*WINDOW, *CALLS[target][2], "precision", "implementation"):
        assert_refused(target, name, remove=(name,))


def test_attributes_of_the_wrong_type_are_refused():
    # Numbers that equal no other: JAX finds compiled calls by the values of attributes, and 1 == 1.0 == True.
    for scale in (np.float32(1.5), np.int64(7), "one"):
        assert_refused("jax_natten_fused_forward", "scale", attributes={"scale": scale})
    for fill in (np.int64(5), np.float64(2.5)):
        assert_refused("jax_natten_pn", "fill_negative_infinity", attributes={"fill_negative_infinity": fill})


@pytest.mark.parametrize("name", ["tiles", "sm80_tiles"])
def test_the_forward_may_be_asked_for_tiles_and_other_calls_may_not(name):
    tiles = {name: np.arange(1, 14, dtype=np.int64)}
    without, asked = (call("jax_natten_fused_forward", attributes=a) for a in ({}, tiles))  # "cpu" does as it likes
    np.testing.assert_array_equal(asked[0], without[0])
    assert_refused("jax_natten_fused_forward", name, attributes={name: np.array([1.5, 2.5])})
    for target in CALLS:
        if target != "jax_natten_fused_forward":
            assert_refused(target, "attributes", attributes=tiles)


def test_heads_that_do_not_divide_are_refused():
    key, value = (B, *X, 3, D), (B, *X, 3, DV)
    more = {"additional_keys": (B, S, 3, D), "additional_values": (B, S, 3, DV)}
    changed = {n: jax.ShapeDtypeStruct(s, F) for n, s in ({"key": key, "value": value} | more).items()}
    assert_refused("jax_natten_fused_forward", "heads = 4", "kv_heads = 3", operands=changed)


def test_the_batch_of_a_bias_must_divide_the_batch():
    assert_refused(
        "jax_natten_fused_forward", "bias", "2", "3", operands={"bias": jax.ShapeDtypeStruct((2, HQ, 5, 7), F)}
    )
    call("jax_natten_fused_forward", operands={"bias": jax.ShapeDtypeStruct((3, HQ, 5, 7), F)})


def test_a_short_workspace_is_refused_and_a_long_one_is_not():
    for target in ("jax_natten_fused_backward", "jax_natten_in"):
        (size,) = CALLS[target][1]["workspace"]
        for wrong in (0, size // 2, size - 1):
            assert_refused(target, "workspace", results={"workspace": jax.ShapeDtypeStruct((wrong,), F)})
        call(target, results={"workspace": jax.ShapeDtypeStruct((size + 100,), F)})


def test_the_backward_reserves_a_second_number_per_query_and_head_for_halves_and_runs_without_it():
    """Programs of earlier versions reserve one."""
    target = "jax_natten_fused_backward"
    operands, results, _ = CALLS[target]
    single = {"lse", "d_lse", "bias", "d_bias", "workspace"}

    def halves(shapes):
        return {n: jax.ShapeDtypeStruct(s, A if n in single else jnp.bfloat16) for n, s in shapes.items()}

    (earlier,) = results["workspace"]
    described = halves(operands)
    now = workspace.fused_backward(*(described[n] for n in ("query", "value", "additional_keys", "bias")))
    assert now == earlier + B * np.prod(X) * HQ
    for size in (earlier, now):
        buffers = halves(results) | {"workspace": jax.ShapeDtypeStruct((size,), A)}
        call(target, operands=described, results=buffers)
    assert_refused(
        target,
        "workspace",
        operands=described,
        results=halves(results) | {"workspace": jax.ShapeDtypeStruct((earlier - 1,), A)},
    )


def test_an_error_inside_jit_is_raised_to_the_caller_and_the_next_call_works():
    target = "jax_natten_nn"
    with pytest.raises(jax.errors.JaxRuntimeError, match="stride"):
        jax.jit(lambda: call(target, attributes={"stride": _ints(4, 1)}))()
    call(target)
