"""Files that appear whole or not at all: written beside their place, then moved into it."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def expanded(path: Any, what: str, error: type[Exception] = ValueError) -> Path:
    """`path` with "~" as the home folder; `error`, which says `what` it should be of, for what is no path."""
    try:
        given = os.fspath(path)
        if not isinstance(given, str) or not given or "\0" in given:
            raise TypeError
    except TypeError:
        raise error(f"path must be the path of {what}, a string or a pathlib.Path; got {path!r}.") from None
    try:
        return Path(given).expanduser()
    except RuntimeError as why:  # a user who is not there
        raise error(f"path {given}: expected a home folder for its '~', found none ({why}).") from None


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


def orbax(**options: Any) -> Any:
    """Orbax's checkpointer of a pytree, a context manager. `options`: of its `PyTreeCheckpointHandler`."""
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options))


def save_arrays(folder: Path, arrays: Any, **options: Any) -> None:
    """Write a pytree of arrays into a new folder by orbax; OSError where that cannot be. `options` as of `orbax`."""
    with orbax(**options) as checkpointer:
        try:
            checkpointer.save(folder.absolute(), arrays)
        except ValueError as error:  # what tensorstore makes of a full disk
            raise OSError(" ".join(str(error).split())[:300]) from error
