"""The page and the tables of a comparison say what compare.json says, and escape all of it."""

import json
import math
import re

import pytest
from matplotlib.colors import to_hex

from fslora.compare.statistics import spread
from fslora.compare.table import _pair_target
from fslora.report.comparison import caption, render_comparison, render_markdown, write_comparison
from fslora.report.comparison_plots import draw_comparison, draw_curves, has_bands
from fslora.report.comparison_tables import formatted, notes, paper_table, target_tables
from fslora.report.plots import house_style

EVIL = "<script>alert(1)</script>|"
COSTS = ("bytes_up", "bytes_down", "bytes", "adapter_bytes", "head_bytes", "sim_seconds")


def strategy(label, values, cost, *, reached=2):
    """A strategy of seeds with these final losses, that pays `cost` bytes each way in a round."""
    runs = [
        {"seed": seed, "lr": 0.01, "server_lr": 1.0, "metric": 0.5, "loss": value, "failed": None}
        | {"bytes": 8 * cost, "wall_seconds": 3.0}
        for seed, value in enumerate(values)
    ]
    costs = {key: spread([float(4 * cost)] * reached) for key in COSTS}
    return {
        "label": label,
        "runs": runs,
        "final": {"metric": spread([0.5] * len(values)), "loss": spread(values)}
        | {key: spread([4.0 * cost] * len(values)) for key in COSTS},
        "targets": [
            {"figure": "loss", "value": 3.5, "reached": reached, "seeds": [{}] * len(values)}
            | {"round": spread([2.0] * reached), **costs}
        ],
        "curve": [
            {"round": at, "value": spread([5 + (value - 5) * at / 4 for value in values])}
            | {key: spread([2.0 * cost * at] * len(values)) for key in ("bytes", "sim_seconds")}
            for at in range(5)
        ],
    }


def pair(one, other, winner):
    quotient = {"mean": 0.4, "low": 0.3, "high": 0.5, "winner": one}
    keys = ("bytes_up", "bytes_down", "bytes", "sim_seconds")
    target = {"figure": "loss", "value": 3.5, **dict.fromkeys(keys, quotient)}
    found = {"one": one, "other": other, "winner": winner, "targets": [target]}
    return found | {"difference": spread([-0.5, -0.52])}


def dataset(*strategies, **changes):
    first, *others = strategies
    settings = {"clients": 6, "per_round": 3, "rounds": 4, "local_steps": 2, "batch_size": 4}
    settings |= {"model": EVIL, "data": "d", "partition": "iid", "rank": 16, "devices": "x"}
    data = {"name": "d", "figure": "loss", "metric_name": "accuracy", "settings": settings}
    data |= {"seeds": [0, 1], "splits": {"0": {"clients": "c0", "evaluation": "e0"}}}
    data |= {"search": None, "strategies": list(strategies)}
    data["pairs"] = [pair(first["label"], other["label"], None) for other in others]
    return data | changes


@pytest.fixture
def data():
    return dataset(
        strategy("fslora", [3.0, 3.1], 1000),
        strategy(EVIL, [4.0, 4.2], 30_000, reached=1),
        strategy("zero-shot", [5.0, 5.0], 0, reached=0),
    )


