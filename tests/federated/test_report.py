"""The report says what the run folder says, survives half-written folders, and escapes all."""

import base64
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fslora.report import write_report
from fslora.report.page import render_page
from fslora.report.plots import STYLE, draw_all, draw_bytes, draw_classes, draw_coverage, draw_loss
from fslora.report.records import read_run

EVIL = "<script>alert(1)</script>"
FULL = 512_000  # bytes that a full-rank client moves each way in a round
RATIOS = {"asyncio": 0.125, "email": 0.5}


def config(**changes):
    settings = {"preset": None, "model": "stories260K", "data": "plays.txt", "task": "causal-lm"}
    settings |= {"metric": "accuracy", "partition": "iid", "clients": 2, "per_round": 2, "rank": 16}
    settings |= {"target_modules": ["q_proj", "v_proj"], "ratios": [0.125, 0.5], "rounds": 3}
    settings |= {"local_steps": 7, "device": "cpu"}
    return settings | changes


def round_record(number, **changes):
    clients = [
        {"id": name, "ratio": ratio, "examples": 80, "loss": 3.0, "rejected": None}
        | {"bytes_up": int(FULL * ratio), "bytes_down": int(FULL * ratio) + 8}
        for name, ratio in RATIOS.items()
        if number > 0
    ]
    record = {
        "round": number,
        "train_loss": 3.9 - 0.2 * number if number else None,
        "eval_loss": 4.0 - 0.25 * number,
        "eval_metric": 0.5 + 0.1 * number,
        "eval_loss_sketched": 4.0 - 0.125 * number,
        "bytes_up": sum(client["bytes_up"] for client in clients),
        "bytes_down": sum(client["bytes_down"] for client in clients),
        "wall_seconds": 20.0,
        "coverage": [0.25 + 0.01 * rank for rank in range(16)] if number else [],
        "clients": clients,
    }
    return record | changes


CLASS_KEYS = ["ratio", "sketch_size", "clients", "participations", "bytes_up", "bytes_down"]
CLASS_KEYS += ["share_of_full_rank", "loss_before", "loss_after"]
SUMMARY = {
    "classes": [
        dict(zip(CLASS_KEYS, values, strict=True))
        for values in (
            (0.5, 8, 11, 3, 768_000, 768_024, 0.503, 4.111, 3.222),
            (0.125, 2, 13, 3, 192_000, 192_024, 0.127, 4.333, 3.444),
        )
    ],
    "eval_loss_before": 4.0,
    "eval_loss_after": 3.25,
    "eval_metric_before": 0.5,
    "eval_metric_after": 0.8,
    "bytes_up": 960_000,
    "bytes_down": 960_048,
    "full_rank_bytes_up": 6 * FULL,
    "full_rank_bytes_down": 6 * FULL,
}
SUMMARY |= {"modules": 28, "parameters": 147_456, "implementation": "torch"}
SUMMARY |= {"versions": {"torch": "2.13.0"}}


