"""Fleets: as text and as a file, dealt to clients by their shares; bad ones in one message."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fslora.clock import check_memory, deal_devices
from fslora.config import SimulateConfig
from fslora.devices import COMPUTE, NETWORKS, Fleet, read_fleet
from fslora.prepare import deal_ratios, dealt_devices
from fslora.protocol import POOLED
from fslora.settings import merged, read_settings
from fslora.simulate import simulate

from .test_devices import device


def test_slower_devices_go_to_smaller_ratios_and_shares_are_kept():
    fleet = read_fleet("gpu:5g=0.2,phone:poor=0.5,laptop:median=0.3")
    assert fleet.counts(10) == [2, 5, 3]
    assert sum(fleet.counts(7)) == 7
    thirds = Fleet(tuple(device(name, share=1 / 3) for name in "abc"))
    assert thirds.counts(4) == [2, 1, 1]
    ratio_of = {f"c{n}": (1 / 8, 1 / 4, 1 / 2)[n % 3] for n in range(30)}
    dealt = deal_devices(fleet, ratio_of, 0, by_ratio=True)
    order = sorted(ratio_of, key=lambda c: (ratio_of[c], dealt[c].flops_per_second))
    names = [dealt[c].name for c in order]
    assert names == ["phone:poor"] * 15 + ["laptop:median"] * 9 + ["gpu:5g"] * 6
    assert dealt != deal_devices(fleet, ratio_of, 1, by_ratio=True)
    random = deal_devices(fleet, ratio_of, 0, by_ratio=False)
    assert random == deal_devices(fleet, ratio_of, 0, by_ratio=False)
    names = [random[c].name for c in ratio_of]
    assert [names.count(each.name) for each in fleet.devices] == fleet.counts(30)
    assert len({random[c].name for c in ratio_of if ratio_of[c] == 1 / 2}) == 3
    assert random[POOLED].name == "gpu:5g"


def test_built_in_classes_keep_the_measured_ratios():
    speeds = [COMPUTE[name].flops_per_second for name in ("gpu", "laptop", "phone", "budget-phone")]
    assert [speed / speeds[0] for speed in speeds] == pytest.approx(
        [1, 0.151, 0.0526, 0.0112], 0.01
    )
    for compute in COMPUTE:
        for network in NETWORKS:
            (one,) = read_fleet(f"{compute}:{network}").devices
            assert (one.name, one.share) == (f"{compute}:{network}", 1.0)


BAD = {
    "phone": "is not COMPUTE:NETWORK=SHARE",
    "phone:poor=many": "is not COMPUTE:NETWORK=SHARE",
    "fone:poor": "there is no compute 'fone'; there is budget-phone, phone",
    "phone:3g": "there is no network '3g'; there is poor, median",
    "phone:poor=0.5,gpu:5g=0.6": "must sum to 1, they sum to 1.1",
    "phone:poor=0.5,phone:poor=0.5": "phone:poor is there twice",
    "phone:poor=1.5,gpu:5g=-0.5": "share must be positive, got -0.5",
    "nothing.toml": "there is no file nothing.toml",
    "[1": "is not valid JSON",
    "[" * 9999: "is not valid JSON: maximum recursion depth",
    f"{'x' * 999}.toml": "File name too long",
    '[{"compute":"gpu","network":"5g","share":1,"ratio":1.5}]': "ratio is at most 1",
    '[{"compute":["gpu"],"network":"5g","share":1}]': "there is no compute ['gpu']",
    f'[{{"compute":"gpu","network":"5g","share":1{"0" * 400}}}]': "0000 is not a number",
    '[{"compute":"gpu","network":"5g","share":0.5,"ratio":1},'
    '{"compute":"phone","network":"5g","share":0.5}]': "its own ratio, or none",
}
BAD_TOML = {
    "x = [": "is not valid TOML",
    f"x = {'[' * 9999}": "is not valid TOML: maximum recursion depth",
    "x = 1": "one [[device]] table",
    "device = 1": "one [[device]] table",
    "[[device]]\ncompute = 'phone'\nshare = 1": "lacks down_bits_per_second, up_bits",
    "[[device]]\ncompute = 'phone'\nnetwork = '5g'": "device phone:5g lacks share",
    "[[device]]\ncompute = 'phone'\nnetwork = '5g'\nshare = 1\nvolts = 3": "has no 'volts'",
    "[[device]]\ncompute = 'phone'\nnetwork = '5g'\nshare = '1'": "share = '1' is not a number",
    "[[device]]\ncompute = 'phone'\nnetwork = '5g'\nshare = 1\njitter = -1": "jitter must not be",
    "[[device]]\ncompute = 'phone'\nnetwork = '5g'\nshare = 1\ndropout = 1": "dropout below 1",
    "[[device]]\ncompute = 'phone'\nnetwork = '5g'\nshare = 1\nrtt_seconds = inf": "rtt_seconds",
}


@pytest.mark.parametrize("spec", [*BAD, *BAD_TOML], ids=lambda spec: spec[:40])
def test_a_bad_fleet_is_one_clear_message(spec, tmp_path):
    text = spec
    if spec in BAD_TOML:
        text = str(tmp_path / "fleet.toml")
        Path(text).write_text(spec)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_fleet(text)
    assert {**BAD, **BAD_TOML}[spec] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_fleet_that_may_not_be_read_is_one_clear_message(tmp_path, monkeypatch):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "fleet.toml"
    path.write_text("")
    monkeypatch.setattr(Path, "read_text", closed)
    with pytest.raises(
        ValueError, match=r"--devices: cannot read .*fleet\.toml: Permission denied"
    ):
        read_fleet(str(path))


def test_a_model_that_does_not_fit_is_refused():
    model = torch.nn.Linear(100, 100)
    check_memory(Fleet((device(memory_bytes=40400),)), model)
    with pytest.raises(ValueError, match="leave it out of --devices"):
        check_memory(Fleet((device(memory_bytes=40399),)), model)


def test_a_fleet_from_a_file_is_kept_whole(settings, tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(
        "[[device]]\nname = 'old phone'\ncompute = 'phone'\nnetwork = 'poor'\nshare = 0.5\n"
        "flops_per_second = 1e9\n[[device]]\ncompute = 'gpu'\nnetwork = 'silo'\nshare = 0.5\n"
    )
    given = {**settings, "devices": str(path), "over_select": 2.0}
    config = SimulateConfig(**given)
    old, gpu = config.fleet.devices
    assert (old.name, old.flops_per_second, old.dropout) == ("old phone", 1e9, 0.05)
    assert gpu.memory_bytes == 24e9
    simulate(replace(config, rounds=1))
    path.unlink()
    assert replace(config, seed=1).fleet == config.fleet, "as runs of a comparison are made"
    saved = read_settings(Path(config.out) / "config.json")
    restored = SimulateConfig(**merged(None, saved, "config.json"))
    assert restored.fleet.devices == (old, gpu)
    simulate(replace(restored, rounds=2, resume=True))
    path.write_text("[[device]]\ncompute = 'gpu'\nnetwork = 'silo'\nshare = 1\n")
    with pytest.raises(ValueError, match="started otherwise: --devices"):
        simulate(SimulateConfig(**given, resume=True))


def test_clients_of_a_device_with_a_ratio_of_its_own_have_it(settings):
    both = {"network": "5g", "share": 0.5}
    tables = [{"compute": "gpu", **both, "ratio": 0.25}, {"compute": "phone", **both, "ratio": 1.0}]
    config = SimulateConfig(**{**settings, "ratios": "1/8,1/4,1/2", "devices": json.dumps(tables)})
    assert config.ratio_values == (0.25, 1.0)
    names = [f"author {n}" for n in range(6)]
    ratios = dict(zip(names, deal_ratios(config, names).values(), strict=True))
    dealt = dealt_devices(config, config.fleet, ratios)
    assert ratios == {name: dealt[name].ratio for name in names}
    assert sorted(ratios.values()) == [0.25] * 3 + [1.0] * 3
    # Whoever has the phone here has it in a run at one ratio too: plans differ by ratios alone.
    alike = [{**table, "ratio": 0.0} for table in tables]
    uniform = replace(config, ratios="1/2", devices=json.dumps(alike))
    same = dealt_devices(uniform, uniform.fleet, dict.fromkeys(names, 0.5))
    assert {name: dealt[name].name for name in names} == {name: same[name].name for name in names}
    with pytest.raises(ValueError, match="leave out --ratios 1/2"):
        replace(config, ratios="1/2")


def test_shares_may_be_fractions():
    fleet = read_fleet("phone:poor=1/3,laptop:median=1/3,gpu:5g=1/3")
    assert fleet.counts(9) == [3, 3, 3]
    with pytest.raises(ValueError, match=r"sum to 0.999; for thirds write 1/3"):
        read_fleet("phone:poor=0.333,laptop:median=0.333,gpu:5g=0.333")
    with pytest.raises(ValueError, match=r"sum to 1\.0000012; "):
        read_fleet("phone:poor=0.5,laptop:median=0.5000012")
    third = {"compute": "gpu", "network": "5g", "share": 0.3333333}  # as the message has it
    assert read_fleet(json.dumps([{**third, "name": name} for name in "abc"])).counts(9) == [3] * 3
    with pytest.raises(ValueError, match="is not COMPUTE:NETWORK=SHARE"):
        read_fleet("phone:poor=1/0")
