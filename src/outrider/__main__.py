"""The ``outrider`` command, and ``python -m outrider``."""

from __future__ import annotations

import signal

__all__ = ["main"]


def main() -> None:
    """The command line. Ctrl-C while it is being imported ends the process by the signal, without a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from outrider.cli import main as run

    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    main()
