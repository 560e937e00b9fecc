"""PAROAttention for JAX."""

from paro_jax._grid import TokenGrid as TokenGrid
from paro_jax._mask import BlockMask as BlockMask
from paro_jax._plan import AttentionPlan as AttentionPlan
from paro_jax._quant import QuantSpec as QuantSpec
from paro_jax._quant import Width as Width

__version__ = "0.1.0"
