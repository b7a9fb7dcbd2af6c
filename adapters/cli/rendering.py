"""Sheets: tables of texts and estimates, and their renderings as text, Markdown, CSV and LaTeX.

Convention: an estimate is shown as ``mean ± standard deviation``, or, if the sheet says so, as ``mean [interval]``; in
CSV, each of its parts has a column of its own, in full precision. What is not known is a dash, in CSV nothing.
"""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.analysis.bootstrap import Estimate

__all__ = ["FORMATS", "Column", "Sheet"]

WIDTH = 160

Cell = str | Estimate | None


@dataclass(frozen=True)
class Column:
    """A column: its heading, and how many digits after the point its estimates have; None for a column of texts."""

    heading: str
    digits: int | None = None


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        title: above it.
        columns: from left to right.
        rows: as many cells each.
        notes: below it, a line each.
        intervals: whether an estimate is shown with its interval, in place of its standard deviation.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    intervals: bool = False

    def texts(self) -> list[list[str]]:
        """Return the rows as they are shown."""
        return [
            [self._text(cell, column.digits) for cell, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]

    def _text(self, cell: Cell, digits: int | None) -> str:
        if not isinstance(cell, Estimate):
            return "–" if cell is None else cell
        if self.intervals and cell.interval is not None:
            low, high = cell.interval
            return f"{cell.mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        spread = "" if self.intervals or cell.deviation is None else f" ± {cell.deviation:.{digits}f}"
        return f"{cell.mean:.{digits}f}{spread}"


def as_text(sheets: Sequence[Sheet]) -> str:
    """Return the sheets as tables drawn with lines."""
    console = Console(file=io.StringIO(), width=WIDTH)
    for sheet in sheets:
        table = Table(title=Text(sheet.title), title_justify="left")
        for column in sheet.columns:
            table.add_column(Text(column.heading), justify="left" if column.digits is None else "right", no_wrap=True)
        for row in sheet.texts():
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        for note in sheet.notes:
            console.print(Text(note))
        console.print()
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def as_markdown(sheets: Sequence[Sheet]) -> str:
    """Return the sheets as Markdown tables."""
    parts = []
    for sheet in sheets:
        rules = ["---" if column.digits is None else "---:" for column in sheet.columns]
        rows = [[column.heading for column in sheet.columns], rules, *sheet.texts()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("\n".join([f"**{sheet.title}**", "", *lines, *(f"\n{note}" for note in sheet.notes)]))
    return "\n\n".join(parts) + "\n"


def as_latex(sheets: Sequence[Sheet]) -> str:
    """Return the sheets as LaTeX tables, for the package booktabs."""
    parts = []
    for sheet in sheets:
        alignment = "".join("l" if column.digits is None else "r" for column in sheet.columns)
        heading, *rows = [[column.heading for column in sheet.columns], *sheet.texts()]
        numeric = [column.digits is not None for column in sheet.columns]
        body = [" & ".join(map(_latex, row, numeric)) + r" \\" for row in rows]
        caption = " ".join([f"{sheet.title}.", *sheet.notes])
        lines = [
            r"\begin{table}",
            rf"\caption{{{_latex(caption)}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            " & ".join(_latex(cell) for cell in heading) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_LATEX = {each: f"\\{each}" for each in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "–": "--",
}


def _latex(text: str, numeric: bool = False) -> str:
    signs = _LATEX | ({"-": "$-$"} if numeric else {})
    return "".join(signs.get(character, character) for character in text)


def as_csv(sheets: Sequence[Sheet]) -> str:
    """Return the sheets as CSV, one after the other with an empty line between; notes and titles are left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, sheet in enumerate(sheets):
        if number:
            text.write("\n")
        headings: list[str] = []
        for column in sheet.columns:
            parts = [""] if column.digits is None else ["", " sd", " low", " high", " runs"]
            headings += [f"{column.heading}{part}" for part in parts]
        writer.writerow(headings)
        for row in sheet.rows:
            pairs = zip(row, sheet.columns, strict=True)
            writer.writerow([value for cell, column in pairs for value in _values(cell, column)])
    return text.getvalue()


def _values(cell: Cell, column: Column) -> list[str | float | None]:
    if column.digits is None:
        return [cell if isinstance(cell, str) else None]
    if not isinstance(cell, Estimate):
        return [None] * 5
    return [cell.mean, cell.deviation, *(cell.interval or (None, None)), cell.count]


FORMATS: dict[str, Callable[[Sequence[Sheet]], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "csv": as_csv,
    "latex": as_latex,
}