def write_run(folder, *, rounds=None, summary=SUMMARY, settings=None, tail=""):
    rounds = [round_record(number) for number in range(4)] if rounds is None else rounds
    (folder / "config.json").write_text(json.dumps(settings or config()))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rounds) + tail)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(HTMLParser):
    """What a reader of a page sees: its tables, its text, its pictures, its tags."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.text, self.pictures, self.tags = [], [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.pictures.append(dict(attrs)["src"])

    def handle_data(self, data):
        self.text.append(data)
        if self.tags and self.tags[-1][0] in ("td", "th") and data.strip():
            self.tables[-1][-1][-1] += data


def page_of(folder):
    return Page(render_page(read_run(folder), {}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("run"))
    assert write_report(folder) == folder / "report.html"
    return folder


def test_pictures_are_whole_not_blank_and_inside_the_page(finished):
    names = ["loss.png", "bytes.png", "classes.png", "coverage.png"]
    files = [(finished / name).read_bytes() for name in names]
    page = Page((finished / "report.html").read_text())
    assert [base64.b64decode(src.partition(";base64,")[2]) for src in page.pictures] == files
    for png in files:
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
        assert len(pixels) > 300_000
        ink = (pixels < 200).any(axis=1).mean()
        assert 0.005 < ink < 0.9
    assert sorted(path.name for path in finished.iterdir()) == sorted(
        [*names, "report.html", "config.json", "rounds.jsonl", "summary.json"]
    ), "no half-written file is left"


def test_class_table_holds_the_figures_of_the_summary(finished):
    page = Page((finished / "report.html").read_text())
    heads = ["sketch ratio", "ranks", "clients", "participations", "bytes up", "bytes down"]
    assert page.tables[0] == [
        [*heads, "share of full-rank bytes", "loss before", "loss after"],
        ["1/8", "2", "13", "3", "192.0 kB", "192.0 kB", "12.7%", "4.333", "3.444"],
        ["1/2", "8", "11", "3", "768.0 kB", "768.0 kB", "50.3%", "4.111", "3.222"],
    ]


def test_headline_settings_and_captions(finished):
    page = Page((finished / "report.html").read_text())
    for text in (
        "2 clients, 2 a round, trained one LoRA adapter of rank 16 for stories260K on plays.txt",
        "in 3 rounds of 7 local steps, each client a sketch of 1/8 or 1/2 of the ranks.",
        "evaluation loss, full rank 4.000 → 3.250 nats",
        "next-token accuracy 0.500 → 0.800",
        "share of full-rank bytes 31.3% 1.9 MB instead of 6.1 MB",
        "time 1 min 20 s on cpu",
        "evaluation loss fell from 4.000 to 3.250",
        "and its next-token accuracy rose from 0.500 to 0.800",
        "it moves, up and down together, 128.0 kB with ratio 1/8 to 512.0 kB with ratio 1/2.",
        "the rarest by 25.0% and the commonest by 40.0% of the clients' modules",
        'AutoPeftModelForCausalLM.from_pretrained("adapter")',
    ):
        assert text in page.text
    assert "Rejected" not in page.text
    assert page.text.startswith("FSLoRA: stories260K on plays.txt")
    settings = dict(page.tables[-1][1:])
    assert settings["target_modules"] == "q_proj, v_proj"
    assert settings["preset"] == "none"
    assert settings["adapter parameters"] == "147,456"
    assert settings["torch"] == "2.13.0"


def test_page_needs_nothing_from_outside(finished):
    html = (finished / "report.html").read_text()
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    assert all(src.startswith("data:image/png;base64,") for src in page.pictures)
    assert not re.search(r"https?:|url\(|@import|\son\w+=", html)
    metas = [attrs for tag, attrs in page.tags if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert any("default-src 'none'" in attrs.get("content", "") for attrs in metas)


def test_everything_from_files_is_escaped(tmp_path):
    record = round_record(1)
    record["clients"][0].update(id=EVIL, rejected=f'"{EVIL}', loss=math.nan)
    settings = dict.fromkeys(config(**{EVIL: 1}), f'"{EVIL}') | {"task": "classification"}
    summary = SUMMARY | {"implementation": EVIL, "versions": {EVIL: EVIL}}
    write_run(tmp_path, rounds=[round_record(0), record], settings=settings, summary=summary)
    html = write_report(tmp_path).read_text()
    assert EVIL not in html
    assert f'"{EVIL}' in Page(html).text, "the reader still sees the text itself"
    assert "script" not in {tag for tag, _ in Page(html).tags}


def test_rejected_updates_are_listed(tmp_path):
    record = round_record(1)
    record["clients"][1].update(rejected="the loss is NaN", loss=math.nan)
    page = page_of(write_run(tmp_path, rounds=[round_record(0), record]))
    assert "Rejected updates: 1" in page.text
    assert page.tables[1][1:] == [["1", "email", "1/2", "the loss is NaN"]]


def test_interrupted_run_is_reported_from_its_rounds(tmp_path):
    tail = json.dumps(round_record(3))[:-40]
    rounds = [round_record(number) for number in range(3)]
    page = Page(
        write_report(write_run(tmp_path, rounds=rounds, summary=None, tail=tail)).read_text()
    )
    assert "last line of rounds.jsonl is cut off" in page.text
    assert "2 of 3 rounds are recorded and there is no summary.json" in page.text
    assert "evaluation loss, full rank 4.000 → 3.500" in page.text
    assert "bytes moved 1.3 MB" in page.text
    assert "full-rank bytes" not in page.text, "only the summary knows them"
    assert page.tables[0] == [
        ["sketch ratio", "clients", "participations", "bytes up", "bytes down"],
        ["1/8", "1", "2", "128.0 kB", "128.0 kB"],
        ["1/2", "1", "2", "512.0 kB", "512.0 kB"],
    ]
    assert len(page.pictures) == 4


def test_line_separators_in_a_client_id_do_not_cut_the_record(tmp_path):
    record = round_record(1)
    record["clients"][0]["id"] = "a\u2028b"
    write_run(tmp_path)
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in (round_record(0), record))
    (tmp_path / "rounds.jsonl").write_text(text, encoding="utf-8")
    assert read_run(tmp_path).rounds == [round_record(0), record]


def test_a_round_recorded_twice_counts_once(tmp_path):
    again = round_record(2, eval_loss=1.5)
    rounds = [round_record(0), round_record(1), round_record(2), again]
    run = read_run(write_run(tmp_path, rounds=rounds, summary=None))
    assert run.rounds == [*rounds[:2], again]
    assert any("Round 2 is recorded twice" in note for note in run.notes)


def test_run_stopped_before_its_first_round(tmp_path):
    page = Page(
        write_report(write_run(tmp_path, rounds=[round_record(0)], summary=None)).read_text()
    )
    assert "0 of 3 rounds" in page.text
    assert len(page.pictures) == 1, "the loss before training, and nothing that was not measured"


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("rounds.jsonl", None, FileNotFoundError, "rounds.jsonl is missing.*--out"),
        ("config.json", None, FileNotFoundError, "config.json is missing.*--out"),
        ("rounds.jsonl", "", ValueError, "holds no whole round yet"),
        ("rounds.jsonl", '{"round": 0', ValueError, "holds no whole round yet"),
        ("rounds.jsonl", '{"rou\n{"round": 1}\n', ValueError, "line 1 of .*remove that line"),
        ("config.json", "{", ValueError, "config.json is not readable JSON"),
        ("summary.json", "[]", ValueError, "summary.json must hold one JSON object"),
    ],
)
def test_damaged_folders_are_named(tmp_path, name, content, error, message):
    write_run(tmp_path)
    path = tmp_path / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(error, match=message):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    write_run(tmp_path, rounds=[round_record(0)])
    (tmp_path / "report.html").write_text("old")

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        ValueError, match="No space left on device; what was there before is intact"
    ):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_report_is_replaced_whole(tmp_path):
    write_run(tmp_path, rounds=[round_record(0)])
    (tmp_path / "report.html").write_text("old")
    with (tmp_path / "report.html").open() as reader:
        report = write_report(tmp_path)
        assert reader.read() == "old", "who has the old page open never meets half of the new one"
    assert report.read_text().endswith("</html>\n")


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'fslora\[report\]'"):
        write_report(write_run(tmp_path))


def test_importing_the_report_is_cheap():
    code = (
        "import sys; from fslora.report import format_bytes;"
        "print(sorted({'matplotlib', 'torch', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_drawing_leaves_the_callers_matplotlib_alone(tmp_path):
    mpl = pytest.importorskip("matplotlib")
    with mpl.rc_context({"font.size": 23, "axes.facecolor": "black"}):
        before = dict(mpl.rcParams)
        first = draw_all(read_run(write_run(tmp_path)))
        assert dict(mpl.rcParams) == before
    assert draw_all(read_run(tmp_path)) == first, "the caller's style does not reach the pictures"


def test_lines_bars_and_map_show_the_recorded_figures(tmp_path):
    rounds = [round_record(number) for number in range(4)]
    rounds[2].update(eval_loss=None, eval_metric=None, eval_loss_sketched=math.nan)
    run = read_run(write_run(tmp_path, rounds=rounds))

    train, full, sketched = draw_loss(run).axes[0].lines
    assert list(train.get_xdata()) == [1, 2, 3]
    assert list(train.get_ydata()) == [record["train_loss"] for record in rounds[1:]]
    assert list(full.get_xdata()) == list(sketched.get_xdata()) == [0, 1, 3]
    assert list(full.get_ydata()) == [4.0, 3.75, 3.25]
    assert list(sketched.get_ydata()) == [4.0, 3.875, 3.625]
    assert list(draw_loss(run).axes[1].lines[0].get_ydata()) == pytest.approx([0.5, 0.6, 0.8])

    line, reference = draw_bytes(run).axes[0].lines
    a_round = 2 * FULL * 0.625 + 16
    assert list(line.get_xdata() * 1e6) == pytest.approx([0, a_round, 3 * a_round])
    assert reference.get_xdata()[0] * 1e6 == pytest.approx(12 * FULL)

    bars, losses = draw_classes(run).axes
    assert [bar.get_width() for bar in bars.patches] == [64.0, 64.008, 256.0, 256.008]
    assert [line.get_xdata()[0] for line in bars.lines] == [512.0, 512.0]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["1/8", "1/2"]
    assert [list(line.get_xdata()) for line in losses.lines] == [[4.333, 3.444], [4.111, 3.222]]

    image = draw_coverage(run).axes[0].images[0]
    assert np.array_equal(
        image.get_array(), np.array([record["coverage"] for record in rounds[1:]]).T
    )
    one = read_run(write_run(tmp_path, rounds=rounds[:2]))
    assert [bar.get_height() for bar in draw_coverage(one).axes[0].patches] == rounds[1]["coverage"]


@pytest.mark.parametrize("case", ["all ends equal", "loss rises", "one round", "full rank"])
def test_no_text_overlaps_or_is_cut(tmp_path, case):
    mpl = pytest.importorskip("matplotlib")
    rounds, summary = [round_record(number) for number in range(4)], dict(SUMMARY)
    if case == "all ends equal":
        rounds[-1].update(train_loss=3.5, eval_loss=3.5, eval_loss_sketched=3.5)
        summary["classes"] = [{**c, "loss_after": c["loss_before"]} for c in SUMMARY["classes"]]
    elif case == "loss rises":
        rounds = [round_record(n, eval_loss=3.0 + n, train_loss=3.0 + n) for n in range(4)]
    elif case == "one round":
        rounds = rounds[:2]
    else:
        summary |= {"full_rank_bytes_up": 960_000, "full_rank_bytes_down": 960_048}
    run = read_run(write_run(tmp_path, rounds=rounds, summary=summary))
    with mpl.rc_context(STYLE):
        figures = [draw(run) for draw in (draw_loss, draw_bytes, draw_classes, draw_coverage)]
        for figure in figures:
            figure.draw_without_rendering()
            labels = [
                text
                for axes in figure.axes
                for text in [*axes.texts, axes.title, axes._right_title]
                if text.get_text()
            ]
            boxes = [label.get_window_extent() for label in labels]
            for (a, box_a), (b, box_b) in itertools.combinations(
                zip(labels, boxes, strict=True), 2
            ):
                assert not box_a.overlaps(box_b), (a.get_text(), b.get_text())
            for label, box in zip(labels, boxes, strict=True):
                inside = figure.bbox.padded(1)
                assert inside.x0 <= box.x0 < box.x1 <= inside.x1, label.get_text()
                assert inside.y0 <= box.y0 < box.y1 <= inside.y1, label.get_text()
