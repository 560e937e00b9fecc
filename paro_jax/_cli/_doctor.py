"""`paro doctor`: what is installed, which devices there are, and which backend would serve which workload here."""

import argparse
import importlib.metadata
import platform
from typing import Any

from paro_jax._cli import _show

_PACKAGES = (
    "paro_jax",
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
    _show.table("devices", report["devices"])
    _show.table("workloads: the backend that serves each one here", report["workloads"])
    reasons = [row for row in report["why_not"] if row["why_not"]]
    _show.table("why not", reasons)
    print(report["support_table"])
    return 0


def examine() -> dict[str, Any]:
    """The report as plain values."""
    import jax

    import pallas_kernels
    from pallas_kernels import _choose, workloads

    device = _choose.device_name()
    chosen, why_not = [], []
    for name, request, backends in _requests(workloads):
        try:
            served = _choose.choose(request, backends).name
        except _choose.NoBackend:
            served = None
        chosen.append({"workload": name, "op": request.op, "backend": served or "none"})
        why_not += [
            {"workload": name, "op": request.op, "backend": backend.name, "why_not": backend.why_not(request)}
            for backend in backends
        ]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": device,
        "devices": [
            {"id": d.id, "platform": d.platform, "kind": d.device_kind, "named": device, "process": d.process_index}
            for d in jax.devices()
        ],
        "workloads": chosen,
        "why_not": why_not,
        "support_table": pallas_kernels.support_table(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
