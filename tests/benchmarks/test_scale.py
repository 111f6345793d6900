import json

import pytest
import torch

from benchmarks import scale

CELL = {"clients": 12, "per_round": 3, "rank": 4, "layers": 1, "rounds": 3}


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_cell_says_where_its_time_goes(capsys):
    assert scale.main(["--cell", json.dumps(CELL)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["modules"] == 7
    assert len(found["rounds"]) == CELL["rounds"], "the evaluated round is left out"
    for parts in found["rounds"]:
        assert parts[scale.ORCHESTRATION] > parts["checkpoint and record"] > 0
        assert parts[scale.STEPS] > 0
        assert scale.EVALUATION not in parts
    assert found["rss_mb"] > 50
    assert found["start_s"] > 0
    everything, loop = (scale.median_of(found, part) for part in (scale.ORCHESTRATION, scale.LOOP))
    assert everything > loop > 0
    assert scale.median_of(found, scale.NAIVE) > 0
    assert scale.line(found).split()[:4] == ["12", "3", "4", "3"]
    assert any("local steps" in text for text in scale.parts_of(found))


def test_the_deepest_cell_of_the_table_has_a_model_that_deep(capsys):
    deepest = max(scale.GROWTH["layers"])
    assert scale.main(["--cell", json.dumps({**CELL, "layers": deepest, "rounds": 1})]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["modules"] == 7 * deepest
