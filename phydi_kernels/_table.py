"""Tables of the reports on models."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """The lines of a table: columns as wide as their widest cell, each to the side ``<`` or ``>`` of its own."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]
