"""The GPUs that kernels are compiled for without one: as XLA describes them, and what is published of their rates."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from pallas_kernels._packed import PACKED
from pallas_kernels.block_attention import ampere, hopper

# A GPU as XLA describes one, which is all its compiler asks of it.
_DESCRIPTION = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared_sm} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {ghz} device_memory_size: {memory}
  shared_memory_per_block_optin: {shared} cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 1 patch: 0 }} device_description_str: "NVIDIA {name}"
"""


class Target(NamedTuple):
    """A GPU to compile for: its name in requests, the attention kernel that serves it, and what is published of it."""

    device: str
    kernel: Any  # the backend's module
    kinds: tuple[tuple[str, str, str, str], ...]  # (qk, pv, p_scale, layout) of the report's rows
    rates: Mapping[str, float]  # warp instructions a clock of one SM, by unit; _RATES where not given
    macs: Mapping[str, int]  # multiply-adds a clock of one SM, by kind of tensor instruction
    gpu: Mapping[str, Any]

    @property
    def description(self) -> str:
        major, minor = divmod(int(self.device.removeprefix("sm_")), 10)
        return _DESCRIPTION.format(**self.gpu, major=major, minor=minor)


_HOPPER = (
    ("bf16", "bf16", "block", "rows"), ("fp8", "fp8", "block", "rows"), ("int8", "int8", "block", "rows"),
    ("int8", "int8", "running", "rows"), ("int4", "int4", "block", PACKED),
)  # fmt: skip
_AMPERE = (
    ("bf16", "bf16", "block", "rows"), ("int8", "int8", "block", "rows"), ("int4", "int8", "block", "rows"),
    ("int4", "int4", "block", "rows"),
)  # fmt: skip
# NVIDIA's data sheets: A100, and A10 and L40S. GeForce cards do HMMA with a float32 accumulator at half the rate.
_GA100 = {"HMMA": 1024, "IMMA.S8": 2048, "IMMA.S4": 4096}
_GA10X = {"HMMA": 512, "IMMA.S8": 1024, "IMMA.S4": 2048}

TARGETS = {
    "sm_90a": Target(
        "sm_90", hopper, _HOPPER, {}, {"HGMMA": 2048, "IGMMA": 4096, "QGMMA": 4096},
        dict(name="H200", shared=232448, shared_sm=233472, threads=2048, cores=132, fpus=128, bandwidth=4800000000000,
             l2=52428800, ghz=1.98, memory=150000000000),
    ),
    "sm_80": Target(
        "sm_80", ampere, _AMPERE, {"fp32": 2.0}, _GA100,
        dict(name="A100", shared=166912, shared_sm=167936, threads=2048, cores=108, fpus=64, bandwidth=2039000000000,
             l2=41943040, ghz=1.41, memory=80000000000),
    ),
    "sm_86": Target(
        "sm_86", ampere, _AMPERE, {}, _GA10X,
        dict(name="A10", shared=101376, shared_sm=102400, threads=1536, cores=72, fpus=128, bandwidth=600000000000,
             l2=6291456, ghz=1.695, memory=24000000000),
    ),
    "sm_89": Target(
        "sm_89", ampere, _AMPERE, {}, _GA10X,
        dict(name="L40S", shared=101376, shared_sm=102400, threads=1536, cores=142, fpus=128, bandwidth=864000000000,
             l2=100663296, ghz=2.52, memory=48000000000),
    ),
}  # fmt: skip
