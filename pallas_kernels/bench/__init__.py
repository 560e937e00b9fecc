"""Timing on the device, the ceilings of this machine, and the peers: what `paro bench` measures with.

`timing` times a call, `ceilings` says what the machine can do at most, `peers` are others' attention on the same
tensors, `promises` are the figures that the XLA backend promises. Masks, plans and the table are `paro_jax.bench`.
"""
