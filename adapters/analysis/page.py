"""The page of the report: one HTML file that holds everything, follows the reader's theme, and executes nothing.

Convention: text from files passes through ``escaped``, and tables through ``as_html``, which escapes their cells. The
content security policy forbids scripts and every request, so that a mistake there would still run nothing; pictures
are within the page.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property

import numpy as np

from adapters.analysis.comparison import heading, published_table, scores_tables
from adapters.analysis.figures.drawing import THEME, Figure, inline_svg, picture
from adapters.analysis.groups import SERIES, Group
from adapters.analysis.tables import Column, Table, as_html, printable
from adapters.runs import RunResult
from adapters.runs.provenance import versions
from adapters.runs.published import PublishedTable
from adapters.runs.repeating import repeating_command

__all__ = ["Drawing", "escaped", "page"]

# How a sample begins that is a picture, as ``Learner.written`` returns it.
PICTURE = "data:image/png;base64,"

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 78rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .5rem 0 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem } h3 { font-size: 1rem }
p, figcaption { color: var(--muted); max-width: 44rem; margin: .3rem 0 } a { color: var(--series-0) }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0 }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem 2.5rem;
  align-items: start }
figure { margin: .5rem 0; max-width: 36rem } figure svg, figure img { display: block; width: 100%; height: auto }
figcaption { font-size: .875rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem .3rem 0; text-align: right; border-bottom: 1px solid var(--grid);
  overflow-wrap: normal }
th:first-child, td.text { text-align: left } thead th { color: var(--muted); font-weight: 600; white-space: nowrap }
td, tbody th { white-space: nowrap } tbody th { font-weight: 600 } td.text { white-space: normal; min-width: 14rem }
pre { white-space: pre-wrap; padding: .7rem; border: 1px solid var(--grid); border-radius: .3rem; font-size: .8125rem }
summary { cursor: pointer } .chip { display: inline-block; width: .7em; height: .7em; margin-right: .4em }
"""


@dataclass(frozen=True)
class Drawing:
    """A figure on the page.

    Attributes:
        name: the name of its files; no other figure has it.
        figure: what is drawn.
        alt: a description for readers who do not see it.
        caption: the text below it.
    """

    name: str
    figure: Figure
    alt: str
    caption: str

    @cached_property
    def svg(self) -> bytes:
        """The figure as an SVG file."""
        return picture(self.figure, "svg")


def escaped(text: object) -> str:
    """Return a value from a file as text of the page."""
    return html.escape(printable(str(text)))


def page(
    groups: Sequence[Group],
    shared: Sequence[Drawing],
    own: Sequence[Sequence[Drawing]],
    published: Sequence[PublishedTable],
) -> str:
    """Return the page.

    Args:
        groups: the runs.
        shared: the figures of all groups together.
        own: the figures of each group.
        published: published numbers of the benchmark.
    """
    tables, runs = scores_tables(groups), sum(len(group.runs) for group in groups)
    scores = "".join(
        as_html(table, [*map(_chip, groups)]) + "".join(f"<p>{escaped(note)}</p>" for note in table.notes)
        for table in tables
    )
    title = escaped(heading(groups[0].runs[0]))
    links = [("scores", "Scores"), *((f"method-{group.place}", escaped(group.label)) for group in groups)]
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>{_theme()}{_STYLE}</style>\n</head>\n<body>",
        f"<header><h1>{title}</h1>\n<p>{runs} finished {'run' if runs == 1 else 'runs'}. Written by "
        f"BECAME {escaped(versions()['became'])} on {date.today().isoformat()}.</p></header>",
        "<nav><ul>" + "".join(f'<li><a href="#{at}">{name}</a></li>' for at, name in links) + "</ul></nav>",
        f'<main>\n<section id="scores"><h2>Scores</h2>{scores}',
        f'<div class="grid">{"".join(map(_figure, shared))}</div>{_published(published)}</section>',
        *(_section(group, drawings) for group, drawings in zip(groups, own, strict=True)),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _theme() -> str:
    light, dark = ("".join(f"--{name}:{pair[side]};" for name, pair in THEME.items()) for side in (0, 1))
    return (
        f":root{{color-scheme:light dark;{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
        f"@media print{{:root{{{light}}}}}"
    )


def _figure(drawing: Drawing) -> str:
    svg = inline_svg(drawing.svg, drawing.name, escaped(drawing.alt))
    return f"<figure>{svg}<figcaption>{escaped(drawing.caption)}</figcaption></figure>"


