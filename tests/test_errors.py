"""Wrong arguments: what is raised, and the words that a reader needs to find the mistake."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_natten as jn
from jax_natten import Neighborhood, reference


def _array(*shape, dtype=np.float32):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


# A 1-D and a 2-D call that are right: [B, *X, heads, D].
Q1, K1, V1 = _array(2, 12, 4, 8), _array(2, 12, 2, 8), _array(2, 12, 2, 5)
Q2, K2, V2 = _array(2, 6, 7, 4, 8), _array(2, 6, 7, 2, 8), _array(2, 6, 7, 2, 5)
AK, AV = _array(2, 3, 2, 8), _array(2, 3, 2, 5)
W1 = _array(2, 12, 4, 5)


def _na1d(**changes):
    arguments = {"query": Q1, "key": K1, "value": V1, "kernel_size": 5} | changes
    return lambda: jn.na1d(**arguments)


def _na2d(**changes):
    arguments = {"query": Q2, "key": K2, "value": V2, "kernel_size": (3, 4)} | changes
    return lambda: jn.na2d(**arguments)


def _qk(**changes):
    arguments = {"query": Q1, "key": K1, "kernel_size": 5} | changes
    return lambda: jn.na1d_qk(**arguments)


def _av(**changes):
    arguments = {"attn": W1, "value": V1, "kernel_size": 5} | changes
    return lambda: jn.na1d_av(**arguments)


def _traced_scale():
    return jax.jit(lambda s: jn.na1d(Q1, K1, V1, 5, scale=s))(0.5)


def _traced_kernel_size():
    return jax.jit(lambda k: jn.na1d(Q1, K1, V1, k))(5)


# Name: (call, error, words that the message must hold).
BAD_CALLS = {
    # Windows
    "window longer than the axis": (
        _na1d(kernel_size=13),
        ValueError,
        ["kernel_size", "dilation", "13", "12", "axis 0"],
    ),
    "dilated window longer than the axis": (_na2d(dilation=(1, 2)), ValueError, ["4 * 2", "7", "axis 1"]),
    "stride above the window": (_na2d(stride=(1, 5)), ValueError, ["stride 5", "kernel_size 4", "axis 1"]),
    "window of zero": (_na1d(kernel_size=0), ValueError, ["kernel_size", "at least 1", "0"]),
    "negative window": (_na1d(kernel_size=-3), ValueError, ["kernel_size", "at least 1", "-3"]),
    "stride of zero": (_na1d(stride=0), ValueError, ["stride", "at least 1"]),
    "dilation of zero": (_na2d(dilation=(1, 0)), ValueError, ["dilation", "at least 1"]),
    "window of a float": (_na1d(kernel_size=5.0), TypeError, ["kernel_size", "integer", "5.0"]),
    "window of a string": (_na1d(kernel_size="5"), (TypeError, ValueError), ["kernel_size", "'5'"]),
    "window of a bool": (_na1d(kernel_size=True), TypeError, ["kernel_size", "integer", "True"]),
    "window of None": (_na1d(kernel_size=None), TypeError, ["kernel_size", "None"]),
    "window of an array": (_na2d(kernel_size=np.array([3, 4])), TypeError, ["kernel_size"]),
    "traced window": (_traced_kernel_size, TypeError, ["kernel_size", "trace time"]),
    "stride of a float": (_na2d(stride=(1, 1.5)), TypeError, ["stride", "integer", "1.5"]),
    "dilation of a string": (_na1d(dilation="2"), TypeError, ["dilation", "'2'"]),
    "causal by an int": (_na1d(is_causal=1), TypeError, ["is_causal", "bool", "1"]),
    "causal by a string": (_na2d(is_causal=("yes", "no")), TypeError, ["is_causal", "bool", "yes"]),
    "too many windows": (_na2d(kernel_size=(3, 3, 3)), ValueError, ["kernel_size", "2 entries", "(3, 3, 3)"]),
    "too few windows": (_na2d(kernel_size=(3,)), ValueError, ["kernel_size", "2 entries", "(3,)"]),
    "too many strides": (_na2d(stride=(1, 1, 1)), ValueError, ["stride", "2 entries", "(1, 1, 1)"]),
    "too few causal axes": (_na2d(is_causal=(True,)), ValueError, ["is_causal", "2 entries"]),
    "four axes": (
        lambda: jn.neighborhood_attention(Q2, K2, V2, (2, 2, 2, 2)),
        ValueError,
        ["kernel_size", "1, 2 or 3", "(2, 2, 2, 2)"],
    ),
    "no axes": (lambda: jn.neighborhood_attention(Q2, K2, V2, ()), ValueError, ["kernel_size", "1, 2 or 3"]),
    # Arrays
    "list as query": (_na1d(query=Q1.tolist()), TypeError, ["query", "array", "list"]),
    "None as value": (_na1d(value=None), TypeError, ["value", "array", "NoneType"]),
    "integers": (_na1d(query=Q1.astype(np.int32)), TypeError, ["query", "int32", "float32"]),
    "complex": (_na1d(key=K1.astype(np.complex64)), TypeError, ["key", "complex64"]),
    "float8": (_na1d(value=jnp.asarray(V1, jnp.float8_e4m3fn)), TypeError, ["value", "float8_e4m3fn"]),
    "mixed dtypes": (_na1d(key=K1.astype(np.float16)), TypeError, ["key", "float32", "float16"]),
    "value of another dtype": (_na1d(value=V1.astype(np.float64)), TypeError, ["value", "float32", "float64"]),
    "query of too few axes": (_na2d(query=Q2[0, 0]), ValueError, ["query", "[*batch, X, Y, heads, dim]", "(7, 4, 8)"]),
    "key of another rank": (_na1d(key=K1[0]), ValueError, ["key", "query", "(12, 2, 8)"]),
    "key of another length": (_na1d(key=K1[:, :11]), ValueError, ["key", "(2, 12)", "(2, 11, 2, 8)"]),
    "key of another batch": (_na2d(key=K2[:1]), ValueError, ["key", "query", "(1, 6, 7, 2, 8)"]),
    "value of another length": (_na1d(value=V1[:, 1:]), ValueError, ["value", "key", "(2, 11, 2, 5)"]),
    "key of another head dim": (_na1d(key=K1[..., :7]), ValueError, ["key", "8", "(2, 12, 2, 7)"]),
    "heads that do not divide": (
        _na1d(key=_array(2, 12, 3, 8), value=_array(2, 12, 3, 5)),
        ValueError,
        ["query", "multiple", "4", "3"],
    ),
    "more key heads than query heads": (_na1d(query=Q1[:, :, :1]), ValueError, ["multiple", "1", "2"]),
    "value of other heads": (_na1d(value=_array(2, 12, 4, 5)), ValueError, ["value", "heads", "2", "(2, 12, 4, 5)"]),
    "no heads": (_na1d(query=Q1[:, :, :0]), ValueError, ["query", "head", "(2, 12, 0, 8)"]),
    "no channels": (_na1d(query=Q1[..., :0], key=K1[..., :0]), ValueError, ["query", "channel", "(2, 12, 4, 0)"]),
    "no value channels": (_na1d(value=V1[..., :0]), ValueError, ["value", "channel", "(2, 12, 2, 0)"]),
    "no key heads": (_na1d(key=K1[:, :, :0], value=V1[:, :, :0]), ValueError, ["multiple", "key", "0"]),
    # Additional keys and values
    "additional keys alone": (
        _na1d(additional_keys=AK),
        ValueError,
        ["additional_keys", "additional_values", "together"],
    ),
    "additional values alone": (_na1d(additional_values=AV), ValueError, ["additional_keys", "together"]),
    "additional keys of another head dim": (
        _na1d(additional_keys=AK[..., :4], additional_values=AV),
        ValueError,
        ["additional_keys", "(2, S, 2, 8)", "(2, 3, 2, 4)"],
    ),
    "additional keys of another batch": (
        _na1d(additional_keys=AK[:1], additional_values=AV[:1]),
        ValueError,
        ["additional_keys", "(2, S, 2, 8)", "(1, 3, 2, 8)"],
    ),
    "additional values of other heads": (
        _na1d(additional_keys=AK, additional_values=_array(2, 3, 4, 5)),
        ValueError,
        ["additional_values", "(2, S, 2, 5)", "(2, 3, 4, 5)"],
    ),
    "additional lengths that differ": (
        _na1d(additional_keys=AK, additional_values=AV[:, :2]),
        ValueError,
        ["additional_keys", "additional_values", "same length", "[3, 2]"],
    ),
    "additional keys of another dtype": (
        _na1d(additional_keys=AK.astype(np.float16), additional_values=AV),
        TypeError,
        ["additional_keys", "float32", "float16"],
    ),
    "additional keys without a batch axis": (
        _na1d(additional_keys=AK[0], additional_values=AV[0]),
        ValueError,
        ["additional_keys", "(3, 2, 8)"],
    ),
    # Bias and scale
    "bias of another size": (_na2d(rpb=_array(4, 5, 6)), ValueError, ["rpb", "(4, 5, 7)", "(4, 5, 6)"]),
    "bias of the key's heads": (_na2d(rpb=_array(2, 5, 7)), ValueError, ["rpb", "(4, 5, 7)", "(2, 5, 7)"]),
    "bias of another rank": (_na1d(rpb=_array(4, 9, 1)), ValueError, ["rpb", "(4, 9)", "(4, 9, 1)"]),
    "bias of integers": (_na1d(rpb=np.ones((4, 9), np.int32)), TypeError, ["rpb", "floating", "int32"]),
    "bias of a list": (_na1d(rpb=[0.0] * 9), TypeError, ["rpb", "array", "list"]),
    "bias with a causal axis": (
        _na2d(rpb=_array(4, 5, 7), is_causal=(False, True)),
        ValueError,
        ["rpb", "causal", "(False, True)"],
    ),
    "traced scale": (_traced_scale, TypeError, ["scale", "trace time", "query"]),
    "scale of a string": (_na1d(scale="auto"), TypeError, ["scale", "number", "auto"]),
    "scale of a bool": (_na1d(scale=True), TypeError, ["scale", "number", "True"]),
    "scale of an array": (_na1d(scale=np.ones(4)), TypeError, ["scale", "number"]),
    "complex scale": (_na1d(scale=1j), TypeError, ["scale", "number", "1j"]),
    "infinite scale": (_na1d(scale=float("inf")), ValueError, ["scale", "finite", "inf"]),
    "scale of NaN": (_na1d(scale=float("nan")), ValueError, ["scale", "finite", "nan"]),
    # Implementations
    "unknown implementation": (_na1d(implementation="triton"), ValueError, ["implementation", "triton", "cpu", "xla"]),
    "no implementation": (_na1d(implementation=()), ValueError, ["implementation", "naive"]),
    "one unknown among implementations": (_qk(implementation=("cpu", "gpu")), ValueError, ["implementation", "gpu"]),
    "implementation of an int": (_na1d(implementation=1), TypeError, ["implementation", "name", "1"]),
    "implementations of ints": (_av(implementation=(1, 2)), TypeError, ["implementation", "name"]),
    "implementation of another platform": (
        _na1d(implementation="naive"),
        NotImplementedError,
        ["naive", "cuda", "platform 'cpu'"],
    ),
    "kernel that does not take the dtype": (_na1d(implementation="sm90"), NotImplementedError, ["sm90", "float16"]),
    # Unfused
    "scores with a window too long": (_qk(kernel_size=7, dilation=2), ValueError, ["7 * 2", "12", "axis 0"]),
    "scores of mixed dtypes": (_qk(key=K1.astype(np.float16)), TypeError, ["key", "float16", "float32"]),
    "scores of other grids": (_qk(key=K1[:, 2:]), ValueError, ["key", "query", "(2, 10, 2, 8)"]),
    "scores of other head dims": (_qk(key=K1[..., :2]), ValueError, ["key", "8", "(2, 12, 2, 2)"]),
    "scores of heads that do not divide": (_qk(key=_array(2, 12, 3, 8)), ValueError, ["multiple", "4", "3"]),
    "scores with bias and causal axes": (_qk(rpb=_array(4, 9), is_causal=True), ValueError, ["rpb", "causal"]),
    "scores with bad additional keys": (
        _qk(additional_keys=AK[..., :4]),
        ValueError,
        ["additional_keys", "(2, 3, 2, 4)"],
    ),
    "weights of too few slots": (_av(attn=W1[..., :4]), ValueError, ["attn", "5 + 0", "(2, 12, 4, 4)"]),
    "weights without additional slots": (_av(additional_values=AV), ValueError, ["attn", "5 + 3", "(2, 12, 4, 5)"]),
    "weights of other heads": (_av(attn=W1[:, :, :3]), ValueError, ["attn", "multiple", "3", "2"]),
    "weights of another grid": (_av(attn=W1[:, 1:]), ValueError, ["value", "attn", "(2, 12, 2, 5)"]),
    "weights of integers": (_av(attn=W1.astype(np.int64)), TypeError, ["attn", "int64"]),
    "weights of another dtype": (_av(value=V1.astype(np.float64)), TypeError, ["value", "float64", "float32"]),
    "weighted sum with a long stride": (_av(stride=6), ValueError, ["stride 6", "kernel_size 5"]),
    "weights of a list": (_av(attn=W1.tolist()), TypeError, ["attn", "array", "list"]),
    # Neighborhood and merging
    "neighborhood of a ragged grid": (
        lambda: Neighborhood.make((3, 3)).check_grid((9,)),
        ValueError,
        ["kernel_size", "2 grid axes", "(9,)"],
    ),
    "neighborhood too long": (
        lambda: Neighborhood.make(2).check_grid((2**40,)),
        ValueError,
        ["axis 0", str(2**40)],
    ),
    "neighborhood of rank 4": (lambda: Neighborhood.make(3, rank=4), ValueError, ["1, 2 or 3"]),
    "merge of nothing": (lambda: jn.merge_attentions([], []), ValueError, ["outputs", "lses", "at least one"]),
    "merge of unequal counts": (
        lambda: jn.merge_attentions([V1, V1], [V1[..., 0]]),
        ValueError,
        ["outputs", "lses", "2", "1"],
    ),
    "merge of other shapes": (
        lambda: jn.merge_attentions([V1, V1[:, :5]], [V1[..., 0], V1[:, :5, :, 0]]),
        ValueError,
        ["outputs", "(2, 12, 2, 5)", "(2, 5, 2, 5)"],
    ),
    "merge with a wrong LSE": (
        lambda: jn.merge_attentions([V1], [V1[..., 0, 0]]),
        ValueError,
        ["lses", "(2, 12, 2, 5)", "(2, 12)"],
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_raises_and_says_why(name):
    call, error, words = BAD_CALLS[name]
    with pytest.raises(error) as raised:
        call()
    # jax.errors.TracerError and the like are TypeErrors too, but do not speak of our arguments.
    assert not isinstance(raised.value, jax.errors.ConcretizationTypeError)
    message = str(raised.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


def test_the_table_is_long_enough():
    assert len(BAD_CALLS) >= 40


@pytest.mark.parametrize("call", [_na1d(), _na2d(), _qk(), _av()])
def test_the_unchanged_calls_are_right(call):
    call()


def test_bad_calls_raise_under_tracing_too():
    with pytest.raises(ValueError, match="axis 0"):
        jax.eval_shape(lambda q: jn.na1d(q, q, q, 13), jax.ShapeDtypeStruct((2, 12, 4, 8), jnp.float32))
    with pytest.raises(ValueError, match="multiple"):
        jax.jit(jax.grad(lambda q: jn.na1d(q, K1[:, :, :0], V1[:, :, :0], 3).sum()))(Q1)


def test_a_named_implementation_that_cannot_run_lists_every_limit():
    with pytest.raises(NotImplementedError, match=r"sm90.*sm80"):
        jn.na1d(Q1, K1, V1, 5, implementation=("sm90", "sm80"))
    # One that can comes to its rescue.
    np.testing.assert_allclose(
        jn.na1d(Q1, K1, V1, 5, implementation=("sm90", "naive", "xla")),
        reference.attention(Q1, K1, V1, Neighborhood.make(5), 8**-0.5)[0],
        rtol=1e-4,
        atol=1e-5,
    )


def test_missing_and_surplus_arguments_are_python_type_errors():
    with pytest.raises(TypeError, match="kernel_size"):
        jn.na1d(Q1, K1, V1)
    with pytest.raises(TypeError, match="window_size"):
        jn.na2d(Q2, K2, V2, 3, window_size=3)
