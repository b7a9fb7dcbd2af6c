"""The page is whole, refers to nothing outside itself, executes nothing, and tells apart what it shows."""

import re
from datetime import date
from html.parser import HTMLParser
from pathlib import Path

import pytest

from adapters.analysis.comparison import comparison, gather
from adapters.analysis.report import report as report_of
from adapters.analysis.report import write_report
from adapters.runs import RunDirectory
from adapters.runs.configuration import Configuration
from adapters.runs.provenance import versions
from adapters.runs.published import PublishedScores, PublishedTable
from became_core import BecameError
from tests.analysis.runs import plain, run

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = '</style></svg><script>alert(1)</script><img src=x onerror=alert(1)>"\' onload="alert(1)" ../../etc'


class Reader(HTMLParser):
    """Reads a page: its elements with their attributes, its text, and whether all is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(file: Path) -> tuple[str, Reader]:
    text = file.read_text(encoding="utf-8")
    return text, Reader(text)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of four groups with all that there can be to draw; it is drawn once."""
    runs = [run(seed=0), run(seed=1), plain("gpm", ranks=[{"fc1.weight": [1, 2]}] * 3), plain()]
    return write_report(runs, tmp_path_factory.mktemp("report"))


def test_every_method_has_a_section_with_its_figures(report: Path) -> None:
    _, page = read(report)
    sections = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
    assert sections == ["scores", "method-0", "method-1", "method-2"]
    described = [str(attributes.get("aria-label")) for tag, attributes in page.elements if tag == "svg"]
    # Five shared; accuracy, ranks, learning and two paths; accuracy and ranks; accuracy.
    assert len(described) == 5 + 5 + 2 + 1
    assert all(len(each) > 40 for each in described)
    assert any("became 89.50 ± 0.71" in each for each in described)
    headings = [attributes for tag, attributes in page.elements if tag == "th"]
    assert headings
    assert all(attributes["scope"] in ("col", "row") for attributes in headings)


def test_the_page_says_when_and_by_which_version_it_was_written(report: Path) -> None:
    _, page = read(report)
    assert f"Written by BECAME {versions()['became']} on {date.today().isoformat()}." in page.text


@pytest.mark.usefixtures("undrawn")
def test_one_seed_has_no_legend_of_spreads(tmp_path: Path) -> None:
    words = ("±", "deviation", "single seeds", "a line a seed", "over seeds")
    _, page = read(write_report([run(), plain("gpm")], tmp_path / "one"))
    assert [word for word in words if word in page.text] == []
    _, page = read(write_report([run(), run(seed=1)], tmp_path / "two"))
    assert [word for word in words if word not in page.text] == []


@pytest.mark.usefixtures("undrawn")
def test_the_page_has_the_title_the_scores_and_the_names_of_the_comparison(tmp_path: Path) -> None:
    config = {"tasks": 10, "first": 3}
    for folder, method, seed, epochs in (("a", "gpm", 0, 2), ("a", "became", 0, 2), ("b", "became", 0, 9)):
        RunDirectory(tmp_path / folder, method, seed).save(run(method, seed, config=config | {"epochs": epochs}))
    outs = [tmp_path / "a", tmp_path / "b"]
    table, cost = comparison(gather(outs))
    text, page = read(report_of(outs))
    assert f"<h1>{table.title}</h1>" in text
    assert table.title == "split-mnist, 10 tasks, the first 3"
    assert [row[0] for row in table.texts()] == ["became (a)", "gpm", "became (b)"]
    for shown in (table, cost):
        headings = "".join(column.heading for column in shown.columns)
        assert headings + "".join("".join(row) for row in shown.texts()) in page.text
    assert [heading[:-1] for heading in re.findall(r"</span>([^<]*<)/h2>", text)] == [row[0] for row in table.texts()]


def test_figures_lie_beside_the_page_in_both_forms(report: Path) -> None:
    figures = sorted(file.name for file in (report.parent / "figures").iterdir())
    assert "method0-became-path-seed0.svg" in figures
    assert [name for name in figures if name.endswith("png")] == [
        name.replace("svg", "png") for name in figures if name.endswith("svg")
    ]


