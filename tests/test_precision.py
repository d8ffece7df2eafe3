"""The precision of float32 products: what is asked reaches the kernels and XLA, through every transformation."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import generator
from functions import FUNCTIONS, TINY, total

import jax_natten
from jax_natten import checks, native

HIGHEST = jax.lax.Precision.HIGHEST
X = jax.ShapeDtypeStruct((2, 6, 2, 4), jnp.float32)


@pytest.fixture(autouse=True)
def both_extensions(monkeypatch):
    """Lowering only writes the calls down: where an extension was not built, pretend that it was."""
    for platform in ("cpu", "cuda"):
        monkeypatch.setattr(native, platform, getattr(native, platform) or object())


def found(function, *arguments, platform="cuda") -> set[str]:
    """The precisions of every custom call of ours, and of every matrix product, in a lowered program."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    calls = re.findall(r'precision = "(\w+)"', text)
    products = re.findall(r"dot_general.*precision = \[(\w+), (\w+)\]", text)
    plain = [line for line in text.splitlines() if "dot_general" in line and "precision" not in line]
    return {name.upper() for name in (*calls, *(p for pair in products for p in pair))} | (
        {"DEFAULT"} if plain else set()
    )


def attend(x, precision=None, implementation=None):
    return jax_natten.na1d(x, x, x, 3, precision=precision, implementation=implementation)


@pytest.mark.parametrize(
    "asked, got",
    [
        (None, "HIGHEST"),
        ("default", "DEFAULT"),
        ("fastest", "DEFAULT"),
        ("bfloat16", "DEFAULT"),
        ("high", "HIGH"),
        ("tensorfloat32", "HIGH"),
        ("highest", "HIGHEST"),
        ("float32", "HIGHEST"),
        (jax.lax.Precision.HIGH, "HIGH"),
        (jax.lax.Precision.DEFAULT, "DEFAULT"),
    ],
)
def test_what_is_asked_reaches_kernels_and_xla(asked, got):
    for implementation, platform in ((None, "cpu"), (None, "cuda"), (None, "tpu"), ("xla", "cuda")):
        assert found(lambda x: attend(x, asked, implementation), X, platform=platform) == {got}  # noqa: B023


@pytest.mark.parametrize(
    "default, got",
    [
        ("default", "DEFAULT"),
        ("tensorfloat32", "HIGH"),
        ("float32", "HIGHEST"),
        ("TF32_TF32_F32", "HIGH"),
        ("TF32_TF32_F32_X3", "HIGHEST"),
        ("BF16_BF16_F32", "DEFAULT"),
    ],
)
def test_the_default_of_jax_is_followed_when_a_function_is_traced(default, got):
    function = jax.jit(attend, static_argnums=1)
    assert found(function, X) == {"HIGHEST"}
    with jax.default_matmul_precision(default):
        assert found(function, X) == {got}
        assert found(lambda x: attend(x, "high"), X) == {"HIGH"}, "what is asked goes before the default"
    assert found(function, X) == {"HIGHEST"}


def test_every_algorithm_that_the_default_may_name_has_a_precision():
    names = jax.lax.DotAlgorithmPreset.__members__
    assert set(checks._ALGORITHMS) <= set(names)
    for name in set(names) - {"DEFAULT"}:
        with jax.default_matmul_precision(name):
            assert checks.precision(None) in jax.lax.Precision


@pytest.mark.parametrize("name", ["fused", "qk", "av"])
def test_transformations_keep_the_precision(name):
    function = FUNCTIONS[name]
    f = function.of(TINY, None, precision="high")
    operands = function.draw(TINY, dtype="float32")
    loss = lambda x: total(f(x))  # noqa: E731
    batched = {n: np.stack([x, x]) for n, x in operands.items()}
    assert found(jax.grad(loss), operands) - {"HIGHEST"} == {"HIGH"}
    assert found(jax.vmap(jax.grad(loss)), batched) - {"HIGHEST"} == {"HIGH"}
    assert found(lambda x: jax.jvp(f, (x,), (x,)), operands) == {"HIGH"}
    # The gradient of a bias sums by products with ones, always exactly.
    no_bias = {n: x for n, x in operands.items() if n != "rpb"}
    assert found(jax.grad(loss), no_bias) == {"HIGH"}
    assert found(lambda x: jax.jvp(jax.grad(loss), (x,), (x,)), no_bias) == {"HIGH"}


@pytest.mark.parametrize("wrong, error", [("exact", ValueError), (2, TypeError), (("high", "high"), TypeError)])
def test_an_unknown_precision_is_refused(wrong, error):
    x = np.zeros(X.shape, X.dtype)
    for call in (
        lambda: attend(x, wrong),
        lambda: jax_natten.na1d_qk(x, x, 3, precision=wrong),
        lambda: jax_natten.na1d_av(x[..., :3], x, 3, precision=wrong),
    ):
        with pytest.raises(error, match="precision"):
            call()


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_the_cpu_computes_in_float32_whatever_is_asked(implementation):
    x = generator("precision").standard_normal(X.shape).astype(np.float32)
    results = [attend(x, precision, implementation) for precision in ("default", "high", "highest")]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
