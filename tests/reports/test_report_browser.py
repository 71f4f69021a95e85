"""Reports in a real browser: no complaint, tables sort, charts tell values, themes, no overflow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt.experiment.summary import draw_report
from fedprompt.leaderboard.board import make_board
from fedprompt.leaderboard.collect import Entry, Suite
from fedprompt.leaderboard.output import Section, html
from fedprompt.reports.run_data import accuracy_of, load_run
from fedprompt.reports.sweep_report import write_sweep_report
from tests.support.chromium import FOUND, Browser
from tests.support.fake_runs import edit_summary, write_run, write_sweep
from tests.support.result_files import result_file

pytestmark = pytest.mark.skipif(FOUND is None, reason="no Chromium on this machine")
PHONE, DESKTOP = 390, 1200
TIP = "[...document.querySelectorAll('.tip')].filter(t => !t.hidden).map(t => t.innerText).join()"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("reports") / "run", clients=6, classes=5, rounds=4)
    points = [
        {"round": r, "accuracy": 0.4 + 0.1 * r, "up": 900 * 2000**r, "down": 0} for r in range(3)
    ]
    curve = {"points": points, "reached": [{"percent": 90.0 + p["round"], **p} for p in points]}
    edit_summary(folder, protocols={"communication": {"curves": {"global": curve}}})
    return draw_report(folder).parent


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    return write_sweep_report(write_sweep(folder), folder / "report.html")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A leaderboard of 38 rows in two scenarios, at one setting."""
    results = [
        result_file(f"a_long_name_{i}", {"x": {1: i / 50}, "y": {1: (i * 7 % 38) / 50}})
        for i in range(38)
    ]
    entries = tuple(Entry(Path(f"{i}.json"), result) for i, result in enumerate(results))
    metrics = {"x": "personal", "y": "personal"}
    suite = Suite("demo-v1", results[0].suite_hash, results[0].planned, metrics, entries)
    ranking = make_board(suite, "default")
    assert ranking is not None
    path = tmp_path_factory.mktemp("board") / "leaderboard.html"
    path.write_text(html([Section(suite, (ranking,))], []), encoding="utf-8")
    return path


def column(browser: Browser, table: str, number: int) -> list[str]:
    cells = f"document.querySelectorAll('table.{table} tbody tr')"
    texts = browser.run(f"[...{cells}].map(r => r.cells[{number}].innerText)")
    return [str(text) for text in texts]


def click_head(browser: Browser, table: str, number: int) -> str:
    head = f"document.querySelector('table.{table}').tHead.rows[0].cells[{number}]"
    browser.run(f"{head}.querySelector('button').click()")
    return str(browser.run(f"{head}.getAttribute('aria-sort')"))


def percents(texts: list[str]) -> list[float]:
    return [float(re.split("[ \N{NO-BREAK SPACE}]", text)[0]) for text in texts]


def test_clients_sort_both_ways(browser: Browser, run: Path) -> None:
    browser.open(run / "report.html", DESKTOP)
    assert column(browser, "clients", 0) == [str(k) for k in range(6)]
    assert click_head(browser, "clients", 4) == "descending"
    shown = percents(column(browser, "clients", 4))
    assert shown == sorted(shown, reverse=True)
    assert column(browser, "clients", 0) != [str(k) for k in range(6)]
    assert click_head(browser, "clients", 4) == "ascending"
    assert percents(column(browser, "clients", 4)) == sorted(shown)
    assert browser.complaints == []


def test_bytes_sort_by_size(browser: Browser, run: Path) -> None:
    browser.open(run / "report.html", DESKTOP)
    shown = ["900 B", "1.7 MiB", "3.4 GiB"]
    assert click_head(browser, "protocol", 3) == "descending"
    assert [re.sub(r"\s", " ", text) for text in column(browser, "protocol", 3)] == shown[::-1]
    click_head(browser, "protocol", 3)
    assert [re.sub(r"\s", " ", text) for text in column(browser, "protocol", 3)] == shown


def test_the_sweeps_table_sorts_by_mean(browser: Browser, sweep: Path) -> None:
    browser.open(sweep, DESKTOP)
    click_head(browser, "groups", 2)
    shown = percents(column(browser, "groups", 2))
    assert shown == sorted(shown, reverse=True)
    click_head(browser, "groups", 2)
    assert percents(column(browser, "groups", 2)) == sorted(shown)
    assert browser.complaints == []


def test_every_chart_of_a_run_tells_values(browser: Browser, run: Path) -> None:
    data = load_run(run)
    browser.open(run / "report.html", DESKTOP)
    assert browser.run(TIP) == ""
    browser.point("#accuracy_per_round svg", 0.98, 0.5)  # the last round
    tip = browser.run(TIP)
    assert "Round 4" in tip
    assert f"{100 * data.rounds[-1]['global']['accuracy']:.1f} %" in tip
    assert "±" in tip
    browser.point("#client_accuracy svg", 0.98, 0.5)
    accuracy = accuracy_of(data.last("personal"))
    assert "Client 5" in browser.run(TIP)
    assert f"{100 * accuracy[5]:.1f} %" in browser.run(TIP)
    assert "training images" in browser.run(TIP)
    browser.point("#loss_per_round svg", 0.98, 0.4)
    assert f"{data.rounds[-1]['train']['loss-ce']:.4g}" in browser.run(TIP)
    browser.point("#partition .panel:last-of-type svg", 0.9, 0.1)
    assert "Class class 0" in browser.run(TIP)
    browser.point("#protocol_communication svg", 0.98, 0.2)
    assert "92 %" in browser.run(TIP)
    browser.point("h1", 0.5, 0.5)
    assert browser.run(TIP) == ""
    assert browser.complaints == []