def test_the_paper_s_table(data):
    other = {**data, "name": "e", "strategies": data["strategies"][:2]}
    table = paper_table([data, other])
    assert table.heads[3:] == ["d, loss (nats)", "e, loss (nats)", "average"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["fslora"] == ["8.0 kB", "2 h 13 min", "3.050 ± 0.071", "3.050 ± 0.071", "3.050"]
    assert rows["zero-shot"][3:] == ["–", "–"], "not compared on the second"
    classes = {**data, "figure": "metric", "name": "f"}
    assert "average" not in paper_table([data, classes]).heads, "no mean of losses and scores"
    assert paper_table([classes]).rows[0][3] == "50.0 ± 0.0"


def test_costs_to_a_target_are_given_only_where_every_seed_reached_it(data):
    [table] = target_tables(data)
    rows = {row[0]: dict(zip(table.heads, row, strict=True)) for row in table.rows}
    assert rows["fslora"]["reached"] == "2 of 2 seeds"
    assert rows["fslora"]["up"] == "4.0 kB"
    assert (rows[EVIL]["reached"], rows[EVIL]["up"]) == ("1 of 2 seeds", "–")
    assert rows[EVIL]["bytes ×"] == "0.40 [0.30, 0.50] ✓"
    assert rows["zero-shot"]["reached"] == "never"


def test_a_failed_run_did_not_reach_the_target(data):
    data["strategies"][0]["targets"][0]["seeds"] = [{}]  # as of the run that is left
    data["strategies"][0]["targets"][0]["reached"] = 1
    data["strategies"][0]["runs"][1]["failed"] = "diverged"
    [table] = target_tables(data)
    assert table.rows[0][1:4] == ["1 of 2 seeds", "–", "–"]
    costs = [{"seed": seed, **dict.fromkeys((*COSTS, "round"), 2.0)} for seed in (0, 1)]
    mine, theirs = ({"figure": "loss", "value": 3.5, "seeds": costs[:n]} for n in (1, 2))
    for one, other in ((mine, theirs), (theirs, mine)):
        assert _pair_target(one, other, [0, 1], "a", "b")["bytes"]["mean"] is None
    assert _pair_target(theirs, theirs, [0, 1], "a", "b")["bytes"]["mean"] == 1


def test_one_of_anything_is_called_one(data):
    one = dataset(strategy("fslora", [3.0], 10, reached=1), seeds=[0])
    one["settings"] |= {"clients": 1, "rounds": 1, "local_steps": 1, "batch_size": 1}
    text = render_markdown([one]) + caption(one, "rounds.png")
    for what in ("1 way to", "1 client,", "1 round of 1 local step of 1 example;", "over 1 seed."):
        assert what in text
    assert not re.search(r"\b1 (way|client|round|local step|example|seed)s", text)
    data["strategies"][2]["final"]["bytes"] = spread([])
    assert "pays nothing" not in caption(data, "bytes.png"), "it failed, and is not drawn"


def test_a_heading_names_a_few_data_sets_and_counts_many(data):
    named = [{**data, "name": f"set {number}"} for number in range(4)]
    assert "to federate LoRA on set 0, set 1, set 2\n" in render_markdown(named[:3])
    assert "to federate LoRA on 4 data sets\n" in render_markdown(named)


def test_everything_is_escaped_and_nothing_fetched(data, tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps({"datasets": [data]}))
    html = write_comparison(tmp_path).read_text()
    assert EVIL not in html
    assert "<script" not in html
    assert "default-src 'none'" in html
    assert html.count('src="data:image/png;base64,') == 3
    assert not re.search(r"(src|href)=\"(?!data:)", html)
    text = (tmp_path / "compare.md").read_text()
    for line in text.splitlines():
        if line.startswith("|" + EVIL[:-1]):
            assert EVIL[:-1] + "\\|" in line
    assert {entry.name for entry in tmp_path.iterdir()} == {
        *("compare.json", "compare.md", "report.html", "rounds.png", "bytes.png", "time.png")
    }


def test_curves_have_their_means_their_ends_and_a_plain_axis(data):
    with house_style():
        axes = draw_curves(data, "bytes").axes[0]
        figure = axes.get_figure()
        figure.canvas.draw()
        ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert axes.get_xscale() == "log", "30 times the bytes"
    assert ticks
    assert not any("$" in tick for tick in ticks)
    first, second, free = axes.get_lines()
    assert list(first.get_xdata()) == [2, 4, 6, 8], "kB; round 0 has no place on the axis"
    assert first.get_ydata()[-1] == pytest.approx(3.05)
    assert to_hex(first.get_color()) != to_hex(second.get_color())
    assert list(free.get_ydata()) == [5.0, 5.0], "what pays nothing is a line across"
    with house_style():
        axes = draw_curves(data, "round").axes[0]
    assert axes.get_xscale() == "linear"
    assert "30" not in caption(data, "rounds.png")
    assert "3.050, of fslora" in caption(data, "rounds.png")
    assert "pays nothing" in caption(data, "bytes.png")


def test_heights_have_room_for_what_is_drawn_only():
    cheap, dear = strategy("cheap", [3.0], 1000), strategy("dear", [4.0], 30_000)
    with house_style():
        low, high = draw_curves(dataset(cheap, dear), "bytes").axes[0].get_ylim()
        _, whole = draw_curves(dataset(cheap, dear), "round").axes[0].get_ylim()
    assert low < 3.0 < 4.75 < high < 5.0 < whole, "round 0, at 5, is not on the logarithmic axis"


def test_many_lines_have_bars_instead_of_bands():
    many = dataset(*(strategy(f"s{n}", [3.0 + n, 3.1 + n], 1000) for n in range(8)))
    assert not has_bands(many)
    with house_style():
        axes = draw_curves(many, "round").axes[0]
    assert not axes.collections
    bars = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
    assert len(bars) == 8
    half = 12.7062 * 0.1 / 2
    assert list(bars[0].get_ydata()) == pytest.approx([3.05 - half, 3.05 + half], abs=1e-3)
    styles = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(styles) == 8, "the eighth has the first's colour, dashed"


def test_without_a_clock_and_with_one_seed_nothing_is_made_up():
    data = dataset(strategy("fslora", [3.0], 10), strategy("fedit", [3.1], 20), seeds=[0])
    data["settings"]["devices"] = ""
    for each in data["strategies"]:
        each["final"]["sim_seconds"] = spread([])
        for point in each["curve"]:
            point["sim_seconds"] = spread([])
    data["pairs"][0]["difference"] = spread([-0.1])
    pictures = draw_comparison(data)
    assert list(pictures) == ["rounds.png", "bytes.png"]
    html = render_comparison([data], [pictures])
    assert "no winner can be called" in html
    assert "undecided" in html
    assert "wins" not in html.replace("A win is", "")
    assert "devices and networks" not in render_markdown([data])


def test_notes_say_what_failed_and_where_the_grid_ended(data):
    data["strategies"][0]["runs"][1]["failed"] = "round 1: nothing usable"
    trials = [
        {"label": label, "seed": 0, "values": {"lr": lr}, "metric": None, "loss": loss}
        | {"failed": None, "chosen": chosen}
        for label, lr, loss, chosen in (
            ("fslora", 0.1, 4.0, False),
            ("fslora", 0.2, 3.0, True),
            ("fslora", 0.3, 3.5, False),
            ("fedit", 0.1, 3.0, True),
            ("fedit", 0.2, 3.2, False),
            ("zero-shot", 0.1, 5.0, True),
            ("zero-shot", 0.3, 5.0, False),
        )
    ]
    data["search"] = {"grid": {"lr": [0.1, 0.2, 0.3]}, "trials": trials}
    failed, edge = notes(data)
    assert "fslora failed with seed 1 (round 1: nothing usable)" in failed
    assert edge.startswith("The best lr of fedit is at an end"), "not of one that does not train"
    data["search"]["grid"] = {"lr": [0.1, 0.2]}
    assert notes(data)[-1].startswith("The best lr of each method is at an end")
    data["search"] = {
        "grid": {"rslora": [False, True]},
        "trials": [{**trials[1], "values": {"rslora": True}}],
    }
    assert notes(data) == [failed], "names and choices have no ends"


@pytest.mark.parametrize(
    ("value", "figure", "text"),
    [(0.8766, "metric", "+87.7"), (-0.0002, "metric", "0.0"), (-0.0012, "loss", "-0.001")],
)
def test_signed_figures(value, figure, text):
    assert formatted(value, figure, sign=True) == text


def test_long_names_get_a_line_of_their_own_and_many_decades_fewer_ticks(data):
    def drawn(cheapest, *names):
        costs = [cheapest, *[1e9] * (len(names) - 1)]
        found = dataset(*(strategy(n, [0.5, 0.6], c) for n, c in zip(names, costs, strict=True)))
        with house_style():
            figure = draw_curves(found, "bytes")
        legend, axes = figure.legends[0], figure.axes[0]
        low, high = axes.get_xlim()
        return legend._ncols, [at for at in axes.get_xticks() if low <= at <= high]

    columns, near = drawn(1e7, "fslora", "fedit")
    assert columns == 2
    assert any(round(math.log10(at), 6) % 1 for at in near)
    columns, far = drawn(1e4, "fslora:averaging=count,ratios=1/32,1/16,1/8", "fedit")
    assert columns == 1
    assert far
    assert all(round(math.log10(at), 6) % 1 == 0 for at in far)


def test_the_longest_name_and_its_figure_are_inside_the_picture():
    name = "fslora:averaging=count,sampler=class-shared," + "ratios=1/8" + ",1/4" * 30
    with house_style():
        figure = draw_curves(dataset(strategy(name, [3.0, 3.1], 10)), "round")
        figure.draw_without_rendering()
        letters = figure.legends[0].get_texts()[0]
        inside = figure.bbox
        for box in (letters.get_window_extent(), figure.axes[0].get_tightbbox()):
            assert inside.x0 <= box.x0 < box.x1 <= inside.x1
            assert inside.y0 <= box.y0 < box.y1 <= inside.y1
    assert letters.get_text().endswith("3.050")
