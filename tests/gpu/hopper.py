"""What the tests of the Hopper forward and backward share: where they run, their cases, and ways to run a function."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from checks import Case, generator
from problems import HARD_SMALL, Problem, problem

from jax_natten import native

DTYPES = ("bfloat16", "float16")
DIMS = (8, 16, 24, 32, 40, 48, 56, 64, 72, 88, 96, 104, 120, 128, 136, 160, 192, 200, 224, 256)
RANDOM, CHUNK = 1000, 25


def _is_hopper() -> bool:
    if hasattr(native.cuda, "is_emulated"):
        return True
    return any(getattr(device, "compute_capability", "") == "9.0" for device in jax.devices())


MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _is_hopper(), reason="no GPU of compute capability 9.0"),
]


def with_dim(shape: Problem, dim: int) -> Problem:
    return dataclasses.replace(shape, name=f"{shape.name}-d{dim}", dim=dim)


HARD_CASES = [
    Case(with_dim(causal, DIMS[n % len(DIMS)]), dtype)
    for dtype in DTYPES
    for n, causal in enumerate(c for shape in HARD_SMALL.values() for c in shape.every_causal())
]


def every_rank(dim: int, dtype: str) -> list[Case]:
    shapes = (
        problem("rows", 2, 4, 2, dim, [150], [21], [3], [2], [True]),
        problem("plane", 1, 2, 1, dim, [19, 23], [7, 9], [1, 4], [2, 1]),
        problem("volume", 1, 2, 2, dim, [7, 9, 10], [3, 5, 4], [1, 2, 1], [1, 1, 2]),
    )
    return [Case(with_dim(shape, dim), dtype) for shape in shapes]


def extended(dim: int, dtype: str) -> list[Case]:
    """With additional keys, a relative position bias, or both."""
    shapes = (
        problem("rows", 2, 4, 2, dim, [110], [21], [3], [2]),
        problem("plane", 1, 2, 1, dim, [19, 17], [7, 9], [1, 4], [2, 1]),
        problem("volume", 1, 2, 2, dim, [7, 9, 6], [3, 5, 4], [1, 2, 1], [1, 1, 1]),
    )
    extensions = ((3, False), (0, True), (130, True))
    return [
        Case(with_dim(shape, dim), dtype, additional=additional, bias=bias)
        for shape in shapes
        for additional, bias in extensions
    ]


def _random_axis(rng, longest: int) -> tuple:
    length = int(rng.integers(1, longest + 1))
    dilation = int(rng.integers(1, length + 1)) if rng.integers(3) == 0 else 1
    most = length // dilation
    window = most if rng.integers(5) == 0 else int(rng.integers(1, most + 1))
    stride = int(rng.integers(1, window + 1)) if rng.integers(2) else 1
    return length, window, stride, dilation, bool(rng.integers(4) == 0)


def random_cases(word: str, chunk: int):
    """Those of one chunk of RANDOM, each with a generator for what else the test draws."""
    for n in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        rng = generator(word, n)
        rank = int(rng.integers(1, 4))
        grid, *window = zip(*(_random_axis(rng, {1: 300, 2: 24, 3: 9}[rank]) for _ in range(rank)))
        kv_heads, group = int(rng.integers(1, 4)), int(rng.choice([1, 1, 2, 3, 5]))
        dim, dtype = int(rng.choice(DIMS)), DTYPES[rng.integers(2)]
        shape = Problem(f"random{n}", int(rng.integers(1, 4)), kv_heads * group, kv_heads, dim, grid, *window)
        scale = (None, None, None, 0.0, -(dim**-0.5), 3 * dim**-0.5)[rng.integers(6)]
        additional = int(rng.choice([0, 0, 0, 1, 5, 40, 150]))
        bias = not any(shape.is_causal) and rng.integers(3) == 0
        yield Case(shape, dtype, additional=additional, bias=bias, scale=scale), rng


def captured_and_plain(function):
    """Jitted with every call in a command buffer, and with none."""
    captured = jax.jit(
        function,
        compiler_options={"xla_gpu_enable_command_buffer": "FUSION,CUSTOM_CALL", "xla_gpu_graph_min_graph_size": 1},
    )
    return captured, jax.jit(function, compiler_options={"xla_gpu_enable_command_buffer": ""})


def ends_of_long_results(function, tail: int = 256):
    """Pairs of the last positions of ``function(query, key, value)``, of tensors of over 2^31 elements.

    Of each pair the second is that of a slice of the operands, which shifts the windows of its first queries.
    """
    try:
        shape = (1, 2**22 + 64, 4, 128)
        arrays = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3)]
        results = jax.block_until_ready(jax.jit(function)(*arrays))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        pytest.skip("not enough GPU memory")
    expected = function(*(x[:, -tail:] for x in arrays))
    for got, want in zip(results, expected):
        yield got[:, -tail // 2 :], want[:, -tail // 2 :]
