"""Derivatives of every kind against those of the definition, what they lower to, and that they need no dense mask."""

from __future__ import annotations

import pytest
from functions import CASES, check_derivatives


@pytest.mark.parametrize("name, implementation", CASES)
def test_jacobians_and_hessians_in_every_mode(name, implementation):
    check_derivatives(name, implementation)
