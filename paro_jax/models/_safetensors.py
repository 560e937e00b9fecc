"""Safetensors files read straight from disk: headers checked whole, then rows of tensors into memory that is given.

Rows go where they are wanted by `preadv`, without a map of the file: mapped pages would count as ours while they are
read, and faulting them in one by one is slower than the read itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


class WeightsError(ValueError):
    """A weight file that does not fit its model: names the file, what was expected, what was found, what to do."""


# A file of 8 bits or fewer needs its scales, which every program keeps in its own way: we do not guess them.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64}
_BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}

_LONGEST_HEADER = 100_000_000  # the format's own limit


def check_dtype(dtype: Any) -> None:
    """WeightsError unless parameters can be cast to `dtype`, or it is None. Integers would round them to nothing."""
    with contextlib.suppress(TypeError):
        if dtype is None or np.dtype(dtype) in [DTYPES[kind] for kind in ("F32", "BF16", "F16")]:
            return
    raise WeightsError(f"dtype: expected float32, bfloat16, float16 or None, found {dtype!r}; cast what you get.")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where the bytes of a tensor are; `dtype` is one of `DTYPES`."""

    file: Path
    descriptor: int
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill `view` from byte `start` of the tensor on."""
        found = 0
        while found < view.nbytes:  # one call reads 2 GiB at most
            got = os.preadv(self.descriptor, [view[found:]], self.offset + start + found)
            if got == 0:
                raise WeightsError(f"{self.file} was cut short while it was read; fetch it again.")
            found += got


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """The tensors of a safetensors file, or of a folder with one or with several and their index; and what is wrong.

    The second value lists keys that are in two files, in another file than the index says, or of a kind that we do not
    read. WeightsError for files that are absent, incomplete or none of ours.
    """
    index = None
    if path.is_dir():
        files, index = _files_of(path)
    else:
        files = [path]
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    unread: dict[str, list[str]] = {}
    with contextlib.ExitStack() as stack:
        for file in files:
            stream = stack.enter_context(open_file(file))
            for key, (kind, shape, offset) in _header(file, stream).items():
                if key in tensors:
                    problems.append(f"{key} is in two files, {tensors[key].file.name} and {file.name}")
                if index is not None and index.get(key, file.name) != file.name:
                    problems.append(f"{key} is in {file.name}, and the index says {index[key]}")
                if kind not in DTYPES:
                    unread.setdefault(kind, []).append(key)
                tensors[key] = Tensor(file, stream.fileno(), offset, DTYPES.get(kind, np.dtype(np.uint8)), shape)
        for kind, keys in unread.items():
            more = f" and {len(keys) - 1} more tensors" if len(keys) > 1 else ""
            problems.append(
                f"{keys[0]}{more}: expected {', '.join(DTYPES)}, found {kind}; fetch the file that is not quantised"
            )
        problems += [
            f"{key} is not in {file}, where the index puts it"
            for key, file in (index or {}).items()
            if key not in tensors
        ]
        yield tensors, problems


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or WeightsError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror or error}); check it and its permissions."
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}); fetch it again.") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(value).__name__}; fetch it again.")
    return value


def _files_of(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder, and its index (key -> name of the file) where there is one."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise WeightsError(f"{folder} cannot be read ({error.strerror}); check its permissions.") from error
    indices = [name for name in names if name.endswith(".safetensors.index.json")]
    if len(indices) == 1:
        where = folder / indices[0]
        index = read_json(where).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
            raise WeightsError(f"{where}: expected a weight_map of keys to files, found {index!r:.80}; fetch it again.")
        wanted = sorted(set(index.values()))
        if strange := [name for name in wanted if os.path.basename(name) != name]:
            raise WeightsError(f"{where}: expected names of files in this folder, found {strange}; fetch it again.")
        if absent := [name for name in wanted if name not in names]:
            raise WeightsError(
                f"{folder}: {where.name} names files that are not there: {absent}{_unfinished(names)}; fetch them."
            )
        return [folder / name for name in wanted], index
    files = [name for name in names if name.endswith(".safetensors")]
    if len(files) == 1 and not indices:
        return [folder / files[0]], None
    found = f"{len(files)} such files and {len(indices)} indices"
    pickles = [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if not names:
        found = "an empty folder"
    elif not files and pickles:
        found = f"only pickles such as {pickles[0]}, which can run code when they are read: get safetensors"
    raise WeightsError(
        f"{folder}: expected one .safetensors file, or several and their .safetensors.index.json; found "
        f"{found}{_unfinished(names)}. Name the file, or the folder of the transformer."
    )


def _unfinished(names: list[str]) -> str:
    partial = [name for name in names if name.endswith((".incomplete", ".part", ".aria2", ".crdownload"))]
    return f" (the download of {partial[0]} has not finished)" if partial else ""


def open_file(file: Path) -> Any:
    """For reading, unbuffered; WeightsError if it cannot be opened."""
    try:
        return open(file, "rb", buffering=0)
    except FileNotFoundError as error:
        raise WeightsError(f"{file}: no such file or folder; check the path.") from error
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror}); check it and its permissions.") from error


def _header(file: Path, stream: Any) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """key -> (kind, shape, offset of its bytes in the file) of all tensors, all of them known to lie in the file."""
    if file.name.endswith((".incomplete", ".part")):
        raise WeightsError(f"{file} is a download that has not finished; finish it.")
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(40)

    def broken(why: str, advice: str = "fetch it again") -> WeightsError:
        return WeightsError(f"{file} is not a complete safetensors file ({why}); {advice}.")

    if start.startswith(b"version https://git-lfs"):
        raise broken("a Git LFS pointer of a few lines, without the weights", "fetch them: git lfs pull")
    if start.startswith(b"GGUF"):
        raise broken("a GGUF file, quantised", f"get a safetensors file of {', '.join(DTYPES)}")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise broken("a PyTorch pickle, which can run code when it is read", "get a safetensors file")
    if len(start) < 9:
        raise broken(f"it has {size} bytes")
    (length,) = struct.unpack("<Q", start[:8])
    if length > min(size - 8, _LONGEST_HEADER) or start[8:9] != b"{":
        raise broken(f"its {size} bytes do not begin with a whole header")
    try:
        header = json.loads(os.pread(stream.fileno(), length, 8))
        header.pop("__metadata__", None)
        tensors = {}
        end = 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            bits = _BITS.get(kind)
            whole = all(isinstance(n, int) and n >= 0 for n in (*shape, first, last))
            if not whole or first != end or (bits and (last - first) * 8 != math.prod(shape) * bits):
                raise broken(f"{key} of {kind}{list(shape)} cannot lie in bytes {first} to {last}")
            tensors[key] = (kind, shape, 8 + length + first)
            end = last
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, WeightsError):
            raise
        raise broken(f"its header cannot be understood: {type(error).__name__} {error}") from error
    if 8 + length + end != size:
        raise broken(f"it has {size} bytes of {8 + length + end}")
    return tensors