def test_the_page_refers_to_nothing_outside_itself(report: Path) -> None:
    text, page = read(report)
    assert not re.search(r"(?:https?:|file:|//)\w", text.replace("http://www.w3.org/", ""))
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    targets = [str(v) for _, each in page.elements for k, v in each.items() if k in ("href", "src", "xlink:href")]
    targets += [f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", text)]
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(ids)
    assert "@import" not in text
    policy = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_a_figures_file_follows_the_readers_theme_and_stays_as_it_is_elsewhere(report: Path) -> None:
    for name in ("alpha", "plasticity", "scores", "method0-became-path-seed0"):
        text = (report.parent / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        style = text[text.index("<style>") : text.index("</style>")]
        assert "@media (prefers-color-scheme: dark)" in style
        colours = {colour for what, colour in re.findall(r"(fill|stroke): (#\w{6})", text.replace(style, ""))}
        assert {"#1f2328"} < colours
        assert [colour for colour in colours if colour not in style] == []
        assert "#ffffff" not in text


def test_the_page_follows_the_readers_theme(report: Path) -> None:
    text, _ = read(report)
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in drawn
    assert "var(--series-0)" in drawn
    assert "#1f2328" not in drawn


@pytest.mark.parametrize("hostile", [HOSTILE, "$\\frac$ {{}} \x00\ud800\n"])
def test_nothing_that_a_file_says_becomes_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile: str) -> None:
    monkeypatch.setattr("adapters.analysis.report.picture", lambda figure, kind: b"")  # a PNG has no markup
    ours = run(
        hostile,
        backend=hostile,
        benchmark=hostile,
        config={hostile: hostile},
        ranks=[{hostile: [1, 2]}] * 3,
        seconds={hostile: 1.0, "total": 2.0},
    )
    table = PublishedTable(hostile, hostile, {hostile: PublishedScores(70.0)})
    text, page = read(write_report([ours], tmp_path / "out", [table]))
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img", "iframe", "object", "embed", "link", "base"})
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "<script" not in text
    assert {file.name for file in tmp_path.iterdir()} == {"out"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"figures", "report.html"}
    if hostile is HOSTILE:
        assert HOSTILE in page.text


@pytest.mark.usefixtures("undrawn")
def test_published_numbers_are_shown_only_beside_all_tasks(tmp_path: Path) -> None:
    table = PublishedTable("a source", "a protocol", {"hat": PublishedScores(72.06, -0.5)})
    _, page = read(write_report([run()], tmp_path, [table]))
    assert "72.06" in page.text
    _, page = read(write_report([run(config={"tasks": 10, "first": 3})], tmp_path, [table]))
    assert "72.06" not in page.text


@pytest.mark.usefixtures("undrawn")
def test_the_command_that_repeats_a_run_is_shown_if_there_is_one(tmp_path: Path) -> None:
    config = Configuration.of({"lr": 0.02}, "became").to_json()
    text, _ = read(write_report([run(config=config)], tmp_path))
    assert "became run --backend torch --methods became --seeds 0 --benchmark split-mnist --lr 0.02</code>" in text
    _, page = read(write_report([run(config=config | {"unknown": 1})], tmp_path))
    assert "No command of this version" in page.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BecameError, match=r"cannot write to .*file"):
        write_report([run()], tmp_path / "file")


@pytest.mark.usefixtures("undrawn")
def test_samples_that_are_pictures_are_shown_as_pictures(tmp_path: Path) -> None:
    """One for each task so far after each task, with what it is for those who do not see it; others stay text."""
    address = "data:image/png;base64,iVBORw0KGgo="
    _, page = read(write_report([run(tasks=2, samples=[[address], [address, address]])], tmp_path / "pictures"))
    pictures = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [picture["src"] for picture in pictures] == [address] * 3
    assert pictures[1]["alt"] == "After task 2: test samples of task 1, what is made of them, and what is drawn."
    hostile = address + '" onerror="alert(1)'
    _, page = read(write_report([run(tasks=2, samples=[[hostile], [address, address]])], tmp_path / "hostile"))
    assert [sorted(attributes) for tag, attributes in page.elements if tag == "img"] == [["alt", "src"]] * 3
    _, page = read(write_report([run(tasks=2, samples=[["text"], [address, "text"]])], tmp_path / "text"))
    assert not [tag for tag, _ in page.elements if tag == "img"]
