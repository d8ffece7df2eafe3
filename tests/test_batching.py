from __future__ import annotations

import pytest
from functions import CASES, check_vmap, check_vmap_of_derivatives, check_vmap_over_an_empty_axis


@pytest.mark.parametrize("name", ["lse", "qk", "av", "merge"])
def test_vmap_over_every_subset_of_the_operands_with_gradients(name):
    check_vmap(name, "cpu")


@pytest.mark.parametrize("name, implementation", CASES)
def test_vmap_of_jvp_and_of_grad_nested(name, implementation):
    check_vmap_of_derivatives(name, implementation)


@pytest.mark.parametrize("name, implementation", CASES)
def test_vmap_over_an_empty_axis(name, implementation):
    check_vmap_over_an_empty_axis(name, implementation)
