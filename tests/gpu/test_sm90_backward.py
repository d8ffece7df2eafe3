"""The Hopper backward keeps the promises of "sm90", through JAX: its gradients are right, and the same in every run."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import Case, draw, expected_fused, fused, jitted_fused
from hopper import (
    CHUNK,
    DIMS,
    DTYPES,
    HARD_CASES,
    MARKS,
    RANDOM,
    captured_and_plain,
    ends_of_long_results,
    every_rank,
    extended,
    random_cases,
)
from problems import HARD, LARGE, SMALL, problem
from tolerance import FEW, assert_as_good_as_plain, relative_error

import jax_natten

pytestmark = MARKS

# Against the same gradients in float32, of results that are rounded once and products of rounded weights.
GRADIENT_ERROR = {"bfloat16": 1e-2, "float16": 2e-3}


def check(case: Case) -> None:
    """Gradients of one case, with cotangents of out and of lse, against the float64 oracle."""
    operands, cotangents, exact, plain, magnitudes = expected_fused(case)
    results = jitted_fused(case, "sm90")(operands, cotangents)
    for name in (f"d_{x}" for x in operands):
        assert results[name].dtype == jnp.dtype(case.dtype)
        assert_as_good_as_plain(
            results[name], exact[name], plain[name], name=name, dtype=case.dtype, magnitude=magnitudes.get(name, 0.0)
        )


@pytest.mark.parametrize("case", HARD_CASES, ids=lambda c: c.name)
def test_hard_problems(case):
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_every_head_dim_in_every_rank(dim, dtype):
    for case in every_rank(dim, dtype):
        check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 32, 64, 96, 128, 192, 256])
def test_additional_keys_and_bias(dim, dtype):
    for case in extended(dim, dtype):
        check(case)


@pytest.mark.parametrize("additional", [1, 64, 65, 200, 700])
@pytest.mark.parametrize("dim", [64, 128, 192])
def test_any_number_of_additional_keys(additional, dim):
    """Few enough for one part of a tile, or more than there are queries; of which there may be several chunks."""
    check(Case(problem("many", 1, 4, 2, dim, [29, 23], [7, 5]), "bfloat16", additional=additional))


@pytest.mark.parametrize("scale", [0.0, -0.75, 2.0])
@pytest.mark.parametrize("dim", [32, 128])
def test_scale_is_honoured(scale, dim):
    shape = problem("scale", 2, 4, 2, dim, [21, 19], [7, 5], [2, 1], [1, 2])
    for additional in (0, 5):
        check(Case(shape, "float16", scale=scale, additional=additional))


@pytest.mark.parametrize("scale", [0.0, -0.75, 2.0])
@pytest.mark.parametrize("dim", [32, 96])
def test_scale_does_not_meet_the_bias(scale, dim):
    shape = problem("scale", 2, 4, 2, dim, [21, 19], [7, 5], [2, 1], [1, 2])
    check(Case(shape, "float16", scale=scale, bias=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_keys_shared_by_query_heads(group, dtype):
    check(Case(problem(f"group{group}", 2, 2 * group, 2, 64, [18, 21], [7, 9], [1, 2]), dtype))


@pytest.mark.parametrize("dim", [64, 128])
def test_grad_of_a_loss_of_the_output_alone(dim):
    """``jax.grad``, without a cotangent of the log-sum-exp."""
    case = Case(problem("loss", 2, 4, 2, dim, [24, 20], [7, 9], [1, 3], [2, 1]), "bfloat16")
    operands, (d_out, d_lse) = draw(case)

    def loss(implementation):
        def run(x):
            out = jax_natten.neighborhood_attention(**x, **case.problem.window, implementation=implementation)
            return jnp.vdot(out.astype(jnp.float32), d_out.astype(jnp.float32))

        return run

    results = jax.jit(jax.grad(loss("sm90")))(operands)
    expected = jitted_fused(case, "naive")(operands, (d_out, np.zeros_like(d_lse)))
    for name, x in results.items():
        assert relative_error(x, expected[f"d_{name}"]) < GRADIENT_ERROR["bfloat16"], name


def check_against_naive(case: Case) -> None:
    """Against "naive" in float32 on the same device."""
    operands, (d_out, d_lse) = draw(case)
    results = jitted_fused(case, "sm90")(operands, (d_out, d_lse))
    wide = {name: x.astype(np.float32) for name, x in operands.items()}
    widened = dataclasses.replace(case, dtype="float32")
    expected = jitted_fused(widened, "naive")(wide, (d_out.astype(np.float32), d_lse))
    for name in (f"d_{x}" for x in operands):
        error = np.linalg.norm(np.float32(results[name]) - np.float32(expected[name]))
        # Gradients that cancel out are not asked to be exact.
        size = max(np.linalg.norm(np.float32(expected[name])), 1e-3 * expected[name].size ** 0.5)
        if name == "d_rpb" and expected[name].size < FEW:
            # The few sums over all queries may cancel by chance; their terms are as large as this together.
            keys = math.prod(case.problem.kernel_size) + case.additional
            size = max(size, 0.1 * np.linalg.norm(np.float32(d_out)) / keys**0.5)
        assert error / size < GRADIENT_ERROR[case.dtype], (case.name, name)


@pytest.mark.parametrize("shape", HARD.values(), ids=lambda p: p.name)
def test_hard_problems_at_their_published_size(shape):
    for causal, dtype in itertools.product(shape.every_causal(), DTYPES):
        check_against_naive(Case(causal, dtype))


@pytest.mark.parametrize("chunk", range(RANDOM // CHUNK))
def test_random_problems(chunk):
    """A thousand of them, of this run's seed, under the chosen tiles; the driver tries random ones."""
    for case, _ in random_cases("sm90 backward", chunk):
        check_against_naive(case)


