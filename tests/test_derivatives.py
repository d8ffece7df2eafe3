"""Derivatives of every kind against those of the definition, and the memory that they need.

``test_gradients.py`` compares with finite differences, causal axes and three dimensions included.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from checks import jit
from functions import CASES, FUNCTIONS, check_derivatives, shapes, total
from problems import problem

LARGE = problem("large", 1, 2, 2, 8, [128, 128], [7, 7], [1, 1], [1, 1])


@pytest.mark.parametrize("name, implementation", CASES)
def test_jacobians_and_hessians_in_every_mode(name, implementation):
    check_derivatives(name, implementation)


@pytest.mark.parametrize("name, implementation", [case for case in CASES if case[0] != "merge"])
def test_forward_mode_and_second_order_need_no_dense_mask(name, implementation):
    """Memory beyond operands and results stays below a multiple of them, a twentieth of the scores of all pairs."""
    function = FUNCTIONS[name]
    f = function.of(LARGE, implementation)
    operands = {n: jax.ShapeDtypeStruct(shapes(LARGE)[n], jnp.float32) for n in function.operands}

    def product(x, t):
        return jax.jvp(jax.grad(lambda x: total(f(x))), (x,), (t,))[1]

    for transformed in (lambda x, t: jax.jvp(f, (x,), (t,)), product):
        memory = jit(transformed, "xla").lower(operands, operands).compile().memory_analysis()
        interface = memory.argument_size_in_bytes + memory.output_size_in_bytes
        assert memory.temp_size_in_bytes < 2 * interface + 2**26
        assert memory.temp_size_in_bytes < 4 * LARGE.heads * math.prod(LARGE.grid) ** 2 / 20
