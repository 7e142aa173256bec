"""The command line. stdout carries the result, stderr the log.

Everything heavy is imported inside the commands, so that `--help` is there at once. `errors` has the exit codes.
"""

from __future__ import annotations

import errno
import logging
import sys
import time
from typing import Any, NoReturn

from rankwise.cli import files as files  # isort: skip - the order of these is that of their commands in the help
from rankwise.cli import runs as runs  # isort: skip
from rankwise.cli import use as use  # isort: skip
from rankwise.cli import adapters as adapters  # isort: skip
from rankwise.cli import about as about  # isort: skip
from rankwise.cli.options import app as app
from rankwise.errors import FAILED, INPUT, InputError
from rankwise.terminal import drop_unwritten, log, show

TELL_AFTER = 20.0
"""Seconds until one of several processes tells its error. One line is enough: where all fail alike, the main one tells
at once and ends, upon which the launcher ends the others; and so where another process is lost."""


def main() -> None:
    """Run the command line and leave with one of the exit codes in `rankwise.errors`."""
    # A result in UTF-8 whatever the terminal says, so that no ± stops a finished sweep.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    # What PEFT imports where it is there says on CPUs what a faster path would need; no run here takes that path.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = app(prog_name="rankwise", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.exit(FAILED)
    except Exception as error:
        from rankwise.processes.launched import LostError, is_main

        if isinstance(error, LostError) or not is_main():
            time.sleep(TELL_AFTER)
        if "--debug" in sys.argv:
            raise
        if hasattr(error, "format_message"):  # a usage error, which typer would spread over four lines
            _refuse_usage(error)
        line = " ".join(filter(None, map(str.strip, str(error).splitlines()))) or type(error).__name__
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # the user gave that name
            error, line = InputError(line), f"{line[:120]}… is no name of a file: give a shorter one"
        if isinstance(error, InputError):
            log(f"rankwise: {line}")
            sys.exit(INPUT)
        log(f"rankwise: {type(error).__name__}: {line} (--debug shows where)")
        sys.exit(FAILED)
    finally:
        drop_unwritten()


def _refuse_usage(error: Any) -> NoReturn:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "rankwise"
    if len(sys.argv) == 1:  # rankwise alone: its help is what was wanted
        show(context.get_help() if context else error.format_message())
    else:
        log(f"rankwise: {' '.join(error.format_message().split())} (see {command} --help)")
    sys.exit(INPUT)
