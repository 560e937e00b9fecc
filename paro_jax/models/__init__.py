"""Diffusion transformers in Flax NNX whose attention goes through `paro_jax`; import the one you need."""
