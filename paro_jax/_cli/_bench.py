"""`paro bench`: attention on named workloads, beside peers on the same tensors; tiles by measurement; promises."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paro_jax._cli import _show
from paro_jax.bench.promises import FIGURES

if TYPE_CHECKING:
    from paro_jax.bench.jobs import Job, Settings

Row = dict[str, Any]
_CPU_TOKENS, _CPU_HEADS = 2048, 2
_QUICK_TOKENS = 512
_KEEP_S = 2.0  # the file is written at most this often


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure attention on named workloads, next to its peers on the same tensors",
        description="Measure attention on named workloads at several densities and widths, next to every peer that is "
        "installed, and write DIR/bench.json and DIR/bench.png. Each row runs in a process that may fail without the "
        "others. Let nothing else run. Exit status 1: a row failed; what is missing here is no failure. On a "
        f"CPU workloads are shrunk to {_CPU_TOKENS} tokens and {_CPU_HEADS} heads unless --tokens and --heads say so.",
    )
    parser.add_argument(
        "--backend", metavar="NAME", help="hopper, xla, ... (default: the kernel for this device, else xla)"
    )
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="(default: all)")
    parser.add_argument(
        "--density",
        type=_show.density,
        nargs="+",
        metavar="D",
        help="kept blocks / all blocks (default 1 0.5 0.3 0.2 0.125)",
    )
    parser.add_argument(
        "--widths", type=_widths, nargs="+", metavar="QK/PV", help="(default bf16/bf16 int8/int8 fp8/fp8 int8/bf16)"
    )
    parser.add_argument(
        "--kinds",
        choices=["attention", "peer", "path", "projection", "scaling"],
        nargs="+",
        help="of rows (default all)",
    )
    parser.add_argument("--masks", choices=["calibrated", "random"], nargs="+", help="(default both)")
    parser.add_argument(
        "--block", type=_show.positive, nargs=2, metavar="B", help="(default 128 128 on sm_90, else 64 64)"
    )
    parser.add_argument("--tokens", type=_show.positive, metavar="N", help="shrink the workloads to about N tokens")
    parser.add_argument("--heads", type=_show.positive, metavar="N", help="and to N heads")
    parser.add_argument(
        "--quick", action="store_true", help=f"two workloads of {_QUICK_TOKENS} tokens, few rows: does all of it work?"
    )
    parser.add_argument("--gpu", action="store_true", help="without a GPU fail instead of measuring the CPU")
    parser.add_argument("--budget", type=_show.positive, metavar="S", help="seconds for all rows; most important first")
    parser.add_argument(
        "--row-limit", type=_show.positive, default=180, metavar="S", help="seconds for one row (default 180)"
    )
    parser.add_argument("--torch-python", default=sys.executable, metavar="PATH", help="a Python that has torch")
    parser.add_argument("--resume", action="store_true", help="take over what DIR/bench.json has of the same run")
    parser.add_argument(
        "--tune", action="store_true", help="measure every tile instead, and write the table of this device"
    )
    parser.add_argument(
        "--promises", choices=list(FIGURES), nargs="*", metavar="FIGURE",
        help=f"instead: figures with targets that need no peer: {', '.join(FIGURES)} (default all)",
    )  # fmt: skip
    parser.add_argument(
        "--problems", type=_show.positive, default=300, metavar="N", help="of the promise invisibility (default 300)"
    )
    parser.add_argument("--out", type=_show.path, default=Path("out/bench"), metavar="DIR", help="(default out/bench)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.promises is not None:
        return _promises(args)
    from paro_jax.bench import run as _run
    from paro_jax.bench.worker import Worker

    start = time.monotonic()
    _check(args)
    _show.probe("--out", args.out, folder=True)
    worker, file = Worker(), args.out / ("tune.json" if args.tune else "bench.json")
    result: Row = {"about": {}, "rows": []}
    known: list[Row] = []
    written = time.monotonic()

    def keep(rows: Sequence[Row]) -> None:
        nonlocal written
        done = {row["job"] for row in rows}  # what an earlier run had is not lost when this one is stopped too
        result["rows"] = [*rows, *(row for row in known if row["job"] not in done)]
        if time.monotonic() - written > _KEEP_S:
            _written(file, result)
            written = time.monotonic()

    before = signal.signal(signal.SIGTERM, _stop)
    try:
        machine = worker.machine()
        settings, problem = _settings(args, machine)
        plan = _tunings(args, settings) if args.tune else _plan(args, settings)
        result["about"] = {"machine": machine, "arguments": asdict(settings) | {"tune": args.tune}}
        known = _known(file, result["about"]) if args.resume else []

        def ask(job: Job, limit: float) -> Row:
            if problem is not None:
                return {**job.facts, "status": "failed", "reason": problem}
            return worker.ask(job, settings, limit)

        budget = None if args.budget is None else max(0.0, args.budget - (time.monotonic() - start))
        note = _show.note if problem is None else lambda message: None  # that was said, and holds for every row
        rows = _run.run(plan, ask, limit=args.row_limit, budget=budget, known=known, note=note, keep=keep)
    finally:
        worker.close()
        if result["rows"]:  # also of a run that is stopped
            _written(file, result)
        signal.signal(signal.SIGTERM, before)
    return _tuned(args, settings, result, rows) if args.tune else _told(args, settings, result, rows, file)


def _stop(number: int, frame: Any) -> None:
    """What `timeout` sends is to stop like Ctrl-C: the rows so far are written, the processes end."""
    raise KeyboardInterrupt


def _written(file: Path, result: Row) -> bool:
    """Write the file; what keeps it from being written (a full disk) is a line, for the tables are still to come."""
    try:
        _show.write_json(file, result)
    except OSError as error:
        _show.note(f"{file} cannot be written: {error.strerror or error}")
        return False
    return True


def _check(args: argparse.Namespace) -> None:
    """UserError for what no device would change."""
    from pallas_kernels.block_attention import BACKENDS
    from paro_jax.bench.cases import GRIDS

    for name in args.workloads or ():
        if name not in GRIDS:
            raise _show.UserError(f"--workloads: expected some of {', '.join(GRIDS)}; got {name!r}")
    if shutil.which(args.torch_python) is None:
        raise _show.UserError(f"--torch-python: expected a program, found none at {args.torch_python}")
    names = [backend.name for backend in BACKENDS]
    if args.backend is not None and args.backend not in names:
        raise _show.UserError(f"--backend: expected one of {', '.join(names)}; got {args.backend!r}")


def _settings(args: argparse.Namespace, machine: Row) -> tuple[Settings, str | None]:
    """What the rows share, and why none of them can be measured, if so."""
    from paro_jax.bench.cases import DENSITIES
    from paro_jax.bench.jobs import Settings

    device, problem = machine.get("backends_see", "unknown"), machine.get("problem")
    is_gpu = device.startswith("sm_")
    if problem is None and args.gpu and not is_gpu:
        problem = f"no GPU: jax sees {machine['device']} alone ({machine['no_gpu']})"
    if problem is not None:
        _show.note(f"no row can be measured: {problem}")
        device, is_gpu = "sm_90" if args.gpu else device, args.gpu  # the rows that would have been
    tokens, heads = args.tokens, args.heads
    if args.quick:
        tokens, heads = tokens or _QUICK_TOKENS, heads or 2
    elif not is_gpu and tokens is None:
        tokens, heads = _CPU_TOKENS, heads or _CPU_HEADS
    densities = args.density or ((1.0, 0.3) if args.quick else DENSITIES)
    block = (args.block[0], args.block[1]) if args.block else (128, 128) if device == "sm_90" else (64, 64)
    settings = Settings(
        device=device, backend=args.backend or _backend(device), dtype="bfloat16" if is_gpu else "float32",
        block=block, tokens=tokens,
        heads=heads, densities=tuple(dict.fromkeys(densities)), quick=args.quick or not is_gpu,
        seconds=0.1 if args.quick else 0.3, torch_python=args.torch_python,
    )  # fmt: skip
    return settings, problem


def _backend(device: str) -> str:
    """The first backend that serves a plain int8 call on this device, those that serve only when named included."""
    from pallas_kernels.block_attention import BACKENDS
    from pallas_kernels.workloads import WORKLOADS

    request = replace(WORKLOADS["flux_2048"], qk="int8", pv="int8", device=device)
    return next((b.name for b in BACKENDS if b.name != "reference" and b.why_not(request) is None), "xla")


def _plan(args: argparse.Namespace, settings: Settings) -> list[Job]:
    from paro_jax.bench import jobs

    options: dict[str, Any] = {}
    if args.quick:
        options |= {"workloads": ("cogvideox_5b", "flux_2048"), "widths": (("bf16", "bf16"), ("int8", "int8"))}
    options |= {"scaling": _scaling(args, settings)}
    for name in ("workloads", "widths", "masks", "kinds"):
        if getattr(args, name):
            options[name] = tuple(dict.fromkeys(getattr(args, name)))
    return jobs.jobs(settings, **options)


def _scaling(args: argparse.Namespace, settings: Settings) -> tuple[int, ...]:
    from paro_jax.bench import jobs

    if settings.tokens is None:
        return jobs.SCALING_TOKENS
    return tuple(settings.tokens * factor for factor in ((1, 2, 4) if args.quick else (1, 2, 4, 8)))


def _tunings(args: argparse.Namespace, settings: Settings) -> list[Job]:
    """A job per workload, widths and tile of the backend."""
    from pallas_kernels.block_attention import BACKENDS
    from paro_jax.bench import jobs
    from paro_jax.bench.cases import GRIDS

    backend = next(b for b in BACKENDS if b.name == settings.backend)
    if backend.candidates is None:
        raise _show.UserError(f"--tune: backend {backend.name} has no tiles to choose from")
    found = []
    for workload in args.workloads or GRIDS:
        for widths in args.widths or jobs.WIDTHS:
            request = _request(settings, workload, widths)
            if reason := backend.why_not(request):
                raise _show.UserError(f"--tune: {backend.name} does not serve {'/'.join(widths)} here: {reason}")
            found.append((workload, widths, backend.candidates(request)))
    return jobs.tuning(settings, found)


def _request(settings: Settings, workload: str, widths: tuple[str, str]) -> Any:
    from paro_jax.bench.jobs import Job
    from paro_jax.bench.measure import requested, sized

    job = Job("tune", workload, settings.backend, *widths)
    return requested(sized(job, settings), job, settings)


def _tuned(args: argparse.Namespace, settings: Settings, result: Row, rows: list[Row]) -> int:
    """Write the table of tiles that the chooser reads, and say where."""
    from pallas_kernels import _tiles
    from paro_jax.bench import report
    from paro_jax.bench.run import status

    def about(row: Row) -> Row:
        request = _request(settings, row["name"], (row["qk"], row["pv"]))
        return {**_tiles.key(request, row["contestant"]), "q_tokens": request.q_tokens}

    table = report.tile_rows(rows, about)
    if not any("ms" in entry for row in table for entry in row["candidates"]):
        reason = next((row["reason"] for row in reversed(rows) if row["status"] != "measured"), "there are none")
        raise _show.UserError(f"--tune: no call had all its tiles measured: {reason}")
    file = _tiles.write(table, result["about"]["machine"])
    if args.json:
        print(_show.dumps({**result, "table": str(file)}))
    else:
        shown = [{**row, "tiles": ", ".join(f"{k} {v}" for k, v in row["tiles"].items())} for row in rows]
        _show.table("tiles", shown, ("name", "qk", "pv", "tiles", "ms", "low_ms", "high_ms", "status"))
        left = sum(row["status"] == "not reached" for row in rows)
        print(f"{file}: what calls on this device use from now on")
        if left:
            print(f"not reached: {left} tiles; the calls that could use them keep what they had (--resume goes on)")
    return status(rows)


def _told(args: argparse.Namespace, settings: Settings, result: Row, rows: list[Row], file: Path) -> int:
    """Write and show the whole result."""
    from paro_jax.bench import report
    from paro_jax.bench.cases import GRIDS
    from paro_jax.bench.machine import gpu
    from paro_jax.bench.run import status
    from paro_jax.bench.targets import targets

    machine = result["about"]["machine"]
    result["about"]["gpu_after"] = gpu()
    rows = report.finished(rows)
    result |= {
        "rows": rows,
        "drift": report.drift(rows),
        "linearity": report.linearity(rows),
        "targets": targets(rows, settings.backend) if _full(settings) else [],
    }
    written, picture = _written(file, result), file.with_suffix(".png")
    if args.json:
        print(_show.dumps(result))
    else:
        _print(settings, result)
    sys.stdout.flush()  # the tables do not wait for the chart
    try:
        shapes = {name: _shape(settings, name) for name in dict.fromkeys(r["name"] for r in rows) if name in GRIDS}
        title = f"{machine.get('device', 'no device')}, jax {machine.get('jax', '?')}, {machine.get('date', '?')}"
        report.draw(rows, title, picture, shapes)
    except (OSError, ImportError) as error:  # a full disk, no matplotlib
        _show.note(f"{picture} cannot be drawn: {error}")
        written = False
    if not args.json:
        print(f"in {args.out}: {file.name}, {picture.name}" if written else f"not all could be written to {args.out}")
    return status(rows) if written else 1


def _full(settings: Settings) -> bool:
    """Whether this run is one that the targets are about."""
    return settings.tokens is None and settings.heads is None and settings.device.startswith("sm_")


def _shape(settings: Settings, workload: str) -> str:
    """What was measured under the name of a workload: it may have been shrunk."""
    from paro_jax.bench.jobs import Job
    from paro_jax.bench.measure import sized

    case = sized(Job("attention", workload), settings)
    return f"{case.batch} x {case.heads} heads, {case.grid.tokens} tokens, D {case.head_dim}, {case.dtype}"


def _print(settings: Settings, result: Row) -> None:
    """The whole result, what decides last."""
    machine, rows = result["about"]["machine"], result["rows"]
    _show.fields("", {k: v for k, v in machine.items() if not isinstance(v, dict)} | (machine.get("gpu") or {}))
    if any(row["status"] == "measured" for row in rows):
        _tables(settings, result)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "measured":
            reasons.setdefault(f"{row['status']}: {row['reason']}", []).append(row["job"])
    for reason, some in reasons.items():
        print(f"{reason} [{len(some)}: {'; '.join(some[:3])}{'; ...' if len(some) > 3 else ''}]")
    notes = {row["timer_note"] for row in rows if row.get("timer_note")}
    print("\n".join(f"timed on the host: {note}" for note in sorted(notes)))
    if result["targets"]:
        some = [
            {**t, "target": f"{t['bound']} {t['target']:g}", "met": t["reason"][:90] if t["reason"] else t["met"]}
            for t in result["targets"]
        ]
        _show.table("targets", some, ("name", "target", "measured", "kernel_alone", "met"))


def _tables(settings: Settings, result: Row) -> None:
    """The tables of rows, by kind and workload."""
    from paro_jax.bench import report
    from paro_jax.bench.cases import GRIDS

    rows = [
        {**r, "widths": report.widths(r), "kept": r.get("kept_density")}
        for r in result["rows"]
        if r["status"] != "not reached"  # there can be hundreds
    ]
    _show.table(
        "ceilings", [r for r in rows if r["kind"] == "ceiling"], ("name", "of", "rate", "unit", "timer", "status")
    )
    if result["drift"] is not None:
        print(f"drift: the last product ran at {result['drift']:.2f} of the first one's rate\n")
    places = {mask: i for i, mask in enumerate(("dense", "calibrated", "random"))}
    for name in GRIDS:
        some = [r for r in rows if r["kind"] in ("attention", "peer") and r["name"] == name]
        some.sort(key=lambda r: (-r["density"], places[r["mask"]], r["kind"]))
        over = report.baseline(rows, name)
        title = f"{name}: {_shape(settings, name)}, blocks of {settings.block[0]} x {settings.block[1]}"
        columns = ("contestant", "widths", "mask", "kept", "ms", "low_ms", "high_ms", "tops", "percent_of_ceiling")
        columns += (*(("speedup",) if over else ()), "error", "timer", "status")
        _show.table(title + (f"; speedup over {over['contestant']}" if over else ""), some, columns)
    _show.table(
        "a whole layer: projections, attention, output",
        sorted((r for r in rows if r["kind"] == "path"), key=lambda r: (list(GRIDS).index(r["name"]), r["qk"])),
        ("name", "widths", "kept", "ms", "dense_layer_ms", "layer_speedup", "overhead_ms",
         "overhead_of_dense_attention", "status"),
    )  # fmt: skip
    _show.table(
        "projection to blocks: one kernel (ms), XLA's product and arrange (apart_ms)",
        [r for r in rows if r["kind"] == "projection"],
        ("name", "role", "widths", "ms", "whole_ms", "apart_ms", "speedup", "error", "timer", "status"),
    )
    _show.table("cost against kept blocks", [r for r in rows if r["kind"] == "scaling"],
                ("tokens", "heads", "widths", "kept_blocks", "ms", "tops", "status"))  # fmt: skip
    if line := result["linearity"]:
        print(
            f"time grows as kept blocks to the power {line['slope']:.3f}, where 1 is in proportion: "
            f"{line['least_ns_per_block']:,.0f} to {line['most_ns_per_block']:,.0f} ns a block\n"
        )


_SAME = ("device", "backends_see", "python", "paro_jax", "commit", "jax", "jaxlib")


def _known(file: Path, about: Row) -> list[Row]:
    """The rows of an earlier run of the same command on the same machine; UserError for another's."""
    try:
        earlier = json.loads(file.read_text())
        before, rows = earlier["about"], earlier["rows"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise _show.UserError(f"--resume: {file} is not what paro bench writes ({error!r}); delete it") from error
    now = json.loads(_show.dumps(about))
    different = [f"{name} {before['machine'].get(name)} then, {now['machine'].get(name)} now" for name in _SAME
                 if before["machine"].get(name) != now["machine"].get(name)]  # fmt: skip
    then = before["arguments"]
    different += [f"{name} {then.get(name)} then, {value} now" for name, value in now["arguments"].items()
                  if then.get(name) != value]  # fmt: skip
    if different:
        raise _show.UserError(f"--resume: {file} is of another run: {'; '.join(different)}; give another --out")
    return rows


def _promises(args: argparse.Namespace) -> int:
    from paro_jax.bench.machine import machine

    file = args.out / "promises.json"
    _show.probe("--out", args.out, folder=True)
    rows: list[Row] = []
    for name in args.promises or FIGURES:
        _show.note(f"measuring {name} ...")
        start = time.perf_counter()
        rows += FIGURES[name](args.problems, _show.note)
        _show.note(f"measuring {name} took {time.perf_counter() - start:.0f} s")
    result = {"machine": machine(), "rows": rows}
    _show.write_json(file, result)
    if args.json:
        print(_show.dumps(result))
        return 0
    _show.fields("", {k: v for k, v in result["machine"].items() if v is not None})
    _show.table("figures", rows, ("name", "measured", "target", "unit", "met"))
    for row in rows:
        extra = {k: v for k, v in row.items() if k not in ("name", "measured", "target", "unit", "met")}
        print(f"{row['name']}: " + ", ".join(f"{k.replace('_', ' ')} {_show._cell(v)}" for k, v in extra.items()))
    return 0


def _widths(text: str) -> tuple[str, str]:
    """argparse type: widths of the two products."""
    from pallas_kernels._check import WIDTHS

    qk, _, pv = text.partition("/")
    if qk not in WIDTHS or pv not in WIDTHS:
        raise ValueError
    return qk, pv


_widths.__name__ = "pair of widths such as int8/bf16"
