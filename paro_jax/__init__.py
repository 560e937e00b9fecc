"""PAROAttention for JAX: per-head token orders, block-sparse and quantised attention (arXiv 2506.16054).

`attention` is the drop-in; `AttentionPlan` holds what calibration decided. Flax adapters: `import paro_jax.flax`.
"""

from pallas_kernels import NoBackend as NoBackend
from pallas_kernels import Norm as Norm
from pallas_kernels import Rope as Rope
from paro_jax._attention import TokenBlocks as TokenBlocks
from paro_jax._attention import arrange as arrange
from paro_jax._attention import attend as attend
from paro_jax._attention import attention as attention
from paro_jax._attention import project_in as project_in
from paro_jax._grid import TokenGrid as TokenGrid
from paro_jax._mask import BlockMask as BlockMask
from paro_jax._plan import AttentionPlan as AttentionPlan
from paro_jax._plan_file import PlanError as PlanError
from paro_jax._plan_file import load_plan as load_plan
from paro_jax._plan_file import plan_info as plan_info
from paro_jax._plan_file import save_plan as save_plan
from paro_jax._quant import QuantSpec as QuantSpec
from paro_jax._quant import Width as Width

__version__ = "0.1.0"
