"""Tables: every way to write one, and what must be escaped in each."""

import csv
import io

import pytest
from rich.console import Console

from adapters.analysis.bootstrap import Estimate
from adapters.analysis.tables import FORMATS, Column, Table, as_html

TABLE = Table(
    "A & B",
    [Column("method_name"), Column("Δ ACC", 2)],
    [["a|b", Estimate((-1.0, -3.0))], ["50%", None]],
    notes=["A note."],
)


def test_markdown() -> None:
    assert FORMATS["markdown"]([TABLE]).splitlines() == [
        "**A & B**",
        "",
        "| method_name | Δ ACC |",
        "| --- | ---: |",
        "| a\\|b | -2.00 ± 1.41 |",
        "| 50% | – |",
        "",
        "A note.",
    ]


def test_latex_escapes_what_it_must() -> None:
    text = FORMATS["latex"]([TABLE])
    for line in (
        r"\caption{A \& B. A note.}",
        r"method\_name & $\Delta$ ACC \\",
        r"a|b & $-$2.00 $\pm$ 1.41 \\",
        r"50\% & -- \\",
    ):
        assert line in text.splitlines()


def test_csv_has_every_number_in_full() -> None:
    heading, first, second = csv.reader(io.StringIO(FORMATS["csv"]([TABLE])))
    assert heading == ["method_name", "Δ ACC", "Δ ACC sd", "Δ ACC low", "Δ ACC high", "Δ ACC runs"]
    assert first[:2] == ["a|b", "-2.0"]
    assert [float(value) for value in first[2:]] == pytest.approx([2**0.5, -3.0, -1.0, 2])
    assert second == ["50%", "", "", "", "", ""]


def test_text_takes_brackets_as_they_are() -> None:
    table = Table("[red]", [Column("method"), Column("ACC", 1)], [["[bold]", Estimate((1.0, 2.0))]], intervals=True)
    text = FORMATS["text"]([table])
    assert "[red]" in text
    assert "[bold]" in text
    assert "1.5 [1.0, 2.0]" in text


def test_html_escapes_its_cells_and_heads_rows_and_columns() -> None:
    table = Table(
        "<A>", [Column("m<"), Column("ACC", 1), Column("notes", prose=True)], [["a&b", Estimate((1.0,)), "x"]]
    )
    assert as_html(table, ["<b></b>"]) == (
        '<div class="scroll" tabindex="0"><table aria-label="&lt;A&gt;"><thead><tr><th scope="col">m&lt;</th>'
        '<th scope="col">ACC</th><th scope="col">notes</th></tr></thead><tbody><tr><th scope="row"><b></b>a&amp;b</th>'
        '<td>1.0</td><td class="text">x</td></tr></tbody></table></div>'
    )


def test_a_terminal_shows_a_space_after_each_section() -> None:
    text = io.StringIO()
    Console(file=text, width=40).print(Table("title", [Column("a")], [["1"], ["2"], ["3"], ["4"]], section=2))
    assert [line[:1] for line in text.getvalue().splitlines()] == ["a", "─", "1", "2", " ", "3", "4"]
