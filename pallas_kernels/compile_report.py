"""What the GPU's compiler makes of the kernels, on a machine without a GPU.

Each kernel is compiled ahead of time for its target and its machine code read: registers, spills, and the main loop's
instructions. Clocks per unit follow from published rates; the largest of them over the tensor unit's is a bound, not a
timing. `make compile-report` installs what this needs; `paro compile-report` prints it.
"""

import collections
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._check import WIDTHS
from pallas_kernels._choose import NoBackend, Request
from pallas_kernels._machine_code import main_loop, tensor
from pallas_kernels._packed import KEYS, PACKED
from pallas_kernels._targets import TARGETS, Target
from pallas_kernels.arrange import Norm, Rope, projection
from pallas_kernels.arrange import mosaic as arrange_kernel
from pallas_kernels.block_attention import ampere, hopper

Row = dict[str, Any]
Progress = Callable[[str], None]

WORKLOADS = ("cogvideox_5b", "wan_14b_720p", "flux_1024")
SHAPES = ((64, 64), (128, 128))

# The opcodes of each unit. Whatever is not listed only takes an issue slot.
_UNITS = {
    "ex2": ("MUFU",),
    "fp32": ("FADD", "FMUL", "FFMA"),
    "integer": (
        "FMNMX", "FSEL", "FSETP", "IABS", "IADD3", "IDP", "IMAD", "IMNMX", "ISETP", "LEA", "LOP3", "PLOP3", "PRMT",
        "SEL", "SHF", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3",
    ),
    "pack": ("I2FP", "F2FP"),
    "conversion": ("F2F", "F2I", "I2F", "FRND"),
    "shuffle": ("SHFL",),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS", "LDGSTS"),
}  # fmt: skip
_RATES = {
    "ex2": 0.5, "fp32": 4.0, "integer": 2.0, "pack": 2.0, "conversion": 0.5, "shuffle": 1.0, "shared": 1.0,
    "issue": 4.0,
}  # fmt: skip
# What a warp's access of shared memory moves: 128 bytes a clock. Of the others one clock.
_WAVEFRONTS = (("88.4", 4), ("88.2", 2), (".128", 4), (".64", 2))
_GROUP = {"q": "row", "k": "block", "v": "channel"}  # what one scale covers by default
_PROGRAMS = {"ptxas": "nvcc", "nvdisasm": "nvdisasm"}  # that compile and show machine code, and whose package has each


class MissingCompiler(ValueError):
    """The packages that compile for a GPU are not installed. The message says how to install them."""


def report(target: str = "sm_90a", progress: Progress = lambda message: None) -> list[Row]:
    """One row per named workload, block, pair of widths and rule of P's scale, and per workload and role of arrange:
    `name, target, registers, spills, reallocates, shared_memory, barriers, tensor_instructions, instructions, clocks,
    bound_ratio, bound_ratio_every`.

    `instructions` and `clocks` are per 128 x 128 scores: warp instructions by unit, and clocks of one SM that each unit
    needs, in a step that takes every shortcut. `bound_ratio`: the largest of `clocks` over the tensor unit's;
    `bound_ratio_every`: the same of a step that takes none. `shared_memory` in bytes, without barriers.
    `reallocates`: whether the compiler honoured the kernel's moving of registers from the producer to the consumers;
    where it did not, each of the 384 threads has at most 168.
    arrange's are per 128 tokens of one head, its `bound_ratio` is over "memory": what its inputs and outputs take at
    the device's bandwidth, each once, RoPE's tables apart (they come from L2).
    Those of the projection that stores blocks are per 128 tokens of one head too. `after` is the part of `clocks` that
    comes after a tile's products; the tensor unit waits for it unless two tiles take turns. `spills_among_products`:
    instructions of the main loop that store or load spilled registers.
    Raises ValueError for a target without kernels, MissingCompiler where the CUDA compiler packages are missing.
    """
    return [measure(name, request, target, progress) for name, request in kernels(target)]


