"""Floor 0 of paro_jax: arrays in, arrays out. Imports jax and numpy only; knows no plan and no model."""

from pallas_kernels._check import Width
from pallas_kernels._choose import Backend, NoBackend, Request, choose, device_name
from pallas_kernels._interpret import interpret
from pallas_kernels.arrange import Norm, Rope, arrange
from pallas_kernels.block_attention import block_attention
from pallas_kernels.workloads import support_rows, support_table

__all__ = [
    "Backend",
    "NoBackend",
    "Norm",
    "Request",
    "Rope",
    "Width",
    "arrange",
    "block_attention",
    "choose",
    "device_name",
    "interpret",
    "support_rows",
    "support_table",
]