def _chip(group: Group) -> str:
    return f'<span class="chip" style="background:var(--series-{group.place % len(SERIES)})"></span>'


def _published(published: Sequence[PublishedTable]) -> str:
    if not published:
        return ""
    table = published_table(published, "Published scores")
    notes = "".join(f"<p>{escaped(note)}</p>" for note in table.notes)
    return f"<details><summary>Published scores, and how they were trained</summary>{as_html(table)}{notes}</details>"


def _section(group: Group, drawings: Sequence[Drawing]) -> str:
    seeds = ("seed " if len(group.runs) == 1 else "seeds ") + ", ".join(str(run.seed) for run in group.runs)
    command, tables = repeating_command(group.runs), "Accuracies" if group.measure.is_accuracy else "Losses"
    repeat = (
        f"<pre><code>{escaped(command)}</code></pre>"
        if command
        else "<p>No command of this version has exactly this configuration.</p>"
    )
    config = json.dumps(group.runs[0].config, indent=2, ensure_ascii=False)
    config = "\n".join(map(escaped, config.split("\n")))
    return (
        f'<section id="method-{group.place}"><h2>{_chip(group)}{escaped(group.label)}</h2>\n'
        f"<p>{escaped(group.runs[0].backend)}; {escaped(seeds)}. To repeat it:</p>{repeat}\n"
        f'<div class="grid">{"".join(map(_figure, drawings))}</div>\n'
        f"<details><summary>{tables} as tables</summary>{_matrices(group)}</details>\n"
        f"{_texts(group)}<details><summary>Configuration</summary><pre><code>{config}</code></pre></details></section>"
    )


def _texts(group: Group) -> str:
    """What the network of the first seed writes after each task, in the manner of each task so far."""
    run = group.runs[0]
    if not run.samples:
        return ""
    if all(text.startswith(PICTURE) for texts in run.samples for text in texts):
        return _pictures(run)
    columns = [Column("after task"), Column("in the manner of task"), Column("text", prose=True)]
    rows = [
        [str(after), str(task), printable(text)]
        for after, texts in enumerate(run.samples, start=1)
        for task, text in enumerate(texts, start=1)
    ]
    about = f"Seed {run.seed}. The first quarter of each text is given; the network has drawn the rest, byte by byte."
    table = as_html(Table("What the network writes", columns, rows))
    return f"<details open><summary>What the network writes</summary><p>{about}</p>{table}</details>"


def _pictures(run: RunResult) -> str:
    """What the network draws after each task, of each task so far."""
    rows = []
    for after, texts in enumerate(run.samples, start=1):
        parts: list[str] = []
        for task, address in enumerate(texts, start=1):
            alt = f"After task {after}: test samples of task {task}, what is made of them, and what is drawn."
            picture = f'<img src="{html.escape(address)}" alt="{escaped(alt)}">'
            parts.append(f"<figure>{picture}<figcaption>Task {task}</figcaption></figure>")
        rows.append(f'<h3>After task {after}</h3><div class="grid">{"".join(parts)}</div>')
    about = f"Seed {run.seed}. Above: test samples of the task. Middle: what the network makes of them. Below: what it "
    about += "draws from the prior, by the noise of the same samples."
    return f"<details open><summary>What the network draws</summary><p>{about}</p>{''.join(rows)}</details>"


def _matrices(group: Group) -> str:
    """The matrices that were measured, of accuracies, the loss and the correlation, as tables of means over seeds."""
    parts = []
    first = group.runs[0]
    loss = {"RMSE": "RMSE", "%": "Loss, nats"}.get(first.unit, f"Loss, {first.unit}")
    titles = {
        "accuracy": "Task-incremental accuracy, %",
        "class_incremental_accuracy": "Class-incremental accuracy, %",
        "loss": loss,
        "correlation": "Correlation of predictions with targets",
    }
    for field, title in titles.items():
        measured = [getattr(run, field) for run in group.runs]
        if any(not matrix.size or np.isnan(matrix).all() for matrix in measured):
            continue
        mean = np.mean(measured, axis=0)
        columns = [Column("after task"), *(Column(f"task {task}", 2) for task in range(1, len(mean) + 1))]
        rows = [
            [str(task), *("" if np.isnan(value) else f"{value:.2f}" for value in row)]
            for task, row in enumerate(mean.tolist(), start=1)
        ]
        table = as_html(Table(title.removesuffix(", %"), columns, rows))
        parts.append(f"<h3>{title}</h3>{table}")
    return "".join(parts)