def kernels(target: str) -> Iterator[tuple[str, Request]]:
    """(name, request) of every row of the report."""
    from pallas_kernels.workloads import WORKLOADS as NAMED

    found = _target(target)
    device = found.device
    for name in WORKLOADS:
        for block in SHAPES:
            for qk, pv, p_scale, layout in found.kinds:
                request = replace(NAMED[name], block=block, qk=qk, pv=pv, p_scale=p_scale, device=device, layout=layout)
                rule = ("" if p_scale == "block" else f" {p_scale}") + (" packed" if layout == PACKED else "")
                yield f"{name} {qk}/{pv} {block[0]}x{block[1]}{rule}", request
        widths, layout = (("int8",), "hopper") if found.kernel is hopper else (("int8", "int4"), "ampere")
        for width, role in itertools.product(widths, ("q", "k", "v")):
            request = replace(NAMED[name], op="arrange", block=(128, 128), qk=width, pv=width, device=device)
            yield f"{name} arrange {role} {width}", replace(request, role=role, layout=layout)
        for role in ("q", "k") if found.kernel is hopper else ():
            request = replace(NAMED[name], op="projection", qk="int8", device=device, role=role, layout="hopper")
            yield f"{name} projection {role} int8", request


def _target(target: str) -> Target:
    if target in TARGETS:
        return TARGETS[target]
    request = Request("block_attention", 1, 1, 128, 128, 64, "bfloat16", (64, 64), device=target.rstrip("a"))
    reasons = "; ".join(
        f"{name}: {kernel.why_not(request)}" for name, kernel in (("hopper", hopper), ("ampere", ampere))
    )
    raise ValueError(
        f"target: expected one of {', '.join(TARGETS)}, got {target!r}. No Mosaic kernel is written for it; {reasons}."
    )


def measure(
    name: str, request: Request, target: str, progress: Progress = lambda message: None, tiles: Any = None
) -> Row:
    """The row of one request; tiles: of a projection, None for the first candidate."""
    require_compiler()
    kernel = _target(target).kernel
    if request.op == "projection":
        return _measure_projection(name, request, target, progress, tiles)
    if request.op == "arrange":
        return _measure_arrange(name, request, target, progress)
    if reason := kernel.why_not(request):
        raise NoBackend(f"no kernel can be compiled for {request}: {kernel.__name__.split('.')[-1]}: {reason}.")
    progress(f"compiling {name} for {target}")
    with tempfile.TemporaryDirectory() as folder:
        sass, facts = compile_ahead(request, target, Path(folder))
    loop = main_loop(sass)
    tiles = kernel.candidates(request)[0]
    # A warpgroup's step is 64 rows; a Hopper producer that unpacks does it for all 128 of a program.
    unpacks = kernel is hopper and hopper.packed(request.qk, request.pv, request.layout)
    producer = main_loop(sass, _stores).instructions if unpacks else []
    instructions, clocks = per_block(loop.instructions, kernel.ROWS * tiles.keys, target, producer)
    _, every = per_block(loop.every, kernel.ROWS * tiles.keys, target, producer)
    return {
        "name": name,
        "target": target,
        **facts,
        "shared_memory": kernel.shared_memory(request, tiles),
        "tensor_instructions": sorted(set(tensor(loop.instructions))),
        "instructions": instructions,
        "clocks": clocks,
        "bound_ratio": max(clocks.values()) / clocks["tensor"],
        "bound_ratio_every": max(every.values()) / every["tensor"],
    }


def _measure_arrange(name: str, request: Request, target: str, progress: Progress) -> Row:
    """The row of arrange's launch that stores: no loop, so the whole program, for 128 tokens of one head."""
    direct = request.layout == "ampere"
    if reason := arrange_kernel.unfit(request) if direct else arrange_kernel.why_not(request):
        raise NoBackend(f"no kernel can be compiled for {request}: {reason}.")
    progress(f"compiling {name} for {target}")
    with tempfile.TemporaryDirectory() as folder:
        sass, facts = compile_ahead(request, target, Path(folder))
    width, group = (request.pv if request.role == "v" else request.qk), _GROUP[request.role]
    dim = hopper.padded_dim(request.head_dim)
    if direct:
        dim = ampere.padded_dim(request.head_dim, "bf16" if request.role == "v" else width)
    halved = request.layout == PACKED and width == "int4" and request.role != "q"
    pairs = halved and request.role == "k"
    (tiles, *_) = arrange_kernel.candidates(dim, width, group, request.block[1], request.role == "v", pairs)
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]+)", sass)
    instructions, clocks = per_block([op for op in code if op != "NOP"], 128 * tiles.tokens, target)
    moved = arrange_kernel.bytes_moved(request, width=width, group=group, rope=False)
    clocks["memory"] = _memory(moved, request, target)
    return {
        "name": name,
        "target": target,
        **facts,
        "shared_memory": 0 if direct else tiles.tokens * dim * _bytes(width, request.dtype) // (1 + halved),
        "tensor_instructions": [],
        "instructions": instructions,
        "clocks": clocks,
        "bound_ratio": max(clocks.values()) / clocks["memory"],
        "bound_ratio_every": max(clocks.values()) / clocks["memory"],
    }


