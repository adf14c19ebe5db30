"""``python -m outrider``: the same as the ``outrider`` command."""

from __future__ import annotations

from outrider.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
