"""What the kernels are to reach on an H100 or H200 at full size: what was measured, met or not, or why it was not.

Our time is the kernel's plus what permuting, quantising and masks cost around it (`overhead_ms` of the workload's path
rows); `kernel_alone` is the same figure without that.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from paro_jax.bench.report import linearity

Row = dict[str, Any]
D64, D128 = "cogvideox_5b", "flux_2048"  # 17776 tokens; 16896
_EIGHT, _WIDE = {"qk": "int8", "pv": "int8"}, {"qk": "bf16", "pv": "bf16"}


class _Lacking(Exception):
    """A row that a target needs was not measured, and why. `so_far`: the worst of those that were."""

    so_far: tuple[float, float] | None = None


def targets(rows: Sequence[Row], backend: str) -> list[Row]:
    """A row per target: `name, bound, target, measured, kernel_alone, met, reason`.

    Where a row that it needs is lacking, `measured` and `met` are None and `reason` says which one and why; a target of
    the worst of several rows is missed all the same where one of those that were measured misses it.
    """
    seek = _Rows(rows, backend)
    found = [
        _target("dense int8/int8, D 128: speed over cuDNN fp8", "at least", 1.05,
                lambda: seek.speed(D128, 1.0, _EIGHT, seek.peer(D128, "cudnn fp8"))),
        _target("dense int8/int8, D 64: speed over cuDNN bf16", "at least", 1.5,
                lambda: seek.speed(D64, 1.0, _EIGHT, seek.peer(D64, "cudnn bf16"))),
        _target("20 % int8/int8, D 64: speed over cuDNN bf16", "at least", 6,
                lambda: seek.speed(D64, 0.2, _EIGHT, seek.peer(D64, "cudnn bf16"))),
        _target("20 % int8/int8, D 128: speed over cuDNN bf16", "at least", 7,
                lambda: seek.speed(D128, 0.2, _EIGHT, seek.peer(D128, "cudnn bf16"))),
        _target("dense bf16, D 64: speed over cuDNN bf16", "at least", 0.9,
                lambda: seek.speed(D64, 1.0, _WIDE, seek.peer(D64, "cudnn bf16"))),
        _target("dense bf16, D 128: speed over cuDNN bf16", "at least", 0.9,
                lambda: seek.speed(D128, 1.0, _WIDE, seek.peer(D128, "cudnn bf16"))),
    ]  # fmt: skip
    for name, dim in ((D64, 64), (D128, 128)):
        found += [
            _target(f"int8/int8, D {dim}: time over dense, less density, worst", "at most", 0.03,
                    lambda name=name: _worst(max, seek.above(name))),
            _target(f"int8/int8, D {dim}: speed over FlexAttention, same mask, worst", "at least", 1,
                    lambda name=name: _worst(min, seek.against_flex(name))),
        ]  # fmt: skip
    return [
        *found,
        _target("permute + quantise + mask over dense attention, D 64", "at most", 0.01, lambda: seek.overhead_share()),
        _target("slope of log time over log kept blocks, from 1", "at most", 0.05, lambda: seek.slope()),
    ]


class _Rows:
    """The rows of a run, asked for by what they are of."""

    def __init__(self, rows: Sequence[Row], backend: str):
        self.rows, self.backend = rows, backend

    def row(self, **facts: Any) -> Row:
        some = [row for row in self.rows if all(row.get(name) == value for name, value in facts.items())]
        for row in some:
            if row["status"] == "measured":
                return row
        what = " ".join(str(facts.get(name, "")) for name in ("name", "kind", "contestant"))
        raise _Lacking(f"{some[0]['job']}: {some[0]['status']}: {some[0]['reason']}" if some else f"no row: {what}")

    def peer(self, name: str, contestant: str, **facts: Any) -> Row:
        return self.row(kind="peer", name=name, contestant=contestant, **facts)

    def ours(self, name: str, density: float, widths: dict[str, str]) -> Row:
        mask = "dense" if density == 1 else "calibrated"
        return self.row(kind="attention", name=name, contestant=self.backend, density=density, mask=mask, **widths)

    def path(self, name: str, widths: dict[str, str]) -> Row:
        return self.row(kind="path", name=name, contestant=self.backend, density=1.0, **widths)

    def times(self, name: str, density: float, widths: dict[str, str]) -> tuple[float, float]:
        """Milliseconds of our attention with what is around it, and of the kernel alone."""
        ms = self.ours(name, density, widths)["ms"]
        return ms + max(0.0, self.path(name, widths)["overhead_ms"]), ms

    def speed(self, name: str, density: float, widths: dict[str, str], theirs: Row) -> tuple[float, float]:
        whole, kernel = self.times(name, density, widths)
        return theirs["ms"] / whole, theirs["ms"] / kernel

    def densities(self, name: str) -> list[float]:
        """Those asked for that can be had."""
        some = [row for row in self.rows if row["kind"] == "attention" and row["name"] == name]
        some = [row for row in some if row["mask"] != "random" and row["status"] != "missing"]
        return list(dict.fromkeys(row["density"] for row in some))

    def above(self, name: str) -> Iterator[tuple[float, float]]:
        dense = self.times(name, 1.0, _EIGHT)
        for density in self.densities(name):
            if density < 1:
                kept = self.ours(name, density, _EIGHT)["kept_density"]
                whole, kernel = self.times(name, density, _EIGHT)
                yield whole / dense[0] - kept, kernel / dense[1] - kept

    def against_flex(self, name: str) -> Iterator[tuple[float, float]]:
        for density in self.densities(name):
            mask = "dense" if density == 1 else "calibrated"
            yield self.speed(name, density, _EIGHT, self.peer(name, "torch flex", density=density, mask=mask))

    def overhead_share(self) -> tuple[float, None]:
        return self.path(D64, _EIGHT)["overhead_of_dense_attention"], None

    def slope(self) -> tuple[float, None]:
        some = [row for row in self.rows if row["kind"] == "scaling"]
        for row in some:
            if row["status"] != "measured":
                raise _Lacking(f"{row['job']}: {row['status']}: {row['reason']}")
        if (line := linearity(some)) is None:
            raise _Lacking("no row: scaling")
        return abs(line["slope"] - 1), None


def _worst(worst: Callable[..., float], pairs: Iterator[tuple[float, float]]) -> tuple[float, float]:
    every: list[tuple[float, float]] = []
    try:
        for pair in pairs:
            every.append(pair)
    except _Lacking as why:
        if every:
            why.so_far = worst(whole for whole, _ in every), worst(kernel for _, kernel in every)
        raise
    if not every:
        raise _Lacking("no row of ours below full density")
    return worst(whole for whole, _ in every), worst(kernel for _, kernel in every)


def _target(name: str, bound: str, target: float, figure: Callable[[], tuple[float, float | None]]) -> Row:
    about = {"name": name, "bound": bound, "target": target}

    def reached(measured: float) -> bool:
        return measured >= target if bound == "at least" else measured <= target

    try:
        measured, kernel = figure()
    except _Lacking as why:
        if why.so_far is not None and not reached(why.so_far[0]):  # the rest cannot mend it
            measured, kernel = why.so_far
            return {
                **about,
                "measured": measured,
                "kernel_alone": kernel,
                "met": False,
                "reason": f"no; and not measured: {why}",
            }
        return {**about, "measured": None, "kernel_alone": None, "met": None, "reason": f"not measured: {why}"}
    return {**about, "measured": measured, "kernel_alone": kernel, "met": reached(measured), "reason": None}
