import json
import subprocess
import sys

from benchmarks.scale import BASE, GROWTH, NAIVE, ORCHESTRATION, STEPS


def test_every_cell_of_the_table_fits_its_model_and_splits_the_rounds_into_parts():
    cell = {"clients": 8, "per_round": 4, "rounds": 2, "layers": max(GROWTH["layers"])}
    command = [sys.executable, "-m", "benchmarks", "scale", "--cell", json.dumps(cell)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cell"] == {**BASE, "model": "docs-base", "strategy": "fslora", **cell}
    assert found["modules"] == 7 * max(GROWTH["layers"])
    assert len(found["rounds"]) == 2
    for parts in found["rounds"]:
        assert min(parts[name] for name in (ORCHESTRATION, STEPS, NAIVE)) > 0
    assert found["rss_mb"] > 0
