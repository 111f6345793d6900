"""The results table: its protocol is valid, finished runs are kept whole, claims judged right."""

import json
from pathlib import Path

import pytest
import tomli_w
import torch
from rich.console import Console

from benchmarks import protocol, protocol_cache
from benchmarks.claims import _qualified, claims_table, verdict
from benchmarks.protocol_cache import collect, read, restore
from fslora.compare.command import compare
from fslora.compare.settings import CompareConfig
from fslora.config import SimulateConfig

QUIET = Console(quiet=True)


@pytest.fixture
def track(tmp_path):
    """A comparison of a few seconds with a search, on data that lies in a folder."""
    threads = torch.get_num_threads()
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.dumps({"text": f"the {word} is here, " * 12}) for word in "abcdefghij"]
    (data / "texts.jsonl").write_text("\n".join(rows))
    run = SimulateConfig(
        model="docs-base",
        data=str(data / "texts.jsonl"),
        layers=1,
        rank=4,
        clients=2,
        per_round=2,
        rounds=2,
        local_steps=1,
        batch_size=2,
        max_length=16,
        eval_examples=2,
        out=str(tmp_path / "out" / "toy"),
        targets="loss:1",
    )
    yield CompareConfig(run, strategies="fslora,hetlora", seeds="0", search="lr=1e-3,1e-2")
    torch.set_num_threads(threads)


def test_kept_runs_come_back_finished_and_say_the_same(track, tmp_path):
    folder, store, data = Path(track.run.out), tmp_path / "toy.jsonl", tmp_path / "data"
    found = compare(track, QUIET)
    (folder / "runs/fslora/seed-0/summary.json").unlink()  # as if it had not come to its end
    assert collect(folder, store, data) == 5
    compare(track, QUIET)
    assert collect(folder, store, data) == 6
    assert str(tmp_path) not in store.read_text()
    assert all(
        "clients" not in record for line in read(store).values() for record in line["rounds"]
    )
    folder.rename(tmp_path / "before")
    moved = tmp_path / "elsewhere"
    data.rename(moved)
    data.symlink_to(moved)  # the settings name the same place again
    assert restore(store, folder, data) == 6
    assert not list(folder.rglob("state.safetensors")), "nothing is trained again"
    again = compare(track, QUIET)
    assert not list(folder.rglob("state.safetensors"))
    assert again == found


def test_the_protocol_is_valid_and_keeps_its_limits(tmp_path):
    settings = protocol.read_protocol(protocol.PROTOCOL, tmp_path, 1)
    names = {"sst2", "cola", "mrpc"}
    assert {slug.rpartition("-")[0] for slug in settings} >= names
    assert {"shakespeare", "dolly"} <= settings.keys()
    for setting in settings.values():
        run = setting.config.run
        assert run.rounds * run.per_round * run.local_steps <= 1000
        assert len(setting.config.seed_values) == 3
        assert run.targets
        assert run.fleet is not None
    searches = {setting.config.search for setting in settings.values()}
    assert len(searches) == 1, "every strategy and setting has the same search"


@pytest.mark.parametrize(
    ("saved", "faster", "said"),
    [
        (0.57, 3.4, "more than it"),
        (0.57, 3.3, "yes"),
        (0.56, 3.4, "yes"),
        (0.32, 1.8, "yes"),
        (0.4, 1.0, "bytes only"),
        (0.1, 4.0, "time only"),
        (-1.0, 0.5, "no"),
    ],
)
def test_verdicts_on_the_claim(saved, faster, said):
    assert verdict(saved, faster) == said


