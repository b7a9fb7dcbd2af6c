"""Tables of texts and estimates, and how they are written: for a terminal, as text, Markdown, CSV, LaTeX and HTML.

Convention: an estimate is shown as ``mean ± standard deviation`` or, if the table says so, as ``mean [low, high]``. In
CSV each part of an estimate has a column of its own, in full precision. A cell that is None is shown as a dash; in CSV
it is empty.
"""

import csv
import html
import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from adapters.analysis.bootstrap import Estimate

__all__ = [
    "FORMATS",
    "Cell",
    "Column",
    "Table",
    "as_csv",
    "as_html",
    "as_latex",
    "as_markdown",
    "as_text",
    "print_table",
    "printable",
]

_WIDTH = 100  # of notes, and of tables if they can be

Cell = str | Estimate | None


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: what stands above it.
        digits: the number of digits after the point of its estimates; None for a column of texts.
        prose: whether its texts are sentences, which may be broken into lines.
    """

    heading: str
    digits: int | None = None
    prose: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: what stands above it.
        columns: from left to right.
        rows: each has one cell for each column.
        notes: one line each, below the table.
        intervals: whether estimates are shown with their interval instead of their standard deviation.
        section: after how many rows a terminal shows a space; 0 for none.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    intervals: bool = False
    section: int = 0

    def texts(self) -> list[list[str]]:
        """Return every row as it is shown."""
        return [[self._text(cell, column) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows]

    def _text(self, cell: Cell, column: Column) -> str:
        if isinstance(cell, Estimate):
            digits = column.digits or 0 if cell.digits is None else cell.digits
            return cell.text(digits, interval=self.intervals)
        return "–" if cell is None else cell

    def __rich__(self) -> RichTable:
        """Return the table as ``rich`` draws it, so that ``console.print(table)`` shows it; without title and notes.

        There are no lines between columns and no spaces around ±, so that it fits a narrow terminal. Where it does not
        fit all the same, words are broken into lines and none is cut.
        """
        drawn = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for column in self.columns:
            side = "left" if column.digits is None else "right"
            drawn.add_column(Text(column.heading), justify=side, overflow="fold")  # type: ignore[arg-type]
        for number, row in enumerate(self.texts(), start=1):
            numbers = [text.replace(" ± ", "±") for text in row]
            drawn.add_row(*map(Text, numbers), end_section=bool(self.section) and number % self.section == 0)
        return drawn


def as_text(tables: Sequence[Table]) -> str:
    """Return the tables with their titles above and their notes below them, 100 columns wide or as they must be.

    Where a table would be wider, texts are broken at spaces.
    """
    text = io.StringIO()
    for table in tables:
        console = Console(file=text, width=1000)
        console.width = max(_WIDTH, console.measure(table).minimum)
        print_table(console, table, shutil.get_terminal_size().columns)
        console.print()
    # What fills up the last column is of no use.
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def print_table(console: Console, table: Table, width: int | None = None) -> None:
    """Print a table with its title above and its notes below it.

    Args:
        console: where.
        table: what.
        width: of the notes, at most; the console's if None.
    """
    console.print(table.title, highlight=False, markup=False)
    console.print(table)
    for note in table.notes:
        console.print(note, highlight=False, markup=False, width=min(width or console.width, _WIDTH))


def as_markdown(tables: Sequence[Table]) -> str:
    """Return the tables as Markdown."""
    parts = []
    for table in tables:
        rules = ["---" if column.digits is None else "---:" for column in table.columns]
        rows = [[column.heading for column in table.columns], rules, *table.texts()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("\n".join([f"**{table.title}**", "", *lines, *(f"\n{note}" for note in table.notes)]))
    return "\n\n".join(parts) + "\n"


_LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "–": "--",
}


def as_latex(tables: Sequence[Table]) -> str:
    """Return the tables as LaTeX, for the package booktabs."""

    def escaped(text: str, column: Column | None = None) -> str:
        # In a column of numbers a hyphen is a minus sign.
        signs = _LATEX if column is None or column.digits is None else _LATEX | {"-": "$-$"}
        return "".join(signs.get(character, character) for character in text)

    parts = []
    for table in tables:
        alignment = "".join("l" if column.digits is None else "r" for column in table.columns)
        caption = " ".join([f"{table.title}.", *table.notes])
        lines = [
            r"\begin{table}",
            rf"\caption{{{escaped(caption)}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            " & ".join(escaped(column.heading) for column in table.columns) + r" \\",
            r"\midrule",
            *(" & ".join(map(escaped, row, table.columns)) + r" \\" for row in table.texts()),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def as_csv(tables: Sequence[Table]) -> str:
    """Return the tables as CSV, separated by an empty line, without titles and notes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, table in enumerate(tables):
        if number:
            text.write("\n")
        headings: list[str] = []
        for column in table.columns:
            parts = [""] if column.digits is None else ["", " sd", " low", " high", " runs"]
            headings += [f"{column.heading}{part}" for part in parts]
        writer.writerow(headings)
        for row in table.rows:
            values: list[str | float | None] = []
            for cell, column in zip(row, table.columns, strict=True):
                if isinstance(cell, Estimate):
                    values += [cell.mean, cell.deviation, *(cell.interval or (None, None)), cell.count]
                else:
                    values += [cell] if column.digits is None else [None] * 5
            writer.writerow(values)
    return text.getvalue()


def as_html(table: Table, marks: Sequence[str] = ()) -> str:
    """Return a table as HTML; its first column heads the rows.

    Args:
        table: the table; its title is its label for readers who do not see it, its notes are left out.
        marks: HTML that stands before the first cell of each row, if there is any.
    """

    def escaped(text: str) -> str:
        return html.escape(printable(text))

    head = "".join(f'<th scope="col">{escaped(column.heading)}</th>' for column in table.columns)
    body = ""
    for number, (first, *others) in enumerate(table.texts()):
        cells = "".join(
            f'<td class="text">{escaped(cell)}</td>' if column.prose else f"<td>{escaped(cell)}</td>"
            for cell, column in zip(others, table.columns[1:], strict=True)
        )
        body += f'<tr><th scope="row">{marks[number] if marks else ""}{escaped(first)}</th>{cells}</tr>'
    return (
        f'<div class="scroll" tabindex="0"><table aria-label="{escaped(table.title)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def printable(text: str) -> str:
    """Return text from a file with a replacement for every character that cannot be written or seen."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "csv": as_csv,
    "latex": as_latex,
}
