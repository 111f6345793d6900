import hashlib

import pytest

from benchmarks.shapes import DEFAULTS, RATIOS, cells, ratio_name

# The list is frozen: whoever changes it changes this line too, before timing anything.
FROZEN = "70808bc503e2c9b0"


def test_the_list_is_the_frozen_one():
    ids = [f"{cell.id} {cell.tuned}" for device in DEFAULTS for cell in cells(device)]
    assert hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16] == FROZEN


@pytest.mark.parametrize(("device", "most"), [("cpu", 40), ("cuda", 60)])
def test_the_default_is_short_and_half_of_it_is_never_tuned_on(device, most):
    chosen = cells(device)
    assert len(chosen) <= most
    assert len({cell.id for cell in chosen}) == len(chosen)
    assert sum(cell.tuned for cell in chosen) == len(chosen) / 2
    series = {cell.series: cell.tuned for cell in chosen}
    assert sum(series.values()) == len(series) / 2
    # A series is wholly one or the other: no unseen cell differs from a tuned one only in S.
    assert all(series[cell.series] == cell.tuned for cell in chosen)
    assert {cell.ratio for cell in chosen} >= set(RATIOS)


def test_what_the_issue_names_is_there():
    cpu, cuda = cells("cpu"), cells("cuda")
    wanted = {(768, 512), (768, 2048), (2048, 512), (2048, 2048)}
    assert wanted <= {(c.in_features, c.tokens) for c in cpu if c.in_features == c.out_features}
    assert {c.name.split("-")[0] for c in cpu} == {"square", "minilm", "roberta"}
    assert {c.name.split("-")[0] for c in cuda} == {"3b", "8b", "70b"}
    assert {(min(v), max(v)) for v in [[c.rank for c in cuda]]} == {(16, 256)}
    assert {(min(v), max(v)) for v in [[c.tokens for c in cuda]]} == {(512, 16384)}
    sizes = {c.sketch_size for c in cpu if c.series == "square-768-t512-r64-float32"}
    assert sizes == {4, 8, 16, 32, 64}


def test_the_full_grid_holds_the_default_and_its_marks():
    full = {cell.id: cell.tuned for cell in cells("cpu", full=True)}
    assert len(full) > 10 * len(cells("cpu"))
    assert all(full[cell.id] == cell.tuned for cell in cells("cpu"))
    assert sum(full.values()) < len(full) / 10


def test_cells_are_chosen_by_name_and_a_wrong_name_is_explained():
    assert {c.name for c in cells("cpu", names=["minilm-up"])} == {"minilm-up"}
    assert {c.sketch_size for c in cells("cpu", names=["*-float32-s8"])} == {8}
    with pytest.raises(ValueError, match="no cell on cpu is named 'llama'; layers are square-768"):
        cells("cpu", names=["minilm-q", "llama"])
    assert [ratio_name(r) for r in RATIOS] == ["1/16", "1/8", "1/4", "1/2", "1"]