@pytest.mark.parametrize("name", ["nat_28", "dinat_28_d4", "hdit_64_k13", "vae_k3_7_7", "seq32k_gqa8"])
def test_same_bits_in_every_run(name):
    check_bits(Case({**SMALL, **LARGE}[name], "bfloat16"), runs=10)


@pytest.mark.parametrize("name", ["nat_14", "hdit_64_k13", "seq32k_gqa8"])
def test_same_bits_in_every_run_with_additional_keys_and_a_bias(name):
    shape = {**SMALL, **LARGE}[name]
    check_bits(Case(shape, "bfloat16", additional=77, bias=not any(shape.is_causal)), runs=10)


@pytest.mark.parametrize("dim", [32, 128])
def test_same_bits_in_every_run_of_a_small_problem(dim):
    shape = problem("bits", 1, 4, 2, dim, [17, 21], [7, 5], [2, 1], [1, 2])
    check_bits(Case(shape, "bfloat16"), runs=2)
    check_bits(Case(shape, "bfloat16", additional=3, bias=dim == 32), runs=2)


def check_bits(case: Case, runs: int) -> None:
    operands, cotangents = draw(case)
    run = jitted_fused(case, "sm90")
    first = run(operands, cotangents)
    for _ in range(runs):
        for name, x in run(operands, cotangents).items():
            np.testing.assert_array_equal(x, first[name], err_msg=name)


@pytest.mark.parametrize("changes, words", [
    ({"value_dim": 32}, "head dimension"),
    ({"dtype": "float32"}, "float16 and bfloat16 only"),
])  # fmt: skip
def test_what_the_backward_does_not_take_is_refused_with_the_reason(changes, words):
    case = dataclasses.replace(Case(problem("refused", 1, 2, 1, 64, [15, 14], [5, 7]), "bfloat16"), **changes)
    operands, cotangents = draw(case)
    with pytest.raises(NotImplementedError, match=words):
        jitted_fused(case, "sm90")(operands, cotangents)
    # The next implementation takes it.
    results = jitted_fused(case, ("sm90", "naive"))(operands, cotangents)
    expected = jitted_fused(case, "naive")(operands, cotangents)
    for name, x in results.items():
        assert relative_error(x, expected[name]) < 2 * GRADIENT_ERROR["bfloat16"], name


@pytest.mark.parametrize("batch, grid", [(0, (12, 12)), (2, (0, 12))])
def test_empty_batch_or_axis_gives_empty_gradients(batch, grid):
    case = Case(problem("empty", batch, 2, 1, 64, grid, [3, 3]), "bfloat16", additional=2, bias=True)
    for name, x in jitted_fused(case, "sm90")(*draw(case)).items():
        assert not np.asarray(x, np.float32).any(), name
        assert x.size == 0 or name in ("d_rpb", "d_additional_keys", "d_additional_values"), name


@pytest.mark.parametrize("extended", [False, True])
def test_vmap_of_gradients(extended):
    """Of the bias, too: then each batch element has its own."""
    case = Case(problem("vmap", 2, 2, 1, 32, [15, 14], [5, 7]), "bfloat16", additional=3 * extended, bias=extended)
    operands, cotangents = draw(case)

    def gradients(x):
        return jax.vjp(fused(case, "sm90"), x)[1](cotangents)[0]

    stacked = {name: jnp.stack([x, -x]) for name, x in operands.items()}
    mapped = jax.jit(jax.vmap(gradients))(stacked)
    for n in range(2):
        each = jax.jit(gradients)({name: x[n] for name, x in stacked.items()})
        for name, x in each.items():
            np.testing.assert_array_equal(mapped[name][n], x, err_msg=name)


@pytest.mark.parametrize("name", ["nat_28", "hdit_64_k13_d4", "cosmos2_s1_4_8"])
def test_calls_can_be_captured_into_a_graph(name):
    """The same bits with every call in a command buffer and with none, also on other buffers than those captured."""
    case = Case({**SMALL, **LARGE}[name], "bfloat16")
    operands, cotangents = draw(case)

    def step(x):
        for _ in range(3):
            gradients = jax.vjp(fused(case, "sm90"), x)[1](cotangents)[0]
            x = {n: x[n] + gradients[n] for n in x}
        return x

    captured, plain = captured_and_plain(step)
    for factor in (1, -1, 0.5):
        arrays = {n: jnp.asarray(x * np.asarray(factor, x.dtype)) for n, x in operands.items()}
        for a, b in zip(jax.tree.leaves(captured(arrays)), jax.tree.leaves(plain(arrays))):
            np.testing.assert_array_equal(a, b)


def test_profile_prints_what_it_reaches(tmp_path):
    command = [sys.executable, "-P", "-m", "jax_natten", "profile", "2d", "64x64", "-k", "13x13", "--heads", "8"]
    command += ["--batch", "4", "--dim", "64", "--implementation", "sm90", "--backward"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    for word in ("TFLOP/s", "query pass", "key pass", "expects"):
        assert word in text


def test_offsets_past_two_to_the_31():
    """Tensors of over 2^31 elements; gradients at the last positions are compared with those of a slice of them."""

    def gradients(*arrays):
        out, pullback = jax.vjp(lambda *x: jax_natten.na1d(*x, 9, implementation="sm90"), *arrays)
        return pullback(out)

    for got, want in ends_of_long_results(gradients):
        # The slice may be computed with other tiles.
        assert relative_error(got, want) < 5e-3
