"""Diffusion transformers in Flax NNX whose attention goes through `paro_jax`. Import the model you need: `from paro_jax.models import cogvideox`."""