def test_every_chart_of_a_sweep_tells_values(browser: Browser, sweep: Path) -> None:
    browser.open(sweep, DESKTOP)
    for name, words in (
        ("heat", "partition.alpha"),
        ("curves", "Round 2"),
        ("bytes", "KiB"),
        ("clients", "median"),
    ):
        browser.point(f"#{name} svg", 0.85, 0.4)
        assert words in browser.run(TIP), name
    assert browser.complaints == []


def test_keys_move_through_a_chart(browser: Browser, run: Path) -> None:
    browser.open(run / "report.html", DESKTOP)
    browser.run("document.querySelector('#loss_per_round svg').focus()")
    for _ in range(2):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    assert "Round 1" in browser.run(TIP)
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert browser.run(TIP) == ""


def test_a_curve_can_be_switched_off(browser: Browser, run: Path) -> None:
    browser.open(run / "report.html", DESKTOP)
    curves = "document.querySelectorAll('#loss_per_round polyline').length"
    assert browser.run(curves) == 4, "three cross-entropies, and the sum of all terms"
    browser.run("document.querySelector('#loss_per_round .chip').click()")
    assert browser.run(curves) == 3
    for _ in range(3):  # all off: an empty chart, no error
        browser.run("document.querySelector('#loss_per_round .chip[aria-pressed=true]').click()")
    browser.point("#loss_per_round svg", 0.5, 0.5)
    assert browser.complaints == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_pages_fit_and_follow_the_theme(
    browser: Browser, run: Path, sweep: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    for page in (run / "report.html", sweep):
        browser.open(page, width, dark=dark)
        assert browser.run("document.documentElement.scrollWidth") == width
        page_colour = "getComputedStyle(document.body).backgroundColor"
        before = browser.run(page_colour)
        assert (sum(map(int, re.findall(r"\d+", before))) < 200) == dark
        charts = browser.run("document.querySelectorAll('.plot svg').length")
        assert charts == browser.run("document.querySelectorAll('.plot').length") >= 4
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 30_000
        browser.run("document.getElementById('theme').click()")
        after = browser.run(page_colour)
        assert (sum(map(int, re.findall(r"\d+", after))) < 200) != dark
        browser.open(page, width, dark=dark)  # the choice is kept
        assert browser.run(page_colour) == after
        browser.run("localStorage.clear()")
    assert browser.complaints == []


def test_the_page_runs_no_script_of_others(browser: Browser, run: Path, tmp_path: Path) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    (tmp_path / "x.html").write_text(html.replace("</main>", "</main><script>var own = 1</script>"))
    browser.open(tmp_path / "x.html", DESKTOP)
    assert browser.run("typeof own") == "undefined"
    assert "Content Security Policy" in " ".join(browser.complaints)
    browser.complaints.clear()


def test_wide_values_and_labels_stay_inside_a_phone(
    browser: Browser, run: Path, sweep: Path
) -> None:
    browser.open(run / "report.html", PHONE)
    box = "document.querySelector('.headlines .value')"
    browser.run(f"{box}.textContent = '48.3 ± 16.5 % and a long unit'")
    assert browser.run("document.documentElement.scrollWidth") == PHONE
    browser.open(sweep, PHONE)
    assert browser.run("document.documentElement.scrollWidth") == PHONE
    inside = (
        "[...document.querySelectorAll('#clients svg text')].every(t => {"
        "const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();"
        "return a.left >= b.left && a.right <= b.right; })"
    )
    assert browser.run(inside)
    table = "document.querySelector('table.groups')"
    browser.run(f"{table}.parentElement.scrollLeft = 200")
    name = f"{table}.tBodies[0].rows[0].cells[0].getBoundingClientRect().left"
    assert browser.run(name) == browser.run(
        f"{table}.parentElement.getBoundingClientRect().left + 1"
    )


def test_cells_of_a_narrow_heat_map_are_not_blank(browser: Browser, tmp_path: Path) -> None:
    runs = write_sweep(tmp_path, alphas=(0.1, 0.2, 0.3, 0.5, 1.0, 3.0, 10.0), clients=(3, 5))
    browser.open(write_sweep_report(runs, tmp_path / "report.html"), PHONE)
    cells = browser.run("document.querySelectorAll('#heat rect.cell').length")
    written = "document.querySelectorAll('#heat text.strong, #heat text.ink')"
    texts = browser.run(f"[...{written}].map(t => t.textContent)")
    assert cells == 14
    assert len(texts) == cells
    assert all(re.fullmatch(r"[\d.]+( %)?", text) for text in texts)


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_ranks_of_many_rows_are_legible(browser: Browser, board: Path, width: int) -> None:
    browser.open(board, width)
    assert browser.run("document.documentElement.scrollWidth") == width
    overlaps = (
        "(() => { const all = [...document.querySelectorAll('#ranks-demo-v1-default svg text')]"
        ".map(t => t.getBoundingClientRect()); let n = 0;"
        "all.forEach((a, i) => all.slice(i + 1).forEach(b => { if (a.left < b.right && "
        "b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2) n += 1; }));"
        "return [all.length, n, Math.min(...all.map(a => a.left)) >= 0,"
        f"Math.max(...all.map(a => a.right)) <= {width}]; }})()"
    )
    count, overlapping, left, right = browser.run(overlaps)
    assert count > 38
    assert (overlapping, left, right) == (0, True, True)
    browser.point("#ranks-demo-v1-default svg", 0.02, 0.95)  # the last name of the left side
    assert "average rank" in browser.run(TIP)
    assert "a_long_name" in browser.run(TIP)
    browser.point("#traffic-demo-v1 svg", 0.5, 0.5)
    assert "a_long_name" in browser.run(TIP)
    assert browser.complaints == []
