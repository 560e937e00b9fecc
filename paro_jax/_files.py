"""Files that appear whole or not at all: written beside their place, then moved into it."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def beside(path: Path, end: str = "tmp") -> Path:
    """A name in the folder of `path` that nothing has, hidden, for a file that is to take its place."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{end}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a file to write; it replaces `path` at the end, or goes without trace on any failure.

    Opened by its name it gets the permissions of any new file, which one from `tempfile` would not.
    """
    new = beside(path)
    try:
        yield new
        os.replace(new, path)
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def probe(path: Path) -> None:
    """OSError unless a file can be written beside `path`, in its folder, which is made when it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = beside(path)
    try:
        with open(new, "xb") as file:
            file.write(b"\0")
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
