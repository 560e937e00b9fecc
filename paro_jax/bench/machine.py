"""What a figure was measured on: without it a figure means nothing."""

import datetime
import importlib.metadata
import math
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "nvidia-cublas", "tokamax", "torch",
)  # fmt: skip
# Read only; what a GPU does under load is its business and the reader's.
_QUERY = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def machine() -> dict[str, Any]:
    """Device, driver, versions and date, as plain values. Raises what jax raises where a device cannot be had."""
    import jax

    from pallas_kernels import device_name
    from paro_jax import __version__

    no_gpu = None
    if jax.default_backend() != "gpu":
        try:
            jax.devices("cuda")
        except RuntimeError as error:  # no plugin, no driver, the wrong driver: jax knows, and falls back in silence
            no_gpu = " ".join(str(error).split())[:300]
    return {
        "device": jax.devices()[0].device_kind,
        "backends_see": device_name(),
        "gpu": gpu(),
        "no_gpu": no_gpu,
        "cores": os.cpu_count(),
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "paro_jax": __version__,
        "commit": _said("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        **{name: found for name in _PACKAGES if (found := _version(name))},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def gpu() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU: driver, clocks, power, temperature; None where there is none."""
    said = _said("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")
    return None if said is None else dict(zip(_QUERY.split(","), said.splitlines()[0].split(", "), strict=False))


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def plain(value: Any) -> Any:
    """What JSON has no number for (inf, NaN) becomes null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
