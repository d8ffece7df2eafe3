"""Writes the exported programs that every later version must load and run to the same numbers.

    python tests/data/write_exports.py NAME

NAME names the version that writes, and the files: ``NAME.fused.jax_export``, ``NAME.unfused.jax_export`` (programs for
CPU, CUDA and TPU, with their first derivative) and ``NAME.npz`` (operands, cotangents, results, gradients). Existing
files are never written again: an artefact that no longer loads, or gives other numbers, is a broken promise. Names and
attributes of the custom calls are a wire format: a target that means something else gets another name, and what an
attribute means never changes. A target may get another attribute only if programs without it go on to mean the same.

Run it with the oldest supported jax, and add files when the wire format has grown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import jax_natten
from jax_natten import native

WINDOW = {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2)}
CAUSAL = WINDOW | {"is_causal": (True, False)}
SHAPES = {
    "query": (2, 4, 5, 4, 3),
    "key": (2, 4, 5, 2, 3),
    "value": (2, 4, 5, 2, 2),
    "additional_keys": (2, 1, 2, 3),
    "additional_values": (2, 1, 2, 2),
    "rpb": (4, 5, 3),
}


def fused(query, key, value, additional_keys, additional_values, rpb):
    """Everything that a fused call can be given: a bias, then a causal axis."""
    extra = {"additional_keys": additional_keys, "additional_values": additional_values, "return_lse": True}
    out, lse = jax_natten.na2d(query, key, value, **WINDOW, **extra, rpb=rpb, scale=0.7)
    causal, causal_lse = jax_natten.na2d(query, key, value, **CAUSAL, return_lse=True)
    return out, lse, causal, causal_lse


def unfused(query, key, value, additional_keys, additional_values, rpb):
    """The same of the unfused operations."""
    scores = jax_natten.na2d_qk(query, key, **WINDOW, additional_keys=additional_keys, rpb=rpb)
    mixed = jax_natten.na2d_av(scores, value, **WINDOW, additional_values=additional_values)
    causal = jax.nn.softmax(jax_natten.na2d_qk(query, key, **CAUSAL))
    return scores, mixed, jax_natten.na2d_av(causal, value, **CAUSAL)


FUNCTIONS = {"fused": fused, "unfused": unfused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    stem = str(Path(__file__).parent / parser.parse_args().name)
    # Lowering only writes the calls down, so that a machine without nvcc can write those of CUDA, too.
    native.cuda = native.cuda or object()
    # Nothing of the machine that writes.
    jax.config.update("jax_traceback_in_locations_limit", 0)

    rng = np.random.default_rng(7)
    operands = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES.values()]
    arrays = dict(zip(SHAPES, operands))
    for name, function in FUNCTIONS.items():
        exported = jax.export.export(
            jax.jit(function),
            platforms=("cpu", "cuda", "tpu"),
            disabled_checks=jax_natten.EXPORT_DISABLED_CHECKS,
        )(*operands)
        with open(f"{stem}.{name}.jax_export", "xb") as file:
            file.write(exported.serialize(vjp_order=1))
        results, pullback = jax.vjp(jax.jit(function), *operands)
        cotangents = tuple(jnp.asarray(rng.standard_normal(r.shape), r.dtype) for r in results)
        gradients = pullback(cotangents)
        for what, values in (("result", results), ("cotangent", cotangents), ("gradient", gradients)):
            arrays |= {f"{name}_{what}_{i}": np.asarray(value) for i, value in enumerate(values)}
    with open(f"{stem}.npz", "xb") as file:
        np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    main()
