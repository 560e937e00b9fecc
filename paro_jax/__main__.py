"""The `paro` command (also `python -m paro_jax`)."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from paro_jax import __version__


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line: which command, what is wrong, where to read more."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from paro_jax._cli import _bench, _calibrate, _compile_report, _convert, _demo, _doctor, _eval, _inspect

    root = _Parser(
        prog="paro",
        description="PAROAttention in JAX: reorder each head's tokens, skip whole blocks, quantise what is left.",
        epilog="`paro COMMAND --help` says what each command takes.",
    )
    root.add_argument("--version", action="version", version=f"paro {__version__}")
    root.add_argument("--traceback", action="store_true", help="on an error, show the Python traceback too")
    commands = root.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    for command in (_demo, _calibrate, _eval, _convert, _inspect, _bench, _compile_report, _doctor):
        command.add(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 2 for a user's mistake, or 130 after Ctrl-C."""
    try:
        # Imported here, so that Ctrl-C in these seconds ends like Ctrl-C at any other time.
        from pallas_kernels._choose import NoBackend
        from paro_jax._cli import _show

        root = parser()
        args = root.parse_args(argv)
        if not hasattr(args, "run"):
            root.print_help()
            return 0
        try:
            status = args.run(args)
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            # `paro inspect plan | head` closes our output; what is left to write has no reader, and Python must not
            # complain about it while it shuts down.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (ValueError, OSError, NoBackend, _show.UserError) as error:
            if args.traceback:
                raise
            _show.note(f"paro: error: {_one_line(error)}")
            return 2
    except KeyboardInterrupt:
        print("\nparo: stopped by Ctrl-C", file=sys.stderr, flush=True)
        return 130


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
