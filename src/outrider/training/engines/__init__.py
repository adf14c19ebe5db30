"""Engines that take a finished drafter over, one file each; the catalogue of exporters names them."""

__all__: list[str] = []
