"""Comparisons: fair, resumable, searched without test rows, and summed up by the seed."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from rich.console import Console

from fslora import checkpoint, disk
from fslora.__main__ import main
from fslora.compare import runs as compare_runs
from fslora.compare.command import compare, join
from fslora.compare.settings import CompareConfig, read_comparison, read_entry
from fslora.compare.table import check_splits
from fslora.data.federated import fingerprints
from fslora.errors import StoppedRunError, is_for_the_user
from fslora.prepare import prepare
from fslora.server import NoUsableUpdateError
from fslora.simulate import Watcher, simulate
from tests.federated.folders import tree

QUIET = Console(quiet=True)


def test_runs_are_those_of_simulate_on_equal_splits_and_are_not_run_again(track, tmp_path):
    found = compare(track, QUIET)["datasets"][0]
    alone = replace(track.run, strategy="fedit", seed=1, threads=1, out=str(tmp_path / "alone"))
    summary = simulate(alone)
    fedit = found["strategies"][1]
    assert fedit["label"] == "fedit"
    assert fedit["runs"][1]["loss"] == summary["eval_loss_after"]
    assert fedit["runs"][1]["bytes_up"] == summary["bytes_up"]
    assert fedit["targets"][0]["seeds"][1]["bytes_up"] == summary["targets"][0]["bytes_up"]
    assert found["splits"]["1"] == summary["split"] == fingerprints(prepare(alone).data)
    assert found["splits"]["0"] != found["splits"]["1"], "each seed has a split of its own"
    losses = [run["loss"] for run in fedit["runs"]]
    assert fedit["final"]["loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert found["strategies"][0]["targets"][1]["reached"] == 0
    before = tree(track.run.out)
    assert compare(track, QUIET)["datasets"][0] == found
    assert tree(track.run.out) == before, "nothing was written again"


def test_options_of_one_strategy_may_be_lists_and_need_whole_cohorts(track):
    label = "fslora:averaging=count,sampler=balanced,ratios=1/8,1/4,1/2"
    asked = replace(track, strategies=f"fedit,{label}", seeds="0")
    assert [entry.label for entry in asked.entries] == ["fedit", label]
    with pytest.warns(UserWarning, match="moves a rank"):
        found = compare(asked, QUIET)["datasets"][0]
    folder = Path(found["strategies"][1]["runs"][0]["folder"])
    assert json.loads((folder / "config.json").read_text())["ratios"] == [0.125, 0.25, 0.5]


def test_an_interrupted_comparison_goes_on_where_it_was(track, monkeypatch):
    ran = []

    def stopped(config, watcher):
        ran.append(config.out)
        stop = watcher.on_round

        def interrupt(record):
            stop(record)
            if len(ran) == 2:
                raise KeyboardInterrupt

        return simulate(config, replace(watcher, on_round=interrupt))

    monkeypatch.setattr(compare_runs, "simulate", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(track, QUIET)
    first = {path: kept for path, kept in tree(track.run.out).items() if "fslora" in str(path)}
    seen = []

    def counted(config, watcher):
        def count(record):
            watcher.on_round(record)
            seen.append((Path(config.out).parent.name, config.seed, record.round))

        return simulate(config, Watcher(on_round=count))

    monkeypatch.setattr(compare_runs, "simulate", counted)
    compare(track, QUIET)
    assert seen[0] == ("fslora", 1, 2), "one round of it had been done"
    assert ("fslora", 0, 1) not in seen
    after = tree(track.run.out)
    kept = [path for path in first if "seed-0" in str(path)]
    assert kept
    assert all(after[path] == first[path] for path in kept)


def test_other_settings_in_the_same_folder_are_refused(track):
    first = replace(track, strategies="fslora", seeds="0")
    compare(first, QUIET)
    with pytest.raises(ValueError, match=r"--lr 0.5 \(was 0.01\)"):
        compare(replace(first, run=replace(first.run, lr=0.5)), QUIET)
    with pytest.raises(ValueError, match="has 2 rounds, and 1 are asked for"):
        compare(replace(first, run=replace(first.run, rounds=1)), QUIET)
    with pytest.raises(ValueError, match="holds a run of its own"):
        CompareConfig(replace(first.run, out=str(Path(first.run.out) / "runs/fslora/seed-0")))


def test_a_comparison_goes_on_with_files_that_were_moved_and_with_no_others(track, tmp_path):
    first = replace(track, strategies="fslora", seeds="0")
    found = compare(first, QUIET)["datasets"][0]["strategies"]
    data = shutil.copy(first.run.data, tmp_path / "moved.jsonl")
    moved = replace(first, run=replace(first.run, data=str(data)))
    for _ in range(2):
        assert compare(moved, QUIET)["datasets"][0]["strategies"] == found
    Path(data).write_text(Path(data).read_text().replace("author 2", "Ann"))
    other = Path(data).rename(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="was started with other files"):
        compare(replace(first, run=replace(first.run, data=str(other))), QUIET)


def test_another_process_tells_the_user_as_this_one_does(track, monkeypatch):
    monkeypatch.setattr(compare_runs, "ProcessPoolExecutor", one_worker)
    hopeless = replace(track, jobs=2, run=replace(track.run, text_column="nothing"))
    with pytest.raises(ValueError, match="nothing") as caught:
        compare(hopeless, QUIET)
    assert is_for_the_user(caught.value)


def test_a_process_that_the_system_ends_is_one_clear_message(track, monkeypatch):
    def killed(_):
        raise BrokenProcessPool  # as the pool does for every run when one of its processes is gone

    monkeypatch.setattr(compare_runs, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(compare_runs, "_train_apart", killed)
    with pytest.raises(StoppedRunError, match="fewer --jobs") as caught:
        compare(replace(track, jobs=2), QUIET)
    assert is_for_the_user(caught.value)


def test_another_process_changes_no_bit(track, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(compare_runs, "ProcessPoolExecutor", one_worker)  # starting two is slow
    track = replace(track, strategies="fedit", run=replace(track.run, rounds=1))
    one = compare(track, QUIET)["datasets"][0]
    other = replace(track, jobs=2, run=replace(track.run, out=track.run.out + "-two"))
    two = compare(other, QUIET)["datasets"][0]
    assert one["splits"] == two["splits"]
    for run, again in zip(one["strategies"][0]["runs"], two["strategies"][0]["runs"], strict=True):
        assert (run["loss"], run["bytes"]) == (again["loss"], again["bytes"])


def one_worker(_, **options):
    return ProcessPoolExecutor(1, **options)


@pytest.mark.parametrize(
    ("clients", "model", "message"),
    [
        ("b", "m", "same seed but not the same data"),
        ("a", "n", "not made of the same --model"),
        ("a", "m", ""),
        ("a", None, ""),  # of before it was recorded
    ],
)
def test_different_data_under_one_seed_or_another_model_is_refused(track, clients, model, message):
    paths = {}
    for name, own, source in (("one", "a", {"model": "m"}), ("two", clients, {"model": model})):
        folder = Path(track.run.out) / name
        disk.write_json(folder / "summary.json", {"split": {"clients": own, "evaluation": "c"}})
        first = {"round": 0, "source": source if model else None}
        (folder / "rounds.jsonl").write_text(json.dumps(first) + "\n")
        paths[name, 0] = replace(track.run, out=str(folder))
    if message:
        with pytest.raises(ValueError, match=message):
            check_splits(paths)
    else:
        assert check_splits(paths) == {"0": {"clients": "a", "evaluation": "c"}}


def test_a_hopeless_run_is_reported_and_the_others_are_compared(track, monkeypatch):
    def hopeless(config, watcher):
        if config.strategy == "fedit" and config.seed == 1:
            raise NoUsableUpdateError("round 1: no client's update could be used")
        return simulate(config, watcher)

    monkeypatch.setattr(compare_runs, "simulate", hopeless)
    found = compare(track, QUIET)["datasets"][0]
    fedit = found["strategies"][1]
    assert fedit["runs"][1]["failed"].startswith("round 1")
    assert fedit["final"]["loss"]["count"] == 1
    assert found["pairs"][0]["winner"] is None


def test_bad_settings_are_one_clear_message(track, tmp_path):
    def asked(**changes):
        return replace(track, **changes)

    for changes, message in (
        ({"strategies": "fslora,fedlora"}, "strategy cannot be 'fedlora'; it takes fslora"),
        ({"strategies": "fslora,fslora"}, "each strategy once"),
        ({"strategies": "fslora:lr=fast"}, "lr cannot be 'fast'"),
        ({"strategies": "fslora:speed=2"}, "unknown setting 'speed'"),
        ({"strategies": "fslora:clients=2"}, "clients must be the same for all"),
        ({"strategies": "fslora:lr=1", "search": "lr=1,2"}, "which --search tries"),
        ({"search": "rounds=1,2"}, "rounds must be the same for all"),
        ({"seeds": "0,0"}, "different numbers"),
        ({"seeds": "one"}, "not a list"),
        ({"jobs": 0}, "--jobs"),
        ({"search": "lr=1e-3,0.001"}, "a value of lr twice"),
        ({"search": "lr=1e-3;lr=1e-2"}, "--search names lr twice"),
        ({"strategies": "fslora:lr=1e-3,lr=1e-2"}, "lr is there twice"),
        ({"run": replace(track.run, seed=7)}, "name --strategies and --seeds"),
        ({"run": replace(track.run, strategy="hetlora")}, "name --strategies and --seeds"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            asked(**changes)
    with pytest.raises(ValueError, match="server-lr 1"):
        compare(asked(strategies="fslora,flora:server_lr=2"), QUIET)
    assert not (Path(track.run.out) / "runs").exists(), "refused before the first run"
    with pytest.raises(ValueError, match="no finished comparison"):
        join([tmp_path], tmp_path / "joined")
    with pytest.raises(ValueError, match="one of those that are joined"):
        join([tmp_path], tmp_path / "." / "x" / "..")


def test_tensorboard_is_missed_before_the_first_run(track, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        compare(replace(track, tensorboard="curves"), QUIET)
    assert not Path(track.run.out).exists()


class Writer:
    """Keeps what TensorBoard's own writer would write."""

    points: ClassVar[list] = []

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "events.out.tfevents.0").touch(exist_ok=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_scalar(self, tag, value, step):
        self.points.append((self.folder.parts[-2:], tag, step, value))


def test_tensorboard_gets_every_round_once(track, monkeypatch, tmp_path):
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    monkeypatch.setattr(Writer, "points", [])
    track = replace(track, strategies="fedit", seeds="1", tensorboard=str(tmp_path / "board"))
    for rounds in (track.run.rounds, track.run.rounds + 1):  # made, and extended
        Writer.points.clear()
        compare(replace(track, run=replace(track.run, rounds=rounds)), QUIET)
    records = checkpoint.read_records(Path(track.run.out) / "runs/fedit/seed-1")
    wanted = [(("fedit", "seed-1"), "evaluation/loss", r["round"], r["eval_loss"]) for r in records]
    assert [point for point in Writer.points if point[1] == "evaluation/loss"] == wanted


def test_options_and_files(track, tmp_path):
    entry = read_entry("fslora:server-lr=2,rslora=true,server_opt=fedadam")
    assert entry.options == {"server_lr": 2.0, "rslora": True, "server_opt": "fedadam"}
    several = replace(track, strategies="fedit, fslora:server_lr=2,lr=3e-3,hetlora").entries
    assert [each.label for each in several] == ["fedit", "fslora:server_lr=2,lr=3e-3", "hetlora"]
    path = tmp_path / "protocol.toml"
    path.write_text(
        'model = "m"\ndata = "d.jsonl"\n[compare]\nstrategies = ["fslora", "flora"]\n'
        "seeds = [3, 4]\nsearch-rounds = 2\n"
    )
    own = {"strategies": "fslora,flora", "seeds": "3,4", "search_rounds": 2}
    assert read_comparison(path) == {"model": "m", "data": "d.jsonl", **own}
    path.write_text('model = "m"\ndata = "d"\n[compare]\nseed = [1]\n')
    with pytest.raises(ValueError, match="has no 'seed'"):
        read_comparison(path)
    path.write_text('model = "m"\ndata = "d"\ncompare = "fedit,fslora"\n')
    with pytest.raises(ValueError, match=r"\[compare\] is a table of settings, not 'fedit,fslora'"):
        read_comparison(path)


def test_the_command_line_leaves_tables_and_a_page_and_joins_data_sets(track, capsys):
    values = {**track.run.to_json(), "name": "first"}
    folder = Path(track.run.out)
    path = folder.with_name("track.json")
    base = {k: v for k, v in values.items() if k not in ("out", "resume", "strategy", "name")}
    own = {"strategies": ["fslora", "fedit"], "seeds": [0, 1], "name": "first"}
    path.write_text(json.dumps({**base, "out": str(folder), "rounds": 1, "compare": own}))
    assert main(["compare", "--config", str(path)]) == 0
    assert {"compare.json", "compare.md", "report.html", "rounds.png", "bytes.png"} <= {
        entry.name for entry in folder.iterdir()
    }
    data = json.loads((folder / "compare.json").read_text())["datasets"][0]
    other = folder.with_name("other")
    disk.write_json(other / "compare.json", {"datasets": [{**data, "name": "2 [/b]"}]})
    joined = folder.with_name("joined")
    assert "After the last round" in capsys.readouterr().out
    assert main(["compare", "--join", f"{folder},{other}", "--out", str(joined)]) == 0
    printed = capsys.readouterr().out
    assert "All methods" in printed
    assert "2 [/b]" in printed
    text = (joined / "compare.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("|fedit|"))
    mean = data["strategies"][1]["final"]["loss"]["mean"]
    assert line.split("|")[-2] == f"{mean:.3f}", "the average over two equal data sets"
    assert main(["compare", "--join", f"{folder},{folder}", "--out", str(joined)]) == 2
    assert "--name of its own" in capsys.readouterr().err
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == page


def test_help_teaches_and_imports_nothing_heavy():
    code = (
        "import sys; from fslora.__main__ import main\n"
        "try: main(['compare', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'triton'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    for flag in (
        "--strategies",
        "--seeds",
        "--search",
        "--search-rounds",
        "--jobs",
        "--tensorboard",
    ):
        assert flag in text
    assert "--join" in text
    assert "--local-steps" in text, "the settings of simulate"


def test_flags_alone_are_enough(track, capsys):
    run = track.run
    names = ("model", "data", "clients", "per_round", "rounds", "local_steps", "rank", "max_length")
    flags = [f"--{name.replace('_', '-')}={getattr(run, name)}" for name in names]
    flags += ["--strategies=zero-shot", "--seeds=0", f"--out={run.out}", "--partition=iid"]
    assert main(["compare", *flags]) == 0
    assert "report:" in capsys.readouterr().out
    flags = [
        flag.replace("zero-shot", "fedit").replace(run.out, f"{run.out}/lost") for flag in flags
    ]
    assert main(["compare", *flags, "--max-norm=1e-12"]) == 2, "every run of it failed"
    said = capsys.readouterr()
    assert "report:" in said.out, "what there is of them is written"
    assert "no run came to its end" in said.err
