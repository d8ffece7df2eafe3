"""Draws a case's operands, runs one implementation of it and compares with the oracle.

Every check takes the implementation as an argument, so that the CPU suite and ``tests/gpu`` hold them to the same
promises.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from problems import Problem
from tolerance import FEW, assert_as_good_as_plain

import jax_natten

DTYPES = ("float16", "bfloat16", "float32", "float64")

# Compiling pure JAX takes most of the suite's time. These options make it two to eight times as fast; the program and
# its numerics stay, only LLVM's optimisation and the newer code generator go. Meant for the long tables of cases.
# (Do not disable XLA's passes "fusion,fusion-wrapper" instead: together they make it compile wrong programs.)
QUICK_COMPILE: dict[str, int | bool] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK_COMPILE["xla_cpu_use_fusion_emitters"] = False


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem and everything else that an attention call may be given."""

    problem: Problem
    dtype: str = "float32"
    value_dim: int | None = None  # None: as the query's
    additional: int = 0  # additional keys and values
    bias: bool = False
    scale: float | None = None

    @property
    def name(self) -> str:
        parts = [self.problem.name, self.dtype]
        parts += [f"v{self.value_dim}"] if self.value_dim else []
        parts += [f"s{self.additional}"] if self.additional else []
        parts += ["bias"] if self.bias else []
        parts += [] if self.scale is None else [f"scale{self.scale}"]
        return "-".join(parts)

    @property
    def accumulation(self) -> np.dtype:
        return np.dtype(np.float64 if self.dtype == "float64" else np.float32)

    @property
    def effective_scale(self) -> float:
        return self.problem.dim**-0.5 if self.scale is None else self.scale


def generator(*words) -> np.random.Generator:
    """Random numbers for one test: of this run's seed and of the words, whatever the order of the tests."""
    return np.random.default_rng([int(os.environ["JAX_NATTEN_TEST_SEED"]), zlib.crc32(repr(words).encode())])


def operand_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    p, value_dim = case.problem, case.value_dim or case.problem.dim
    shapes = {
        "query": (p.batch, *p.grid, p.heads, p.dim),
        "key": (p.batch, *p.grid, p.kv_heads, p.dim),
        "value": (p.batch, *p.grid, p.kv_heads, value_dim),
    }
    if case.additional:
        shapes["additional_keys"] = (p.batch, case.additional, p.kv_heads, p.dim)
        shapes["additional_values"] = (p.batch, case.additional, p.kv_heads, value_dim)
    if case.bias:
        shapes["rpb"] = (p.heads, *(2 * k - 1 for k in p.kernel_size))
    return shapes


