"""Neighborhood attention for JAX: each token of a 1-D, 2-D or 3-D grid attends to its nearest neighbors."""

from jax_natten import tuning
from jax_natten.attention import merge_attentions, na1d, na2d, na3d, neighborhood_attention
from jax_natten.cost import bytes_accessed, flops
from jax_natten.native import EXPORT_DISABLED_CHECKS
from jax_natten.neighborhood import Neighborhood
from jax_natten.tiles import Tiles
from jax_natten.unfused import (
    na1d_av,
    na1d_qk,
    na2d_av,
    na2d_qk,
    na3d_av,
    na3d_qk,
    neighborhood_av,
    neighborhood_qk,
)

__version__ = "0.1.0"

__all__ = [
    "EXPORT_DISABLED_CHECKS",
    "Neighborhood",
    "Tiles",
    "bytes_accessed",
    "flops",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "neighborhood_attention",
    "neighborhood_av",
    "neighborhood_qk",
    "tuning",
]
