"""Formats tables for a terminal."""

from collections.abc import Iterable, Sequence


def format_columns(header: Sequence[str], rows: Iterable[Sequence[str]], *, num_left: int) -> str:
    """Formats rows in columns; the first `num_left` are left-aligned, the others right-aligned."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if place < num_left else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
