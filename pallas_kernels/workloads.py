"""Named work: one table for tests, benches, tuning, `paro doctor` and the support table."""

from dataclasses import replace
from typing import NamedTuple

from pallas_kernels._choose import Backend, NoBackend, Request, choose
from pallas_kernels.arrange import BACKENDS as ARRANGE
from pallas_kernels.block_attention import BACKENDS as BLOCK_ATTENTION


def _attention(
    tokens: int, heads: int, head_dim: int, block: tuple[int, int] = (64, 64), dtype: str = "bfloat16", batch: int = 1
) -> Request:
    return Request("block_attention", batch, heads, tokens, tokens, head_dim, dtype, block)


# Token counts: CogVideoX-5B 226 text + 13 * 30 * 45, with guidance a batch of 2; Wan2.1-14B 21 * 30 * 52 and
# 21 * 45 * 80; Flux.1 512 text + 64 * 64 and 128 * 128.
WORKLOADS: dict[str, Request] = {
    "cogvideox_5b": _attention(17776, 48, 64, batch=2),
    "wan_14b_480p": _attention(32760, 40, 128),
    "wan_14b_720p": _attention(75600, 40, 128),
    "flux_1024": _attention(4608, 24, 128),
    "flux_2048": _attention(16896, 24, 128),
    "tiny_video": _attention(16 + 3 * 5 * 7, 2, 32, (64, 64), "float32"),
    "tiny_cross": replace(_attention(130, 2, 64, (64, 128), "float32"), kv_tokens=257),
    "tiny_one": _attention(1, 1, 32, (64, 64), "float32"),
}


def backends(request: Request) -> tuple[Backend, ...]:
    """The backends of a request's op, in order of preference."""
    return {"block_attention": BLOCK_ATTENTION, "arrange": ARRANGE}[request.op]


class SupportRow(NamedTuple):
    """What one backend says to one (op, device, widths, dtype)."""

    op: str
    backend: str
    device: str
    qk: str
    pv: str
    dtype: str
    default: bool
    why_not: str | None  # None: it serves


_DEVICES = ("cpu", "tpu", "sm_80", "sm_86", "sm_89", "sm_90")
_WIDTHS = (
    ("bf16", "bf16"), ("fp8", "fp8"), ("int8", "bf16"), ("int8", "int8"), ("int4", "int8"), ("int4", "int4"),
    ("int4", "fp8"), ("fp4", "fp4"),
)  # fmt: skip
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def support_rows(name: str = "cogvideox_5b") -> list[SupportRow]:
    """Every backend's answer on the shapes of one workload: the same `why_not` that a call asks."""
    if name not in WORKLOADS:
        raise ValueError(f"name: expected one of {', '.join(WORKLOADS)}, got {name!r}.")
    rows = []
    for op in ("block_attention", "arrange"):
        for device in _DEVICES:
            for qk, pv in _WIDTHS:
                for dtype in _DTYPES:
                    role = "k" if op == "arrange" else ""
                    request = replace(WORKLOADS[name], op=op, device=device, qk=qk, pv=pv, dtype=dtype, role=role)
                    rows += [
                        SupportRow(op, b.name, device, qk, pv, dtype, b.default, b.why_not(request))
                        for b in backends(request)
                    ]
    return rows


def support_table(name: str = "cogvideox_5b") -> str:
    """`support_rows` folded into a table: per op, backend and pair of widths, the dtypes and devices served."""
    rows = support_rows(name)
    lines = [("op", "backend", "qk / pv", "dtypes", "devices", "chosen by default")]
    for op, backend, qk, pv, default in dict.fromkeys((r.op, r.backend, r.qk, r.pv, r.default) for r in rows):
        served = [r for r in rows if (r.op, r.backend, r.qk, r.pv) == (op, backend, qk, pv) and r.why_not is None]
        dtypes = ", ".join(dict.fromkeys(r.dtype for r in served)) or "none"
        devices = ", ".join(dict.fromkeys(r.device for r in served)) or "none"
        lines.append((op, backend, f"{qk} / {pv}", dtypes, devices, "yes" if default else "only when named"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def served_by(request: Request) -> str | None:
    """The name of the backend that `choose` takes, or None."""
    try:
        return choose(request, backends(request)).name
    except NoBackend:
        return None
