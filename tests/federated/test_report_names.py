"""What a report and the terminal call things: the strategy, the score."""

import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from fslora.__main__ import main
from fslora.console import closing_table, data_line, progress
from fslora.report import format_bytes
from fslora.report.page import NAMES
from fslora.report.plots import draw_loss
from fslora.report.records import read_run
from fslora.report.units import format_enough, format_ratio, format_seconds, score_name, short_name
from fslora.strategies import STRATEGIES

from .test_report import SUMMARY, config, page_of, write_run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_page_names_its_strategy_and_sketches_only_where_there_are_some(tmp_path, strategy):
    page = page_of(write_run(tmp_path, settings=config(strategy=strategy)))
    assert page.text.startswith(f"{NAMES[strategy]}: stories260K on plays.txt")
    assert ("a sketch of" in page.text) == (strategy == "fslora")
    cut = ("fslora", "hetlora", "flexlora", "flora", "fed-plora", "local-only")
    assert ("1/8 or 1/2 of" in page.text) == (strategy in cut)
    one_adapter = strategy not in ("zero-shot", "head-only", "local-only", "centralised")
    assert ("trained one LoRA adapter" in page.text) == one_adapter
    assert ("nobody trained" in page.text) == (strategy == "zero-shot")


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("causal-lm", "next-token accuracy"),
        ("instruction", "accuracy of the likeliest answer"),
        ("classification", "f1"),
    ],
)
def test_a_score_has_the_name_of_what_it_is(tmp_path, task, name):
    """Only a classification is scored by what --metric asks for."""
    assert score_name(task, "f1") == name
    folder = write_run(tmp_path, settings=config(task=task, metric="f1"))
    assert f" {name} 0.500 → 0.800" in page_of(folder).text
    panel = draw_loss(read_run(folder)).axes[1]
    assert panel.get_ylabel() == name
    assert f"{name}: 0.500 → 0.800" in printed(200, score=name)


def printed(width, **changes):
    console = Console(width=width, record=True, file=io.StringIO())
    none = {"sim_seconds": None, "epsilon": None, "targets": [], "score": "accuracy"}
    closing_table(SUMMARY | none | changes, console)
    return console.export_text()


def test_a_narrow_terminal_gets_lines_and_a_wide_one_a_table():
    narrow, wide = printed(40), printed(100)
    for figure in ("768.0 kB", "50.3%", "4.111 → 3.222", "960.0 kB", "4.000 → 3.250"):
        assert figure in narrow
        assert figure in wide
    assert max(map(len, narrow.splitlines())) <= 40
    for width in range(50, 100):
        shown = printed(width, eval_loss_before=12.345)
        assert "12.345 → 3.250" in shown
        assert "…" not in shown
    assert "ratio 0.5: 11 clients" in narrow
    assert "\nall: 24 clients" in narrow


def test_format_bytes():
    texts = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 1_234_567: "1.2 MB", 12_345_678_901: "12.3 GB"}
    texts |= {999_949: "999.9 kB", 999_950: "1.0 MB"}
    assert {n: format_bytes(n) for n in texts} == texts


def test_a_local_path_is_named_shortly_and_a_hub_name_whole():
    assert short_name("/data/models/stories260K-hf") == "models/stories260K-hf"
    assert short_name("org/name") == "org/name"


def test_format_seconds_and_ratios():
    seconds = [format_seconds(s) for s in (0, 0.0042, 0.04999, 4.21, 59.96, 3599.4, 7512)]
    assert seconds == ["0.0 s", "4.2 ms", "50 ms", "4.2 s", "1 min 0 s", "59 min 59 s", "2 h 5 min"]
    enough = [format_enough(x) for x in (4.29, 4.2901, 12.34, 1234.5, 2e-05, 9.999, 1.0)]
    assert enough == ["4.29", "4.3", "12.4", "1240", "2e-05", "10", "1"]
    ratios = [format_ratio(r) for r in (0.125, 1.0, 0.3, 1 / 3, 0.3141)]
    assert ratios == ["1/8", "1", "3/10", "1/3", "0.314"]


def test_the_bar_of_a_finished_run_stays_in_its_last_round_and_knows_what_moved():
    out = io.StringIO()
    run = SimpleNamespace(rounds=3, cohort_size=2)
    with progress(run, Console(width=200, file=out, force_terminal=True)) as watcher:
        watcher.on_judging()
        time.sleep(0.2)
        watcher.on_start(3, 2_000_000)
    shown = out.getvalue()
    assert "judging the model" in shown
    assert "round 3/3" in shown
    assert "2.0 MB" in shown
    assert "6/6" in shown
    assert "4/3" not in shown


def test_the_data_in_a_line():
    sizes = {"clients": 20, "fewest_texts": 12, "most_texts": 340, "held_out": 1340}
    sizes |= {"judged_on": 128, "left_out_rows": 300, "left_out_values": 5}
    assert data_line(sizes, "natural:package") == (
        "20 clients, 12 to 340 texts each; 1,340 examples held out, judged on 128; "
        "300 rows of 5 other values of package left out"
    )
    even = {"fewest_texts": 7, "most_texts": 7, "judged_on": 1340, "left_out_rows": 0}
    assert data_line(sizes | even, "iid") == "20 clients, 7 texts each; 1,340 examples held out"


def test_the_command_reports_a_run_that_has_not_come_to_its_end(tmp_path, capsys):
    folder = write_run(tmp_path, summary=None)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    assert "has not come to its end" in (folder / "report.html").read_text()
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "is missing" in capsys.readouterr().err
