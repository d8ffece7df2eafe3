"""Neighborhood attention as Flax layers.

``jax_natten.flax.NeighborhoodAttention`` is for ``flax.linen``, ``jax_natten.flax.nnx.NeighborhoodAttention`` for
``flax.nnx``; :func:`attention_fn` puts neighborhood attention inside Flax's own attention layers of either kind.
"""

try:
    import flax as _flax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise ImportError("jax_natten.flax needs Flax: install it with  pip install 'jax_natten[flax]'") from error

from jax_natten.flax import nnx
from jax_natten.flax.adapter import attention_fn
from jax_natten.flax.linen import NeighborhoodAttention

__all__ = ["NeighborhoodAttention", "attention_fn", "nnx"]
