"""`python -m rankwise` is the command `rankwise`."""

import contextlib
import os
import signal
import sys
import warnings

from rankwise.errors import INTERRUPTED, STOPPED
from rankwise.terminal import plain_warning

CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: STOPPED}
"""Exit codes where nothing has begun yet that is worth more than the process; see `rankwise.errors`."""


def _leave(number: int, *_: object) -> None:
    """End at once, wherever this is: what is being imported may swallow an exception, or print it as its own."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one says it
        os._exit(CODES[signal.Signals(number)])
    line = "interrupted" if number == signal.SIGINT else "stopped; the same command goes on"
    with contextlib.suppress(OSError):
        os.write(2, f"rankwise: {line}\n".encode())
    os._exit(CODES[signal.Signals(number)])


def main() -> None:
    """Answer signals from the first moment on, then run the command line. A run and a sweep answer them themselves."""
    if "--debug" not in sys.argv:
        warnings.formatwarning = plain_warning
    for number in CODES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    from rankwise.cli import main as run

    run()


if __name__ == "__main__":
    main()
