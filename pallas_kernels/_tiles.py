"""Which tiles a call uses: measured on this kind of device where there is a table, else the backend's first candidate.

`paro bench --tune` writes the tables, `tiles/<device>.json`, with the time of every candidate. One in the user's own
folder goes before the one that came with the package: it was measured on this very machine.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax

from pallas_kernels._check import mistake
from pallas_kernels._choose import Backend, Request

PACKAGE = Path(__file__).parent / "tiles"
SCHEMA = 1
_NEAR = 4.0  # a row speaks for calls of up to this many times more or fewer tokens


def user_folder() -> Path:
    """Where tables go when the package's folder cannot be written."""
    return Path.home() / ".cache" / "paro_jax" / "tiles"


def device_slug() -> str:
    """The default device as a file is named: "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", jax.devices()[0].device_kind.lower()).strip("_")


def key(request: Request, backend: str) -> dict[str, Any]:
    """What a row of a table is about, tokens apart: these decide which tiles fit and which are fast."""
    names = ("op", "head_dim", "dtype", "block", "qk", "pv", "p_scale", "layout")
    facts = {name: getattr(request, name) for name in names}
    return {"backend": backend, **facts, "block": list(request.block)}


def measured(request: Request, backend: Backend) -> Any | None:
    """The tiles measured fastest for a request like this one, or None where nothing was: the backend then decides.

    "Like": all of `key`, and the nearest number of query tokens within a factor of 4. A tile that is no candidate any
    more does not count.
    """
    if backend.candidates is None:
        return None
    wanted, slug = key(request, backend.name), device_slug()
    for folder in (user_folder(), PACKAGE):
        rows = _rows(folder / f"{slug}.json")
        near = [
            (abs(math.log(row["q_tokens"] / request.q_tokens)), i)
            for i, row in enumerate(rows)
            if all(row.get(name) == value for name, value in wanted.items())
        ]
        distance, row = min(near, default=(math.inf, 0))
        if distance <= math.log(_NEAR) and (best := fastest(rows[row], backend.candidates(request))):
            return best
    return None


def candidate(tiles: Any, request: Request, backend: Backend) -> Any:
    """`tiles`, which must be among the backend's candidates for this request; ValueError otherwise."""
    every = () if backend.candidates is None else tuple(backend.candidates(request))
    if tiles not in every:
        some = f"None or one of {', '.join(map(str, every))}" if every else "None"
        raise mistake("tiles", f"{some} for backend {backend.name!r} and {request}", repr(tiles))
    return tiles


def fastest(row: dict[str, Any], candidates: Sequence[Any]) -> Any | None:
    """The candidate with the least median time in a row of a table."""
    times = {_frozen(entry["tiles"]): entry["ms"] for entry in row["candidates"] if entry.get("ms") is not None}
    known = [(times[name], i) for i, tiles in enumerate(candidates) if (name := _frozen(asdict(tiles))) in times]
    return candidates[min(known)[1]] if known else None


def source() -> str:
    """The table that serves this device, for people: a path, or that there is none."""
    files = [folder / f"{device_slug()}.json" for folder in (user_folder(), PACKAGE)]
    found = [str(file) for file in files if _rows(file)]
    return ", then ".join(found) or "none measured for this device: each backend's first candidate (paro bench --tune)"


def write(rows: list[dict[str, Any]], about: dict[str, Any]) -> Path:
    """Write the table of this device into the package, else the user's own folder; a CPU's into that. Returns its path.

    rows: `key`, `q_tokens` and `candidates`: [{"tiles": {...}, "ms": median or None, ...}]. Rows of an older table
    about other requests stay. Raises OSError when no folder can be written.
    """
    # All CPUs have one name: what is measured on one is nobody else's.
    folders = (user_folder(),) if device_slug() == "cpu" else (PACKAGE, user_folder())
    name, refused = f"{device_slug()}.json", None
    for place in folders:
        file = place / name
        fresh = [_about(row) for row in rows]
        kept = [row for row in _rows(file) if _about(row) not in fresh]
        text = json.dumps({"schema": SCHEMA, "about": about, "rows": kept + rows}, indent=1) + "\n"
        try:
            place.mkdir(parents=True, exist_ok=True)
            new = place / f".{name}.{os.getpid()}.tmp"
            new.write_text(text)
            os.replace(new, file)
            return file
        except OSError as error:
            refused = error
    assert refused is not None
    raise refused


def _about(row: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in row.items() if name != "candidates"}, sort_keys=True)


def _frozen(tiles: dict[str, Any]) -> tuple:
    return tuple(sorted(tiles.items()))


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        return _read(file, file.stat().st_mtime_ns, file.stat().st_size)
    except OSError:
        return []


@lru_cache(maxsize=8)
def _read(file: Path, when: int, size: int) -> list[dict[str, Any]]:
    """The rows of a table; a table that is none is named in a warning and left alone."""
    try:
        table = json.loads(file.read_text())
        if table["schema"] != SCHEMA:
            raise ValueError(f"schema {table['schema']}, this version reads {SCHEMA}")
        for row in table["rows"]:
            if not (row["q_tokens"] > 0 and all(isinstance(entry["tiles"], dict) for entry in row["candidates"])):
                raise ValueError("a row without tokens or tiles")
        return table["rows"]
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{file} is not a table of tiles ({error!r}) and is not used; delete it or run paro bench --tune.",
            stacklevel=2,
        )
        return []
