"""Tables of measured tiles: what is kept is what launches use, and nothing wrong is kept."""

import json
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fslora_kernels import tuning
from fslora_kernels._dispatch import interpreting
from fslora_kernels.ops.sketched_linear import backend_triton, configurations
from fslora_kernels.ops.sketched_linear.configurations import TILES, Tiles
from fslora_kernels.ops.sketched_linear.op import PADDED_RANKS
from fslora_kernels.tuning import Measured

SHAPE = (40, 32, 48)
ROWS = [
    Measured("apply", "half", 16, Tiles(32, 128, warps=4, stages=4), 0.8, 6),
    Measured("wgrad", "half", 64, Tiles(64, 64, stages=4, features_first=True), 1.0, 6),
]


OWN_FOLDER = tuning.own_folder


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Neither the user's own tables nor the shipped ones take part."""
    monkeypatch.setattr(tuning, "own_folder", lambda: tmp_path / "own")
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    tuning.measured_tiles.cache_clear()
    yield tmp_path
    tuning.measured_tiles.cache_clear()


def test_the_users_table_comes_before_the_shipped_one_and_both_before_none(folders):
    assert tuning.measured_tiles("NVIDIA H200") == {}
    tuning.save(folders / "shipped/nvidia-h200.json", "NVIDIA H200", "sm_90", ROWS)
    found = tuning.measured_tiles("NVIDIA H200")
    assert found == {(row.kernel, row.arithmetic, row.ranks): row.tiles for row in ROWS}
    tuning.save(folders / "own/nvidia-h200.json", "NVIDIA H200", "sm_90", ROWS[:1])
    assert tuning.measured_tiles("NVIDIA H200").keys() == {("apply", "half", 16)}
    assert tuning.measured_tiles("NVIDIA L4") == {}


def test_a_home_that_is_missing_or_closed_is_one_without_a_table(folders, monkeypatch):
    tuning.save(folders / "shipped/nvidia-h200.json", "NVIDIA H200", "sm_90", ROWS)
    shipped = folders / "shipped/nvidia-h200.json"
    is_file = Path.is_file

    def closed(path):
        if folders / "own" in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", closed)
    assert tuning.table_path("NVIDIA H200") == shipped

    def missing():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", missing)
    monkeypatch.setattr(tuning, "own_folder", OWN_FOLDER)
    assert tuning.table_path("NVIDIA H200") == shipped
    with pytest.raises(ValueError, match="set HOME, or say --out FILE"):
        tuning.own_folder()


def test_a_table_that_cannot_be_written_is_told_with_the_remedy(folders):
    (folders / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written: .*; say where with --out FILE"):
        tuning.save(folders / "file/nvidia-h200.json", "NVIDIA H200", "sm_90", ROWS)


def test_the_doctor_says_where_tiles_come_from(folders):
    from fslora.doctor import tiles

    assert "`fslora tune` measures better ones" in tiles("NVIDIA H200")
    tuning.save(folders / "own/nvidia-h200.json", "NVIDIA H200", "sm_90", ROWS)
    assert tiles("NVIDIA H200").endswith("own/nvidia-h200.json")


def test_shipped_tables_are_among_what_is_compiled_ahead_of_time(folders):
    tuning.save(folders / "shipped/nvidia-h200.json", "NVIDIA H200", "sm_90", ROWS)
    before = {target: list(configurations.variants(target)) for target in ("sm_80", "sm_90")}
    (folders / "shipped/nvidia-h200.json").unlink()
    assert len(before["sm_80"]) == len(list(configurations.variants("sm_80")))
    added = [v for v in before["sm_90"] if v not in list(configurations.variants("sm_90"))]
    assert {(v.kernel, v.constants["P"], v.constants["T"]) for v in added} == {
        ("apply", 16, 32),
        ("wgrad", 64, 64),
    }


@pytest.mark.parametrize("kernel", ["apply", "wgrad"])
def test_no_table_replaces_the_tiles_that_drop_features_of_x(folders, monkeypatch, kernel):
    monkeypatch.setattr(backend_triton._launch, "target_of", lambda device: ("sm_90", 132))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    wide = Tiles(128, 128, warps=8, features_first=True)
    rows = [Measured(kernel, "half", ranks, wide, 0.8, 6) for ranks in PADDED_RANKS]
    tuning.save(folders / "shipped/nvidia-h200.json", "NVIDIA H200", "sm_90", rows)
    compiled = list(configurations.variants("sm_90"))
    device = torch.device("cuda")
    for ranks in (16, 32, 64):
        assert backend_triton.tiles_for(kernel, device, "half", ranks) == wide
        chosen = backend_triton.tiles_for(kernel, device, "half", ranks, "x")
        assert chosen == configurations.DROPPING[kernel, "sm_90", "half", "x"][ranks]
        assert backend_triton.tiles_for(kernel, device, "half", ranks, "x", wide) == chosen
        assert backend_triton.tiles_for(kernel, device, "half", ranks, "", ROWS[0].tiles) != wide
        cut = {
            (v.constants["T"], v.constants["F"], v.warps, v.stages)
            for v in compiled
            if (v.kernel, v.constants.get("P")) == (kernel, ranks) and v.constants["DROP_X"]
        }
        assert cut == {(chosen.tokens, chosen.features, chosen.warps, chosen.stages)}


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"tiles": [{"kernel": "apply"}]}', b"\xff".decode("latin-1")],
    ids=["empty", "no tiles", "half an entry", "noise"],
)
def test_a_broken_table_is_named_with_the_remedy(folders, text):
    path = folders / "own/nvidia-h200.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"nvidia-h200.json is not a table .* `fslora tune`"):
        tuning.measured_tiles("NVIDIA H200")