def history(folder, values, step_bytes, step_seconds):
    """A run that evaluates each round; what it paid grows evenly."""
    folder.mkdir(parents=True)
    lines = []
    for number, value in enumerate(values):
        paid = step_bytes if number else 0
        record = {"round": number, "eval_metric": value, "sim_seconds_total": number * step_seconds}
        record |= {
            f"{part}bytes_{way}": paid
            for part in ("", "adapter_", "head_")
            for way in ("up", "down")
        }
        lines.append(json.dumps(record))
    (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_claims_hold_both_to_the_rivals_own_score(tmp_path):
    made = {
        "fslora": history(tmp_path / "a", [0.5, 0.7, 0.8], 10, 1),
        "fslora:server_lr=2": history(tmp_path / "b", [0.5, 0.6, 0.6], 10, 1),
        "hetlora": history(tmp_path / "c", [0.5, 0.6, 0.7], 20, 4),
        "fedit": history(tmp_path / "d", [0.5, 0.6, 0.9], 1, 1),
    }
    strategies = [
        {"label": label, "runs": [{"seed": 0, "folder": folder, "failed": None}]}
        for label, folder in made.items()
    ]
    data = {"name": "toy", "figure": "metric", "metric_name": "mcc", "strategies": strategies}
    wanted = [
        # One round of ten each way against two of twenty, one second against eight.
        ["hetlora", "fslora", "1 of 1", "75% ", "8.00 ", "more than it"],
        ["hetlora", "fslora:server_lr=2", "0 of 1", "–", "–", "no: not reached"],
    ]
    assert claims_table(data).rows == wanted
    # Of ten, six and then seven of the larger class: the rival's 0.7 is above the one alone.
    labels = tmp_path / "labels.csv"
    data |= {"metric_name": "accuracy"}
    data["settings"] = {"eval_data": str(labels), "label_column": "label", "reader": "auto"}
    data["settings"]["header"] = True
    labels.write_text("text,label\n" + "a,1\n" * 6 + "a,0\n" * 4)
    assert claims_table(data).rows == wanted
    labels.write_text("text,label\n" + "a,1\n" * 7 + "a,0\n" * 3)
    assert claims_table(data).rows[0][-1] == "no: the rival only guesses"


def test_a_claim_over_seeds_has_intervals_and_leaves_failed_runs_out(tmp_path):
    ours = [history(tmp_path / f"a{seed}", [0.5, 0.7], 10, 1) for seed in range(2)]
    rival = [
        history(tmp_path / f"c{seed}", [0.5, 0.6, 0.7], 20 * (seed + 1), 4 / (seed + 1))
        for seed in range(2)
    ]
    strategies = [
        {
            "label": label,
            "runs": [
                *({"seed": s, "folder": f, "failed": None} for s, f in enumerate(folders)),
                {"seed": 2, "folder": str(tmp_path / "nothing"), "failed": "it was lost"},
            ],
        }
        for label, folders in {"fslora": ours, "fslora:server_lr=9": [], "hetlora": rival}.items()
    ]
    data = {"name": "toy", "figure": "metric", "metric_name": "mcc", "strategies": strategies}
    # 20 bytes against 80 and 160, a second against 8 and 4: √(1/32) each; its interval is e^±4.40.
    some, none = claims_table(data).rows
    assert some[2:] == ["2 of 2", "82% [-1345%, 100%]", "5.66 [0.07, 462.43]", "more than it"]
    assert none[2:] == ["0 of 0", "–", "–", "no: not reached"]
    third = history(tmp_path / "c2", [0.5, 0.6, 0.7], 20, 4)
    strategies[-1]["runs"][2] |= {"folder": third, "failed": None}
    lost = claims_table(data).rows[0]  # where we failed and the rival did not, we did not reach it
    assert lost[2:] == ["2 of 3", "–", "–", "no: not reached"]


def test_a_claim_against_a_rival_that_guesses_in_some_seeds_says_so():
    assert _qualified("yes", 0, 3) == "yes"
    assert _qualified("yes", 1, 3) == "yes, but the rival only guesses in 1 of 3 seeds"
    assert _qualified("yes", 3, 3) == "no: the rival only guesses"
    assert _qualified("no", 3, 3) == "no"


def test_a_restoration_that_was_cut_off_is_made_again(tmp_path, monkeypatch):
    store, folder = tmp_path / "toy.jsonl", tmp_path / "out"
    line = {"place": "runs/a", "settings": {}, "split": {}, "rounds": [{"round": 0}, {"round": 1}]}
    line["settings"] = dict.fromkeys(("model", "data", "eval_data"), "$DATA/x")
    store.write_text(json.dumps(line) + "\n")
    right = protocol_cache.disk.write_json
    for failing in ("summary.json", "config.json"):

        def cut(path, value, failing=failing):
            if path.name == failing:
                raise OSError("no space left")
            right(path, value)

        monkeypatch.setattr(protocol_cache.disk, "write_json", cut)
        with pytest.raises(OSError, match="no space"):
            restore(store, folder, tmp_path)
    monkeypatch.setattr(protocol_cache.disk, "write_json", right)
    assert restore(store, folder, tmp_path) == 1
    lines = (folder / "runs/a/rounds.jsonl").read_text().splitlines()
    records = [json.loads(text) for text in lines]
    assert [record["round"] for record in records] == [0, 1]
    assert json.loads((folder / "runs/a/config.json").read_text())["model"] == f"{tmp_path}/x"


def test_another_protocol_does_not_write_over_the_tables_page(tmp_path, capsys):
    other = tmp_path / "other.toml"
    other.write_text(protocol.PROTOCOL.read_text(encoding="utf-8"), encoding="utf-8")
    assert protocol.document_of(protocol.PROTOCOL) == "docs/results.md"
    with pytest.raises(ValueError, match="names no page for its tables"):
        protocol.main(["--protocol", str(other), "--collect"])
    with pytest.raises(SystemExit):
        protocol.main(["--protocol", str(tmp_path / "none.toml")])
    assert "there is no file" in capsys.readouterr().err


def test_a_page_that_is_not_there_is_made_and_its_words_are_kept(track, tmp_path):
    compare(track, QUIET)
    page, out = tmp_path / "docs" / "page.md", Path(track.run.out).parent
    settings = {"toy": protocol.Setting("toy", track)}
    protocol.write_results(settings, out, page, QUIET)
    page.write_text("# Words\n\n" + page.read_text())
    protocol.write_results(settings, out, page, QUIET)
    assert page.read_text().startswith(f"# Words\n\n{protocol.MARK}\n\n## ")
    assert page.read_text().count("## All methods") == 1


def test_the_page_has_every_setting_that_is_kept_whatever_was_asked_for(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"text": f"the {word} is here, " * 12}) for word in "abcdefghij"]
    (tmp_path / "data/texts.jsonl").write_text("\n".join(rows))
    run = {"model": "docs-base", "data": "texts.jsonl", "layers": 1, "rank": 4, "clients": 2}
    run |= {"per_round": 2, "rounds": 1, "local_steps": 1, "batch_size": 2, "max_length": 16}
    run |= {"eval_examples": 2, "device": "cpu", "targets": "loss:1"}
    page = tmp_path / "docs/toy.md"
    settings = [{"slug": slug, "run": {}, "compare": {"name": f"toy {slug}"}} for slug in "ab"]
    shared = {"seeds": [0], "strategies": ["fslora"]}
    toml = {"document": "docs/toy.md", "run": run, "compare": shared, "setting": settings}
    (tmp_path / "toy.toml").write_text(tomli_w.dumps(toml))
    monkeypatch.setattr(protocol, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(protocol, "shared_data", lambda: tmp_path / "data")
    monkeypatch.setattr(protocol, "_PATHS", ("data",))
    threads = torch.get_num_threads()

    def titles(out, *flags):
        flags = ["--protocol", str(tmp_path / "toy.toml"), "--jobs", "1", *flags]
        assert protocol.main([*flags, "--out", str(tmp_path / out)]) == 0
        text = page.read_text()
        return [name for name in ("toy a", "toy b") if f"## {name}\n" in text], text

    try:
        first, text = titles("one", "--only", "a")
        assert first == ["toy a"]
        assert "Not finished yet: b." in text
        both, text = titles("two", "--only", "b")
        assert both == ["toy a", "toy b"]
        assert "Not finished" not in text
        assert not list((tmp_path / "two/a").rglob("state.safetensors")), "nothing is trained again"
        page.unlink()
        (tmp_path / "benchmarks/results/toy/a.jsonl").unlink()
        assert titles("one", "--only", "a", "--collect") == (both, text), "kept again, not run"
        assert titles("three", "--collect") == (both, text)
        spent = (tmp_path / "benchmarks/results/toy/spent.jsonl").read_text().splitlines()
        noted = [json.loads(line) for line in spent]
        assert [(line["setting"], line["runs"]) for line in noted] == [("a", 1), ("b", 1)]
        assert all(0 < line["cpu_seconds"] < 600 for line in noted)
        settings[1]["compare"]["seeds"] = [0, 1]
        (tmp_path / "toy.toml").write_text(tomli_w.dumps(toml))
        assert titles("one", "--collect")[0] == ["toy a"], "b's table was of fewer seeds"
    finally:
        torch.set_num_threads(threads)
