"""`paro doctor`: what is installed, which devices there are, and which backend would serve which workload here."""

import argparse
import importlib.metadata
import platform
from dataclasses import replace
from typing import Any

from paro_jax import __version__
from paro_jax._cli import _show

_PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "flax",
    "optax",
    "orbax-checkpoint",
    "safetensors",
    "dm-pix",
    "matplotlib",
)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="versions, devices, and which backend serves what here, and why the others do not",
        description="Show versions, devices, and which backend serves each named workload here, with reasons.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(_show.dumps(report))
        return 0
    _show.fields("", {"python": report["python"], "system": report["system"], **report["packages"]})
    print(f"tiles: {report['tiles']}\n")
    _show.table(f"devices (the backends see {report['backends_see']})", report["devices"])
    _show.table("who serves the named workloads here", report["workloads"])
    # One line per backend and reason, however many workloads it holds for.
    lines: dict[tuple[str, str, str], list[str]] = {}
    for row in report["why_not"]:
        if row["why_not"]:
            lines.setdefault((row["op"], row["backend"], row["why_not"]), []).append(row["workload"])
    _show.table(
        "who does not, and why",
        [{"op": o, "backend": b, "why not": why, "workloads": names} for (o, b, why), names in lines.items()],
    )
    print("what each backend can serve, by device (shapes of cogvideox_5b)")
    print(report["support_table"])
    return 0


def examine() -> dict[str, Any]:
    """The report as plain values."""
    import jax

    from pallas_kernels import _tiles, device_name, support_table, workloads

    device = device_name()
    served, why_not = [], []
    for name, workload in workloads.WORKLOADS.items():
        for op, role in (("block_attention", ""), ("arrange", "k")):
            request = replace(workload, op=op, role=role, device=device)
            served.append({"workload": name, "op": op, "backend": workloads.served_by(request) or "none"})
            for backend in workloads.backends(request):
                reason = backend.why_not(request)
                if reason is None and not backend.default:
                    reason = "serves only when it is named (implementation=...)"
                why_not.append({"workload": name, "op": op, "backend": backend.name, "why_not": reason})
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {"paro_jax": __version__, **{name: _version(name) for name in _PACKAGES}},
        "devices": [{"id": d.id, "platform": d.platform, "kind": d.device_kind} for d in jax.devices()],
        "backends_see": device,
        "tiles": _tiles.source(),
        "workloads": served,
        "why_not": why_not,
        "support_table": support_table(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