def _memory(moved: dict[str, int], request: Request, target: str) -> float:
    """Clocks of one SM that what a call reads and writes takes at the device's bandwidth, for 128 tokens of a head."""
    each = (moved["read"] + moved["written"]) / (request.batch * request.heads * request.kv_tokens)
    gpu = _target(target).gpu
    return 128 * each / (gpu["bandwidth"] / (gpu["cores"] * gpu["ghz"] * 1e9))


def _measure_projection(name: str, request: Request, target: str, progress: Progress, tiles: Any) -> Row:
    """The row of a projection that stores blocks, C = H * D, for 128 tokens of one head."""
    channels = request.heads * request.head_dim
    if reason := projection.why_not(request, channels=channels):
        raise NoBackend(f"no kernel can be compiled for {request}: {reason}.")
    tiles = tiles or projection.candidates(request)[0]
    progress(f"compiling {name} for {target}")
    with tempfile.TemporaryDirectory() as folder:
        sass, facts = compile_ahead(request, target, Path(folder), tiles)
    # A consumer's loop over tiles stores to device memory; in it lies the loop over channels of x, with the products.
    products, tile = main_loop(sass), main_loop(sass, _stored)
    done = tiles.rows * tiles.channels // request.head_dim * 128
    memory = _memory(projection.bytes_moved(request, channels=channels, rope=True), request, target)
    bounds, instructions, clocks, after = [], {}, {}, {}
    for own, whole in ((products.every, tile.every), (products.instructions, tile.instructions)):
        rest = list((collections.Counter(whole) - collections.Counter(own)).elements())
        _, after = per_block(rest, done, target)
        instructions, clocks = per_block(own * -(-channels // projection.DEPTH) + rest, done, target)
        clocks["memory"] = memory
        exposed = 0.0 if tiles.turns else max(after.values())
        bounds.append(max(clocks["tensor"] + exposed, *clocks.values()) / clocks["tensor"])
    return {
        "name": name,
        "target": target,
        **facts,
        "shared_memory": projection.shared_memory(tiles),
        "tensor_instructions": sorted(set(tensor(products.instructions))),
        "instructions": instructions,
        "clocks": clocks,
        "after": after,
        "spills_among_products": sum(op.startswith(("STL", "LDL")) for op in products.every),
        "bound_ratio": bounds[1],
        "bound_ratio_every": bounds[0],
    }


def _stored(instructions: list[str]) -> list[str]:
    """Stores to device memory."""
    return [op for op in instructions if op.split(".")[0] == "STG"]


def _bytes(width: str, dtype: str) -> int:
    return jnp.dtype(WIDTHS[width].store or dtype).itemsize


def per_block(
    instructions: list[str], scores: int, target: str = "sm_90a", producer: list[str] | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """(warp instructions, clocks) by unit for 128 x 128 scores, when `instructions` do `scores` in 4 warps.

    producer: what 4 more warps do for twice as many scores.
    """
    facts, warps = _target(target), 4 * 128 * 128 / scores
    rates = {**_RATES, **facts.rates}
    weighed = [(op, warps) for op in instructions] + [(op, warps / 2) for op in producer or []]
    counts, clocks = {}, {}
    for unit, names in _UNITS.items():
        used = [(op, times) for op, times in weighed if op.split(".")[0] in names]
        counts[unit] = sum(times for _, times in used)
        clocks[unit] = sum(times * (_wavefronts(op) if unit == "shared" else 1) for op, times in used) / rates[unit]
    counts |= {"tensor": warps * len(tensor(instructions)), "all": sum(times for _, times in weighed)}
    busy = sum(_macs(op) / facts.macs[_kind(op)] for op in tensor(instructions))
    clocks |= {"tensor": warps * busy, "issue": counts["all"] / rates["issue"]}
    return counts, clocks


def _wavefronts(op: str) -> int:
    """How often 128 bytes of shared memory a warp's access takes, by its name: STS.128, LDSM.16.M88.4."""
    return next((times for suffix, times in _WAVEFRONTS if suffix in op), 1)


def _stores(instructions: list[str]) -> list[str]:
    """What only a producer that unpacks has in a loop without tensor instructions."""
    return [op for op in instructions if op.split(".")[0] == "STS"] if not tensor(instructions) else []


def _kind(op: str) -> str:
    """A tensor instruction's key among a target's rates: that of IMMA says what it multiplies."""
    name = op.split(".")[0]
    return name if name != "IMMA" else "IMMA.S4" if re.search(r"\.[SU]4\b", op) else "IMMA.S8"


def _macs(op: str) -> float:
    """Multiply-adds that a warp's tensor instruction does, by the shape in its name.

    IGMMA.64x128x32.S8.S8 is a warpgroup's, so a quarter; IMMA.16832.S8.S8 has 16 x 8 x 32.
    """
    if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", op):
        m, n, k = map(int, shape.groups())
        return m * n * k / 4
    shape = re.search(r"\.168(\d+)", op)
    assert shape is not None, op
    return 16 * 8 * int(shape[1])


# ---- the compiler ---------------------------------------------------------------------------------------------------


def missing() -> str | None:
    """What keeps this machine from compiling for a GPU, or None."""
    absent = [] if importlib.util.find_spec("jax_cuda13_plugin") else ["jax-cuda13-plugin"]
    absent += [f"nvidia-cuda-{package}" for program, package in _PROGRAMS.items() if not _tool(program)]
    return f"the CUDA compiler packages are missing: {', '.join(absent)}" if absent else None


def require_compiler() -> None:
    """Raise MissingCompiler unless everything that `measure` runs is installed."""
    if reason := missing():
        raise MissingCompiler(
            f"{reason}. `make compile-report` makes an environment that has them (1.4 GB) and runs this there; no "
            "GPU is needed."
        )


def _tool(name: str) -> Path | None:
    """A program of NVIDIA's packages, which lie beside each other in `nvidia/`."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for found in sorted(Path(folder).glob(f"*/bin/{name}")):
            return found
    return None


def compile_ahead(request: Request, target: str, folder: Path, tiles: Any = None) -> tuple[str, Row]:
    """(machine code as text, `compiler_facts`) of a request's kernel, by way of Mosaic in a process of its own.

    Its settings are read once a process. The machine code is what Mosaic would launch: ptxas alone makes another.
    """
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_SASS": "1",
        "MOSAIC_GPU_DUMP_TO": str(folder),
    }
    work = json.dumps({"request": asdict(request), "target": target, "tiles": tiles and asdict(tiles)})
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.compile_report", work],
        capture_output=True, text=True, check=False, env=os.environ | settings | {"PYTHONPATH": path},
    )  # fmt: skip
    found = sorted(folder.glob("*.sass*"))
    if done.returncode or not found:
        raise RuntimeError(f"{request} did not compile for {target}: {done.stderr.strip()[-2000:]}")
    return found[-1].read_text(), compiler_facts(found[-1].with_suffix(".ptxas").read_text())


def lower(request: Request, target: str, tiles: dict[str, Any] | None = None) -> Any:
    """Compile a request for a target; nothing of it needs a GPU. Returns the compiled call. tiles: of a projection."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology="1x1x1", target_config=_target(target).description
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def like(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if request.op != "block_attention":
        with _architecture(request.device):
            return _lower_arrange(request, like) if tiles is None else _lower_projection(request, tiles, like)
    kernel = _target(target).kernel
    lead = request.batch, request.heads
    nq, nk = -(-request.q_tokens // request.block[0]), -(-request.kv_tokens // request.block[1])
    qk, pv = (WIDTHS[width].store or jnp.dtype(request.dtype) for width in (request.qk, request.pv))
    k_shape, v_shape = [(*lead, request.kv_tokens, request.head_dim)] * 2
    options: dict[str, Any] = {"device": request.device} if kernel is ampere else {}
    if request.layout != "rows":
        packed = hopper.packed(request.qk, request.pv, request.layout)
        options |= dict(layout=request.layout, kv_tokens=request.kv_tokens)
        if "k" in packed:
            k_shape = (*lead, -(-request.kv_tokens // (2 * KEYS)) * KEYS, request.head_dim)
        if request.pv != "bf16":
            v_shape = (*lead, request.head_dim // (1 + ("v" in packed)), nk * request.block[1])
    arrays = [
        like(*lead, request.q_tokens, request.head_dim, dtype=qk),
        like(*k_shape, dtype=qk),
        like(*v_shape, dtype=pv),
        like(request.heads, nq, dtype=jnp.int32),
        like(request.heads, nq, nk, dtype=jnp.int32),
        like(request.heads, request.q_tokens, dtype=jnp.int32),
        None if request.qk == "bf16" else like(*lead, request.q_tokens),
        None if request.qk == "bf16" else like(*lead, nk),
        None if request.pv == "bf16" else like(*lead, 1, request.head_dim),
        *([like(*lead, nq, request.kv_tokens)] if "delta" in request.features else []),
    ]
    run = partial(
        kernel.run, block=request.block, scale=request.head_dim**-0.5, qk=request.qk, pv=request.pv,
        p_scale=request.p_scale, out_dtype=jnp.dtype(request.dtype), **options,
    )  # fmt: skip
    with _architecture(request.device):
        return jax.jit(run).lower(*arrays).compile()


@contextmanager
def _architecture(device: str) -> Iterator[None]:
    """Inside, Mosaic lowers for a device that is not there: left to itself it takes the default one's, else 9.0."""
    from jax.experimental.mosaic.gpu import utils

    asked = utils._infer_arch  # private: nothing public says it (jax 0.11.2 to 0.12)
    utils._infer_arch = lambda: divmod(int(device.removeprefix("sm_")), 10)  # type: ignore[assignment]
    try:
        yield
    finally:
        utils._infer_arch = asked


def _lower_arrange(request: Request, like: Callable[..., Any]) -> Any:
    """arrange as models call it: q and k with an RMS norm and RoPE, k less a calibrated mean; groups by default."""
    tokens, heads, dim, role = request.kv_tokens, request.heads, request.head_dim, request.role
    norm, rope, mean = _extras(request, like)
    width, block = (request.pv if role == "v" else request.qk), request.block[role != "q"]
    run = partial(
        arrange_kernel.run, role=role, width=width, block=block,
        group=_GROUP[role], compute_mean=False, layout=request.layout, direct=request.layout == "ampere",
    )  # fmt: skip
    x = like(request.batch, tokens, heads, dim, dtype=jnp.dtype(request.dtype))
    return jax.jit(run).lower(x, like(heads, tokens, dtype=jnp.int32), norm, rope, mean).compile()


def _lower_projection(request: Request, tiles: dict[str, Any], like: Callable[..., Any]) -> Any:
    """A projection as models have them, C = H * D and a bias, then as arrange."""
    tokens, heads, dim, role = request.kv_tokens, request.heads, request.head_dim, request.role
    channels, dtype = heads * dim, jnp.dtype(request.dtype)
    weights = projection.Prepared(like(channels, heads, dim, dtype=dtype), like(heads, tokens, dtype=jnp.int32))
    width = request.pv if role == "v" else request.qk
    run = partial(projection.run, role=role, width=width, layout=request.layout, tiles=projection.Tiles(**tiles))
    x = like(request.batch, tokens, channels, dtype=dtype)
    return jax.jit(run).lower(x, weights, like(heads, dim), *_extras(request, like)).compile()


def _extras(request: Request, like: Callable[..., Any]) -> tuple[Norm | None, Rope | None, Any]:
    """(norm, RoPE, mean) of a role: of q and k an RMS norm and RoPE, of rounded k a calibrated mean."""
    tokens, heads, dim = request.kv_tokens, request.heads, request.head_dim
    if request.role == "v":
        return None, None, None
    mean = like(heads, dim) if request.role == "k" and request.qk != "bf16" else None
    return Norm("rms", like(dim)), Rope(like(tokens, dim // 2), like(tokens, dim // 2)), mean


def compiler_facts(text: str) -> Row:
    """{registers, spills (bytes stored), barriers, reallocates} from what the compiler says, perhaps twice.

    Raises ValueError where it does not say how many registers or spills: none found is not none.
    """

    def most(what: str, pattern: str, needed: bool = True) -> int:
        found = [int(number) for number in re.findall(pattern, text, re.IGNORECASE)]
        if needed and not found:
            raise ValueError(f"compiler output: expected the number of {what}, found {text[:500]!r}.")
        return max(found, default=0)

    return {
        "registers": most("registers", r"used (\d+) registers"),
        "spills": most("spills", r"(\d+) bytes spill stores"),
        "barriers": most("barriers", r"used (\d+) barriers", needed=False),
        "reallocates": "'setmaxnreg' ignored" not in text,
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    given["request"] |= {name: tuple(given["request"][name]) for name in ("block", "features")}
    lower(Request(**given["request"]), given["target"], given["tiles"])
