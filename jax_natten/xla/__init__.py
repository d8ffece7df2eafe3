"""The "xla" implementation: neighborhood attention in pure JAX, blocked so that memory is bounded, for any device."""
