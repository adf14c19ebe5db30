"""The ``outrider`` command, and ``python -m outrider``."""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """The command line. Ctrl-C while it is being imported ends the process by the signal, without a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        handler = _interrupt
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from outrider.cli import main as run

    signal.signal(signal.SIGINT, handler)
    run()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt, except while torch is imported, whose C++ aborts on an exception: there the signal ends the
    process."""
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    signal.signal(number, signal.default_int_handler)
    signal.default_int_handler(number, frame)


if __name__ == "__main__":
    main()
