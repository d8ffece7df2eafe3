"""JAX primitives behind the public functions.

``factory`` turns a table row (abstract evaluation, native lowering, XLA implementation, axis roles) into a primitive
with lowering, batching and sharding rules; ``fused`` and ``unfused`` fill the table in and add the derivatives.
"""