def draw(case: Case) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Operands, and cotangents of out and lse."""
    rng = generator(case.name)
    shapes, dtype = operand_shapes(case), jnp.dtype(case.dtype)
    operands = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    d_out = rng.standard_normal((*shapes["query"][:-1], shapes["value"][-1])).astype(dtype)
    d_lse = rng.standard_normal(shapes["query"][:-1]).astype(case.accumulation)
    return operands, (d_out, d_lse)


@functools.lru_cache(maxsize=4)
def expected_fused(case: Case):
    """``(operands, cotangents, oracle, plain, magnitudes)``, shared by the implementations."""
    operands, cotangents = draw(case)
    arguments = (operands, case.problem.window, case.effective_scale, *cotangents)
    exact, magnitudes = oracle.attention(*arguments)
    plain, _ = oracle.attention(*arguments, compute=case.accumulation.type, storage=jnp.dtype(case.dtype))
    if exact["lse"].size < FEW:
        # The products of a score may cancel, and with a window of one key that is all there is.
        query, key = (np.asarray(operands[name], np.float64) for name in ("query", "key"))
        longest = np.linalg.norm(key, axis=-1).max(initial=0)
        magnitudes = magnitudes | {"lse": abs(case.effective_scale) * np.linalg.norm(query) * longest}
    if exact["out"].size < FEW:
        # So may the values in a mean of them, whose size is that of a value over the square root of their number.
        values = [np.ravel(np.asarray(x, np.float64)) for name, x in operands.items() if "value" in name]
        keys = math.prod(case.problem.kernel_size) + case.additional
        size = np.linalg.norm(np.concatenate(values)) / max(sum(v.size for v in values), 1) ** 0.5
        magnitudes = magnitudes | {"out": size * (exact["out"].size / keys) ** 0.5}
    return operands, cotangents, exact, plain, magnitudes


def fused(case: Case, implementation, tiles=None):
    """The public function as ``operands -> (out, lse)``."""

    def attention(operands):
        operands = dict(operands)
        return jax_natten.neighborhood_attention(
            operands.pop("query"),
            operands.pop("key"),
            operands.pop("value"),
            **case.problem.window,
            **operands,
            scale=case.scale,
            return_lse=True,
            implementation=implementation,
            tiles=tiles,
        )

    return attention


def jit(function, implementation, quick: bool = True):
    """``jax.jit``; by default with little effort to compile pure JAX on the CPU."""
    quick = quick and implementation == "xla" and jax.default_backend() == "cpu"
    return jax.jit(function, compiler_options=QUICK_COMPILE if quick else None)


def fused_with_gradients(case: Case, implementation):
    """``(operands, cotangents) -> results``: out, lse and the gradients, named as by the oracle."""

    def run(operands, cotangents):
        (out, lse), pullback = jax.vjp(fused(case, implementation), operands)
        (grads,) = pullback(cotangents)
        return {"out": out, "lse": lse} | {f"d_{name}": g for name, g in grads.items()}

    return run


def jitted_fused(case: Case, implementation, quick: bool = True):
    return jit(fused_with_gradients(case, implementation), implementation, quick)


def run_fused(case: Case, implementation, operands, cotangents, quick: bool = True) -> dict[str, jax.Array]:
    return jitted_fused(case, implementation, quick)(operands, cotangents)


def check_fused(case: Case, implementation, quick: bool = True) -> None:
    """Forward and every gradient of a fused case."""
    operands, cotangents, exact, plain, magnitudes = expected_fused(case)
    results = run_fused(case, implementation, operands, cotangents, quick)
    assert results.keys() == exact.keys()
    # Gradients take the weights from the stored LSE. At scale 0 windows of one size have one LSE, whose rounding then
    # meets all weights alike and does not average out.
    same_lse = case.scale == 0 and not case.bias
    weights_off_by = float(np.spacing(np.abs(exact["lse"]).max().astype(case.accumulation))) if same_lse else 0.0
    for name, result in results.items():
        dtype = case.accumulation if name == "lse" else jnp.dtype(case.dtype)
        assert result.dtype == dtype, f"{name} is {result.dtype}, expected {dtype}"
        assert_as_good_as_plain(
            result,
            exact[name],
            plain[name],
            name=name,
            dtype=dtype,
            magnitude=magnitudes.get(name, 0.0),
            weights_off_by=weights_off_by if name.startswith("d_") else 0.0,
        )


@functools.lru_cache(maxsize=4)
def expected_unfused(case: Case):
    """``(operands, cotangents, oracle, plain, magnitudes)`` of QK and AV."""
    p, dtype = case.problem, jnp.dtype(case.dtype)
    operands, _ = draw(case)
    rng = generator("unfused", case.name)
    slots = int(np.prod(p.kernel_size)) + case.additional
    rows = (p.batch, *p.grid, p.heads)
    attn = rng.standard_normal((*rows, slots)).astype(dtype)
    d_attn = rng.standard_normal((*rows, slots)).astype(dtype)
    d_out = rng.standard_normal((*rows, operands["value"].shape[-1])).astype(dtype)
    window, more_keys, more_values = p.window, operands.get("additional_keys"), operands.get("additional_values")

    def compute(**precision):
        d_key, d_more_keys = oracle.inverse(d_attn, operands["query"], window, p.kv_heads, **precision)
        d_value, d_more_values = oracle.inverse(attn, d_out, window, p.kv_heads, **precision)
        results = {
            "qk": oracle.pn(operands["query"], operands["key"], window, more_keys, operands.get("rpb"), **precision),
            "d_query": oracle.nn(d_attn, operands["key"], window, more_keys, **precision),
            "d_key": d_key,
            "av": oracle.nn(attn, operands["value"], window, more_values, **precision),
            "d_attn": oracle.pn(d_out, operands["value"], window, more_values, fill=0.0, **precision),
            "d_value": d_value,
        }
        if case.additional:
            results |= {"d_additional_keys": d_more_keys, "d_additional_values": d_more_values}
        if case.bias:
            results["d_rpb"] = oracle.bias_gradient(d_attn, window, p.heads, **precision)
        return results

    exact = compute(compute=np.float64)
    plain = compute(compute=case.accumulation.type, storage=dtype)
    extra = case.additional
    magnitudes = {
        "d_rpb": _norm(d_attn),
        "d_additional_keys": _norm(d_attn[..., slots - extra :]) * oracle.typical_row(operands["query"]),
        "d_additional_values": _norm(attn[..., slots - extra :]) * oracle.typical_row(d_out),
    }
    return operands, (attn, d_attn, d_out), exact, plain, magnitudes


def _norm(x) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def jitted_unfused(case: Case, implementation, quick: bool = True):
    """``(operands, attn, d_attn, d_out) -> results``: QK, AV and all their gradients."""
    window = case.problem.window
    rank = case.problem.rank
    qk, av = getattr(jax_natten, f"na{rank}d_qk"), getattr(jax_natten, f"na{rank}d_av")
    names = operand_shapes(case).keys()
    qk_names = [name for name in ("query", "key", "additional_keys", "rpb") if name in names]
    av_names = [name for name in ("value", "additional_values") if name in names]

    def run(operands, attn, d_attn, d_out):
        def scores(x):
            x = dict(x)
            return qk(x.pop("query"), x.pop("key"), **window, **x, implementation=implementation)

        def mixed(attn, x):
            x = dict(x)
            return av(attn, x.pop("value"), **window, **x, implementation=implementation)

        results = {}
        results["qk"], pullback = jax.vjp(scores, {name: operands[name] for name in qk_names})
        (qk_grads,) = pullback(d_attn)
        results["av"], pullback = jax.vjp(mixed, attn, {name: operands[name] for name in av_names})
        results["d_attn"], av_grads = pullback(d_out)
        return results | {f"d_{name}": g for name, g in (qk_grads | av_grads).items()}

    return jit(run, implementation, quick)


def run_unfused(case: Case, implementation, operands, attn, d_attn, d_out, quick: bool = True) -> dict[str, jax.Array]:
    return jitted_unfused(case, implementation, quick)(operands, attn, d_attn, d_out)


def check_unfused(case: Case, implementation, quick: bool = True) -> None:
    """QK and AV forward and every gradient, causal slots included."""
    operands, cotangents, exact, plain, magnitudes = expected_unfused(case)
    results = run_unfused(case, implementation, operands, *cotangents, quick=quick)
    assert results.keys() == exact.keys()
    for name, result in results.items():
        assert result.dtype == jnp.dtype(case.dtype), f"{name} is {result.dtype}"
        assert_as_good_as_plain(
            result, exact[name], plain[name], name=name, dtype=case.dtype, magnitude=magnitudes.get(name, 0.0)
        )
