"""What is measured: one `Job` a row, the most important first, so that a run that ends early still tells something."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pallas_kernels.bench import peers
from paro_jax.bench.cases import DENSITIES, GRIDS

WIDTHS = (("bf16", "bf16"), ("int8", "int8"), ("fp8", "fp8"), ("int8", "bf16"))
MASKS = ("calibrated", "random")
KINDS = ("attention", "peer", "path", "projection", "scaling")
SCALING_TOKENS = (4096, 8192, 16384, 32768, 65536, 131072)
SCALING_HEADS, SCALING_DENSITY = 8, 0.2
# These decide: CogVideoX has 64 channels a head, FLUX at 2048 pixels 128 at 16k tokens.
_FIRST = ("cogvideox_5b", "flux_2048")
_MAIN = (("int8", "int8"), ("bf16", "bf16"))


@dataclass(frozen=True)
class Settings:
    """What all rows of a run share. `tokens`, `heads`: None for the workload's own."""

    device: str  # as `Request.device`
    backend: str
    dtype: str
    block: tuple[int, int]
    tokens: int | None = None
    heads: int | None = None
    densities: tuple[float, ...] = DENSITIES
    quick: bool = False
    seconds: float = 0.3  # of measuring, a row
    torch_python: str = "python3"

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> "Settings":
        fields: dict[str, Any] = {**value, "block": tuple(value["block"]), "densities": tuple(value["densities"])}
        return cls(**fields)


@dataclass(frozen=True)
class Job:
    """One row. `kind`: "ceiling", "attention" (ours), "peer", "path", "projection", "scaling" or "tune"."""

    kind: str
    name: str  # of the workload; for a ceiling, of what is measured
    contestant: str = ""
    qk: str = "bf16"
    pv: str = "bf16"
    mask: str = "dense"
    density: float = 1.0
    tokens: int | None = None  # of "scaling"
    tiles: dict[str, int] | None = field(default=None, hash=False)  # of "tune"
    role: str = ""  # of "projection"

    def __str__(self) -> str:
        if self.kind == "ceiling":
            return f"ceiling {self.name}"
        if self.kind == "projection":
            return f"{self.name} projection {self.role} {self.qk}"
        what = f"{self.contestant}" if self.kind == "peer" else f"{self.contestant} {self.qk}/{self.pv}"
        kept = "dense" if self.density == 1 else f"{100 * self.density:g} % {self.mask}"
        more = f" {self.tokens} tokens" if self.tokens else ""
        more += f" {self.tiles}" if self.tiles else ""
        return f"{self.name} {self.kind} {what}, {kept}{more}"

    @property
    def facts(self) -> dict[str, Any]:
        """The part of a row that was known before."""
        return {**asdict(self), "job": str(self)}


def jobs(
    settings: Settings,
    workloads: Sequence[str] = tuple(GRIDS),
    widths: Sequence[tuple[str, str]] = WIDTHS,
    masks: Sequence[str] = MASKS,
    scaling: Sequence[int] = SCALING_TOKENS,
    kinds: Sequence[str] = KINDS,
) -> list[Job]:
    """Every row of a run, by falling importance; rows of equal importance that share tensors stand together.

    Ceilings are measured whatever `kinds` says.
    """
    found = [Job("ceiling", name) for name in _ceilings(settings)]
    for workload in workloads:
        for density in sorted(settings.densities, reverse=True):
            for mask in masks if density < 1 else ("dense",):
                for qk, pv in widths:
                    found.append(Job("attention", workload, settings.backend, qk, pv, mask, density))
                found.append(Job("peer", workload, "torch flex", mask=mask, density=density))
        found += [Job("peer", workload, peer.name, *peer.widths) for peer in peers.PEERS]
        found.append(Job("peer", workload, "torch sdpa"))
        for qk, pv in [w for w in widths if w in _MAIN] or widths[:1]:
            for density in sorted({max(settings.densities), _nearest(0.2, settings.densities)}, reverse=True):
                mask = "dense" if density == 1 else masks[0]
                found.append(Job("path", workload, settings.backend, qk, pv, mask, density))
        found += [Job("projection", workload, "fused", "int8", "int8", role=role) for role in ("q", "k")]
    for tokens in scaling:
        qk, pv = widths[-1] if ("int8", "int8") not in widths else ("int8", "int8")
        found.append(Job("scaling", "scaling", settings.backend, qk, pv, "random", SCALING_DENSITY, tokens))
    found = sorted((job for job in found if job.kind in ("ceiling", *kinds)), key=_rank)
    return [*found, Job("ceiling", "again")]


def tuning(settings: Settings, requests: Iterable[tuple[Any, Any, Sequence[Any]]]) -> list[Job]:
    """Rows of `--tune`: for every (workload, widths, candidates) each candidate, at a fifth of the blocks."""
    return [
        Job("tune", workload, settings.backend, qk, pv, "random", SCALING_DENSITY, tiles=asdict(tiles))
        for workload, (qk, pv), candidates in requests
        for tiles in candidates
    ]


def _ceilings(settings: Settings) -> list[str]:
    names = ["copy", settings.dtype, "int8"]
    return [*names, "float8_e4m3fn"] if settings.device in ("sm_89", "sm_90") else names


def _nearest(density: float, densities: Sequence[float]) -> float:
    return min(densities, key=lambda d: abs(d - density))


def _rank(job: Job) -> int:
    """Less is sooner; sorting is stable, so each rank keeps its workloads together."""
    if job.kind == "ceiling":
        return 0
    first, main, eight = job.name in _FIRST, (job.qk, job.pv) in _MAIN, (job.qk, job.pv) == _MAIN[0]
    cudnn = job.contestant.startswith("cudnn") or job.contestant == "jax.nn"
    # What `targets` asks for, then cost against kept blocks, then the rest.
    if first and (cudnn or (job.kind == "attention" and job.mask != "random" and (eight or main and job.density == 1))):
        return 1
    if first and job.kind == "path" and (eight or job.density == 1):
        return 2
    if first and job.contestant == "torch flex" and job.mask != "random":
        return 3
    if job.kind == "scaling":
        return 4
    if first and job.kind == "projection":
        return 5
    if first and job.mask != "random" and (job.kind == "peer" or job.kind == "path" or main):
        return 5
    if not first and (cudnn or (job.kind == "attention" and main and job.mask != "random")):
        return 6
    return 7 if first else 8
