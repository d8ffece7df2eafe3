"""vmap of every public function: a loop over the elements, whichever operands it maps."""

from __future__ import annotations

import pytest
from functions import CASES, FUNCTIONS, check_vmap, check_vmap_of_derivatives, check_vmap_over_an_empty_axis, masks


@pytest.mark.parametrize("name, implementation", [("qk", "cpu"), ("av", "cpu"), ("merge", "xla")])
def test_vmap_over_every_subset_of_the_operands_with_gradients(name, implementation):
    """``test_transforms.py`` has those of fused attention, with its output and LSE together."""
    check_vmap(name, implementation)


@pytest.mark.parametrize("name", ["qk", "av"])
def test_vmap_of_pure_jax_with_gradients(name):
    """The batching rules are those of the kernels: one operand alone, and all of them."""
    every = masks(FUNCTIONS[name])
    check_vmap(name, "xla", (every[0], every[-1]))


@pytest.mark.parametrize("name, implementation", CASES)
def test_vmap_of_jvp_and_of_grad_nested(name, implementation):
    check_vmap_of_derivatives(name, implementation)


@pytest.mark.parametrize("name, implementation", CASES)
def test_vmap_over_an_empty_axis(name, implementation):
    check_vmap_over_an_empty_axis(name, implementation)
