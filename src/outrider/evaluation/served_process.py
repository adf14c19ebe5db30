"""``outrider serve`` in a process of its own, for a measurement that shares no interpreter with its client."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread

from outrider.errors import OutriderError

__all__ = ["served"]

READY = "ready: "


@contextmanager
def served(options: Sequence[str]) -> Iterator[str]:
    """The address of a server on a free port of this machine. Raises OutriderError with what it said, if it ends."""
    command = [sys.executable, "-m", "outrider", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: list[str] = []
    reader: Thread | None = None
    try:
        for line in process.stderr:
            said.append(line.strip())
            if READY in line:
                break
        else:
            reason = said[-1] if said else f"code {process.wait()}"
            raise OutriderError(f"outrider serve {' '.join(options)} did not start: {reason}")
        reader = Thread(target=process.stderr.read, daemon=True)  # a full pipe would stop it
        reader.start()
        yield said[-1].split(READY)[1]
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if reader is not None:
            reader.join()
        process.stderr.close()
