"""How the command speaks: tables for people, JSON for programs, and the one error a user's mistake raises."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paro_jax import _files


class UserError(Exception):
    """A mistake on the command line: exit status 2 and this one line."""


def table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Print rows of one kind: a drawn table on a terminal, aligned plain text anywhere else."""
    if not rows:
        return
    columns = list(rows[0]) if columns is None else list(columns)
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    right = [all(_is_number(row.get(column)) for row in rows) for column in columns]
    heads = [column.replace("_", " ") for column in columns]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn = Table(title=title or None, title_justify="left")
        for head, numeric in zip(heads, right, strict=True):
            drawn.add_column(head, justify="right" if numeric else "left")
        for line in cells:
            drawn.add_row(*(line_.replace("[", r"\[") for line_ in line))
        Console(highlight=False).print(drawn)
        return
    if title:
        print(title)
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]
    for line in [heads, ["-" * width for width in widths], *cells]:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        print("  ".join(padded).rstrip())
    print()


def fields(title: str, values: Mapping[str, Any]) -> None:
    """Print named values, one a line."""
    if title:
        print(title)
    width = max(len(name) for name in values)
    for name, value in values.items():
        print(f"{name.replace('_', ' ').ljust(width)}  {_cell(value)}")
    print()


def dumps(value: Any) -> str:
    """JSON of plain, numpy and jax values. What JSON has no number for (inf, NaN) becomes null."""
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write `dumps(value)` to `path` in one step: an interrupted or failed write leaves an older file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _files.replacing(path) as new:
        new.write_text(dumps(value) + "\n")


def probe(option: str, path: Path, *, folder: bool = False) -> None:
    """UserError unless a file (or, with `folder`, files in a folder) can be written to `path`: known now, not later."""
    try:
        _files.probe(path / "any" if folder else path)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be written ({error.strerror or error})") from error
    if not folder and path.is_dir():
        raise UserError(f"{option}: {path} is a folder; give the name of a file")


def note(message: str) -> None:
    """A line about what is going on, on stderr so that stdout stays the result."""
    print(message, file=sys.stderr, flush=True)


def path(text: str) -> Path:
    """argparse type: a path; "~" is the home folder even where the shell leaves it, as in --out=~/plan."""
    return _files.expanded(text, "a file or folder")


def positive(text: str) -> int:
    """argparse type: an integer >= 1."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "positive integer"  # argparse puts the name into its message


def natural(text: str) -> int:
    """argparse type: an integer >= 0."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


natural.__name__ = "non-negative integer"


def density(text: str) -> float:
    """argparse type: kept blocks / all blocks, in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


density.__name__ = "density in (0, 1]"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and jax, scalars and arrays
        return _plain(np.asarray(value).tolist())
    return str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float | np.number) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float() | np.floating():
            return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
        case list() | tuple():
            return ", ".join(_cell(item) for item in value)
        case _:
            return str(value)
