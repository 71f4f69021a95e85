"""Plain lines have a fixed format, tables hold the numbers, and no text is read as markup."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fedprompt.evaluation.registry import result_tables
from fedprompt.experiment.display import (
    LogDisplay,
    PlainDisplay,
    QuietDisplay,
    RichDisplay,
    make_display,
)
from fedprompt.reports.format import (
    best_of,
    human_bytes,
    human_time,
    percent,
    percent_spread,
    plural,
)
from fedprompt.reports.result_tables import protocol_tables, summary_table

SUMMARY: dict[str, Any] = {
    "experiment": "quickstart",
    "method": "fedrsclip",
    "strategy": "fedavg",
    "seed": 1,
    "rounds": 3,
    "global": {"accuracy": 0.6123},
    "personal": {"mean": 0.7894, "std": 0.0612, "worst": 0.5, "p10": 0.5555},
    "personal_on_global": {"mean": 0.593, "std": 0.02},
    "zero_shot": {
        "accuracy": 0.4,
        "personal": {"mean": 0.41, "std": 0.1, "worst": 0.2, "p10": 0.3},
    },
    "local_only": {
        "personal": {"mean": 0.8, "std": 0.2, "worst": 0.1, "p10": 0.15},
        "personal_on_global": {"mean": 0.461, "std": 0.01},
        "context_tokens": 4,
    },
    "context_tokens": 4,
    "uploaded_numbers_per_client_round": 2048,
    "bytes_up": 245_760,
    "bytes_down": 1_572_864,
    "rejected_replies": 0,
}


def record(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "round",
        "round": number,
        "train": {"loss": 1.2341},
        "clients": {"sampled": 10, "accepted": 10, "rejected": 0},
        "bytes_up": 40_960,
        "bytes_down": 20_480,
        "global": {"accuracy": 0.612},
        "personal": {"mean": 0.789},
    } | changes


def plain() -> tuple[PlainDisplay, io.StringIO]:
    out = io.StringIO()
    return PlainDisplay(Console(file=out, width=40, highlight=False)), out


def live() -> tuple[RichDisplay, io.StringIO]:
    out = io.StringIO()
    return RichDisplay(Console(file=out, width=100, force_terminal=True, highlight=False)), out


def cells(shown: Group) -> list[list[str]]:
    """The cells of the only table, row by row, as plain text."""
    (table,) = (part for part in shown.renderables if isinstance(part, Table))
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def note(shown: Group) -> str:
    """What stands below the tables."""
    assert isinstance(shown.renderables[-1], Text)
    return shown.renderables[-1].plain


def printed(shown: Group, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(shown)
    return out.getvalue()


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (81_920, "80.0 KiB"),
        (1_048_575, "1.0 MiB"),
        (1_572_864, "1.5 MiB"),
        (3 * 1024**3, "3.0 GiB"),
        (5000 * 1024**4, "5000.0 TiB"),
    ],
)
def test_bytes_in_binary_units(n: int, text: str) -> None:
    assert human_bytes(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0:00"), (12.3, "0:12"), (59.6, "1:00"), (185, "3:05"), (3723, "1:02:03"), (-1, "0:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert human_time(seconds) == text


def test_accuracies() -> None:
    assert percent(0.6126) == "61.3 %"
    assert percent(0.0) == "0.0 %"
    assert percent(None) == "-"
    assert percent_spread(0.789, 0.061) == "78.9 ± 6.1 %"
    assert percent_spread(0.789, None) == "78.9 %"
    assert percent_spread(None, 0.1) == "-"


def test_plain_line_format_and_traffic_adds_up() -> None:
    display, out = plain()
    display.start("quickstart", rounds=10, first_round=1)
    display.round(record(1), eta_s=60)
    display.round(record(2), eta_s=12.3)
    numbers = "loss 1.234  global 61.2 %  personal 78.9 %"
    assert out.getvalue().splitlines() == [
        "quickstart: 10 rounds",
        f"round 1/10  {numbers}  up 40.0 KiB  down 20.0 KiB  left 1:00",
        f"round 2/10  {numbers}  up 80.0 KiB  down 40.0 KiB  left 0:12",
    ]


def test_plain_line_of_a_round_without_evaluation_and_with_rejected_replies() -> None:
    display, out = plain()
    display.start("quickstart", rounds=3, first_round=2)
    changes = {"global": None, "personal": None, "train": None}
    rejected = {"clients": {"sampled": 3, "accepted": 1, "rejected": 2}}
    display.round(record(2, **changes, **rejected), eta_s=float("inf"))
    display.round(record(3, kind="local_only", bytes_up=0, bytes_down=0, **changes), eta_s=None)
    assert out.getvalue().splitlines() == [
        "quickstart: 3 rounds, going on from round 2",
        "round 2/3  loss -  global -  personal -  up 40.0 KiB  down 20.0 KiB  rejected 2  left -",
        "local-only 3/3  loss -  global -  personal -  up 40.0 KiB  down 20.0 KiB  left -",
    ]


def test_totals_in_the_record_win_over_the_sum() -> None:
    display, out = plain()
    display.start("quickstart", rounds=9, first_round=9)
    display.round(record(9, total_bytes_up=2**20, total_bytes_down=2**21), eta_s=0)
    assert "up 1.0 MiB  down 2.0 MiB" in out.getvalue()


def test_messages_keep_their_brackets_and_their_line() -> None:
    text = "[red]cached[/red] in " + "/long" * 30
    for display, out in (plain(), live()):
        display.start("[b]title[/b]", rounds=1, first_round=1)
        display.message(text)
        display.close()
        assert text in out.getvalue()
        assert "[b]title[/b]" in out.getvalue()


def test_plain_output_has_no_control_codes_and_ends_with_the_table() -> None:
    display, out = plain()
    display.start("quickstart", rounds=3, first_round=1)
    display.phase("encoding images")
    display.round(record(1), eta_s=1)
    display.finish(SUMMARY, "runs/quickstart")
    assert "\x1b" not in out.getvalue()
    assert "encoding images ..." in out.getvalue()
    assert out.getvalue().endswith("run folder: runs/quickstart\n")


def test_live_block_shows_the_round_and_gives_the_cursor_back() -> None:
    display, out = live()
    display.start("quickstart", rounds=10, first_round=1)
    display.phase("encoding images")
    display.round(record(3), eta_s=12)
    display.close()
    display.close()
    for text in ("encoding images", "3/10", "1.234", "61.2 %", "78.9 %", "40.0 KiB", "0:12"):
        assert text in out.getvalue()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_live_phase_before_the_run_starts_and_a_resumed_bar() -> None:
    display, out = live()
    display.phase("opening data")
    assert "opening data" in out.getvalue()
    display.start("quickstart", rounds=10, first_round=5)
    display.close()
    assert "4/10" in out.getvalue()
    display, out = live()
    display.start("quickstart", rounds=10, first_round=0)
    display.close()
    assert "0/10" in out.getvalue()


def test_live_display_of_a_run_without_rounds() -> None:
    display, out = live()
    display.start("zero_shot", rounds=0, first_round=1)
    display.round(record(0), eta_s=None)
    display.finish(SUMMARY | {"rounds": 0})
    assert "0/0" in out.getvalue()


def test_a_backdoor_has_a_column_of_its_own() -> None:
    backdoor = {"success": 0.125, "without_trigger": 0.0, "attackers": 2}
    assert cells(summary_table(SUMMARY | {"backdoor": backdoor}, 100))[-1][-1] == "12.5 %"
    display, out = plain()
    display.round(record(1, backdoor=backdoor), None)
    assert "attack success 12.5 %" in out.getvalue()


def test_summary_table_holds_the_numbers() -> None:
    table = summary_table(SUMMARY, 80)
    assert cells(table) == [
        ["zero-shot", "40.0 %", "41.0 ± 10.0 %", "20.0 %", "30.0 %", "-"],
        ["local-only", "-", "80.0 ± 20.0 %", "10.0 %", "15.0 %", "46.1 ± 1.0 %"],
        ["fedrsclip", "61.2 %", "78.9 ± 6.1 %", "50.0 %", "55.5 %", "59.3 ± 2.0 %"],
    ]
    assert max(map(len, printed(table, 80).splitlines())) <= 80
    assert sum(isinstance(part, Table) for part in table.renderables) == 1, "one table at 80"
    caption = "2,048 numbers up per client and round\n240.0 KiB up, 1.5 MiB down"
    assert note(table) == caption
    rejected = summary_table(SUMMARY | {"rejected_replies": 3}, 80)
    assert note(rejected) == caption + ", 3 replies rejected"
    one = summary_table(SUMMARY | {"rejected_replies": 1}, 80)
    assert note(one) == caption + ", 1 reply rejected"


def test_the_best_of_every_column_is_bold_whoever_it_is() -> None:
    out = io.StringIO()
    terminal = Console(file=out, width=80, force_terminal=True, color_system="standard")
    terminal.print(summary_table(SUMMARY, 80))
    bold = set(re.findall(r"\x1b\[1m *(\d+\.\d)", out.getvalue()))
    # Local-only is better on the clients' own images, the federation everywhere else.
    assert bold == {"61.2", "80.0", "50.0", "55.5", "59.3"}
    assert best_of([None, 0.5]) == set()
    assert best_of([0.5, None, 0.5]) == {0, 2}


def test_rows_that_are_not_matched_and_coarse_accuracies_are_named() -> None:
    few = {"below": 5, "clients": [2, 7]}
    text = note(summary_table(SUMMARY | {"context_tokens": 16, "few_test_images": few}, 80))
    assert "local-only has prompts of 4 tokens, fedrsclip has prompts of 16 tokens" in text
    assert "2 clients have fewer than 5 test images (2, 7)" in text
    many = note(summary_table(SUMMARY | {"few_test_images": {**few, "clients": [*range(99)]}}, 80))
    assert "99 clients have" in many
    assert "7, ...)" in many


def test_plural_forms() -> None:
    assert [plural(n, "round") for n in (0, 1, 2)] == ["0 rounds", "1 round", "2 rounds"]
    assert [plural(n, "reply") for n in (1, 1200)] == ["1 reply", "1,200 replies"]
    display, out = plain()
    display.start("quickstart", rounds=1, first_round=1)
    assert out.getvalue() == "quickstart: 1 round\n"


@pytest.mark.parametrize("width", [80, 60, 40])
def test_the_live_block_is_not_wider_than_the_terminal(width: int) -> None:
    out = io.StringIO()
    display = RichDisplay(Console(file=out, width=width, force_terminal=True, highlight=False))
    display.start("quickstart", rounds=300, first_round=1)
    rejected = {"clients": {"sampled": 3, "accepted": 1, "rejected": 200}}
    display.round(
        record(299, total_bytes_up=2**40 - 1, total_bytes_down=2**40 - 1, **rejected), eta_s=4000
    )
    display.close()
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    for field in ("loss 1.234", "personal 78.9 %", "down 1.0 TiB", "rejected 200", "left 1:06:40"):
        assert any(field in line for line in lines), "no field is broken"


def test_a_log_gets_the_lines_of_rounds_and_no_result() -> None:
    lines: list[str] = []
    display = LogDisplay(lines.append)
    display.start("quickstart", rounds=2, first_round=1)
    display.round(record(1), eta_s=3)
    display.finish(SUMMARY, "runs/quickstart")
    assert lines[0] == "quickstart: 2 rounds"
    assert lines[1].startswith("round 1/2  loss 1.234")
    assert len(lines) == 2


def test_summary_table_without_baselines_or_numbers() -> None:
    bare = {"method": "coop_local", "global": None, "zero_shot": None}
    assert cells(summary_table(bare, 80)) == [["coop_local", *["-"] * 5]]


def test_tables_print_names_literally() -> None:
    evil = SUMMARY | {"method": "[red]x[/red]", "experiment": "[bold]e", "strategy": "[s]"}
    text = printed(summary_table(evil, 200), 200)
    assert text.count("[red]x[/red]") == 1
    assert "[bold]e, round 3" in text


@pytest.mark.parametrize("width", [80, 50, 32])
def test_no_number_of_a_table_is_cut_or_folded(width: int) -> None:
    values = dict.fromkeys(
        ("base", "new", "harmonic", "base_of_all", "new_of_all", "harmonic_of_all"), 0.6818
    )
    spread = {"base": 0.123, "new": 0.123, "base_of_all": 0.123, "new_of_all": 0.123}
    rows = [{"model": name, **values, "std": spread, "why": ""} for name in ("global", "personal")]
    sizes = {"base_classes": [1], "new_classes": [2], "base_images": 1000, "new_images": 2000}
    protocols = {"base_to_new": {"rows": rows, **sizes}}
    shown = [
        summary_table(SUMMARY | {"method": "fedrsclip_visual"}, width),
        *protocol_tables(result_tables({"protocols": protocols}, "here"), width),
    ]
    text = "".join(printed(one, width) for one in shown)
    assert len(shown) == 2
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("68.2 ± 12.3 %") == 8
    assert text.count("68.2 %") == 4
    for number in ("78.9 ± 6.1 %", "41.0 ± 10.0 %", "55.5 %", "61.2 %"):
        assert number in text


def test_make_display_follows_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = make_display()
    assert isinstance(display, PlainDisplay)
    display.start("quickstart", rounds=1, first_round=1)
    display.finish(SUMMARY)
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert isinstance(make_display(), RichDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_display(), PlainDisplay)
    quiet = make_display(quiet=True)
    assert isinstance(quiet, QuietDisplay)
    quiet.start("quickstart", 1, 1)
    quiet.phase("encoding images")
    quiet.message("skipped one image")
    quiet.round(record(1), None)
    assert capsys.readouterr().out == ""
    quiet.finish(SUMMARY, "runs/quickstart")
    assert "78.9 ± 6.1 %" in capsys.readouterr().out


def test_an_ascii_stdout_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    make_display().finish(SUMMARY)
    sys.stdout.flush()
    assert b"78.9 ? 6.1 %" in raw.getvalue()