def test_sizes_that_no_kernel_takes_are_refused(folders):
    path = folders / "table.json"
    tuning.save(path, "NVIDIA H200", "sm_90", ROWS)
    table = json.loads(path.read_text())
    table["tiles"][0]["tiles"]["tokens"] = 48
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="no power of 2"):
        tuning.load(path)


def test_a_candidate_may_split_a_float32_sum_of_half_products_otherwise():
    tiles, want = Tiles(64, 64), torch.ones(8)

    def computes(found, dtype):
        return tuning._computes([lambda _: found], tiles, [want], dtype)

    assert computes(want * (1 + 1e-5), torch.bfloat16)
    assert not computes(want * (1 + 1e-5), torch.float32)
    assert not computes(want * 1.01, torch.bfloat16)
    assert not computes(want * float("nan"), torch.bfloat16)


def test_a_fault_that_shows_only_in_the_comparison_costs_one_candidate():
    class Faulty:
        dtype = torch.float32

        def float(self):
            raise RuntimeError("CUDA error: misaligned address")

    assert not tuning._computes([lambda _: Faulty()], Tiles(64, 64), [torch.ones(8)], torch.float16)


@pytest.fixture
def command(monkeypatch):
    """The command, where torch seems to see two GPUs."""
    from fslora import tune

    monkeypatch.setattr(tune, "unavailable", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr("fslora_kernels._launch.target_of", lambda _: ("sm_90", 132))
    return tune


def test_the_command_keeps_what_it_has_found_when_it_is_interrupted(folders, monkeypatch, command):
    def rows(*_, **__):
        yield ROWS[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(command.tuning, "tune", rows)
    with pytest.raises(KeyboardInterrupt):
        command.tune("cuda", folders / "table.json", Console(quiet=True))
    assert tuning.load(folders / "table.json") == {("apply", "half", 16): ROWS[0].tiles}


def test_the_command_times_on_the_device_that_is_asked_for(folders, monkeypatch, command):
    """Else another device's stream is timed, on which nothing runs."""
    current = [torch.device("cuda:0")]

    @contextmanager
    def device(asked):
        current.append(asked)
        yield
        current.pop()

    def rows(asked, **_):
        assert current[-1] == asked == torch.device("cuda:1")
        yield ROWS[0]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(command.tuning, "tune", rows)
    command.tune("cuda:1", folders / "table.json", Console(quiet=True))
    assert len(current) == 1
    with pytest.raises(ValueError, match="no device 'cuda:2': torch sees 2"):
        command.tune("cuda:2", folders / "table.json", Console(quiet=True))


def test_a_device_that_the_kernels_refuse_is_not_tuned(monkeypatch):
    monkeypatch.setattr("fslora_kernels._launch.target_of", lambda _: ("sm_70", 80))
    with pytest.raises(NotImplementedError, match="no tiles were chosen for sm_70"):
        next(tuning.tune(torch.device("cuda"), measure=lambda _: 1.0))


def test_a_table_is_saved_where_triton_is_distributed_under_another_name(folders, monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    tuning.save(folders / "table.json", "AMD Instinct MI300X", "gfx942", ROWS)
    saved = json.loads((folders / "table.json").read_text())
    assert saved["versions"].keys() == {"torch", "triton"}


def test_nothing_is_tuned_without_a_gpu(capsys, monkeypatch):
    from fslora.__main__ import main

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["tune", "--device", "cpu"]) == 2
    assert "the machine with the GPU" in capsys.readouterr().err


# -- in the interpreter ----------------------------------------------------------------------------

interpreted = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1"),
]


def tuned(times, dtype=torch.float32):
    """Tune on a tiny shape, each measurement taking the next of the given times."""
    clock = iter(times * len(PADDED_RANKS) * 2)

    def measure(function):
        function()
        return next(clock)

    cpu = torch.device("cpu")
    return list(tuning.tune(cpu, measure=measure, shapes=(SHAPE,), dtype=dtype))


@pytest.mark.usefixtures("folders")
class TestTune:
    pytestmark = interpreted

    def test_the_fastest_is_kept_and_no_gain_keeps_the_default(self):
        rows = tuned([10.0, 9.0, 8.0, 12.0, 7.0, 9.0])
        assert [(row.kernel, row.ranks) for row in rows] == [
            (kernel, ranks) for kernel in ("apply", "wgrad") for ranks in PADDED_RANKS
        ]
        for row in rows:
            assert row.tiles == tuning.CANDIDATES[row.kernel][3]
            assert (row.over_default, row.tried) == (pytest.approx(0.7), 6)
        for row in tuned([10.0] + [9.9] * 5):
            assert row.tiles == TILES[row.kernel, "interpreter", "ieee"][row.ranks]
            assert row.over_default == 1.0

    def test_a_candidate_that_fails_or_computes_something_else_is_left_out(self, monkeypatch):
        right = backend_triton.apply
        broken, wrong = tuning.CANDIDATES["apply"][:2]

        def apply(*args, tiles=None, **kwargs):
            if tiles == broken:
                raise RuntimeError("out of shared memory")
            h, y = right(*args, tiles=tiles, **kwargs)
            return h, (y * 1.01 if tiles == wrong else y)

        monkeypatch.setattr(backend_triton, "apply", apply)
        monkeypatch.setitem(tuning.CANDIDATES, "apply", (broken, wrong))
        monkeypatch.setitem(tuning.CANDIDATES, "wgrad", ())
        for row in tuned([5.0]):
            assert row.tried == 1
            assert row.tiles == TILES[row.kernel, "interpreter", "ieee"][row.ranks]

    @pytest.mark.parametrize("layout", ["B column-major", "factors", "forward mask", "dx mask"])
    def test_a_candidate_that_fails_in_a_layers_layout_alone_is_left_out(self, monkeypatch, layout):
        from fslora_kernels.ops.sketched_linear import backend_triton

        right = backend_triton.apply
        candidate = tuning.CANDIDATES["apply"][0]

        def apply(arguments, x, u, v, bias=None, *, drop_x=None, drop_y=None, tiles=None):
            fails = {
                "B column-major": v is not None and v.stride(1) != 1,
                "factors": u.dtype != x.dtype,
                "forward mask": drop_x is not None,
                "dx mask": drop_y is not None,
            }
            if tiles == candidate and fails[layout]:
                raise RuntimeError("out of shared memory")
            return right(arguments, x, u, v, bias, drop_x=drop_x, drop_y=drop_y, tiles=tiles)

        monkeypatch.setattr(backend_triton, "apply", apply)
        monkeypatch.setitem(tuning.CANDIDATES, "apply", (candidate,))
        monkeypatch.setitem(tuning.CANDIDATES, "wgrad", ())
        clock = [10.0, 5.0] * len(PADDED_RANKS) + [5.0] * len(PADDED_RANKS)
        tried = {
            row.ranks: row.tried for row in tuned(clock, torch.float16) if row.kernel == "apply"
        }
        no_mask_at_128 = 2 if "mask" in layout else 1
        assert tried == {16: 1, 32: 1, 64: 1, 128: no_mask_at_128}
