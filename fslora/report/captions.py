"""One sentence under each picture that says what one sees in it, with the run's own figures."""

from fslora.report.records import Run
from fslora.report.units import counted, format_bytes, format_ratio, format_seconds

TITLES = {
    "loss.png": "losses against rounds",
    "bytes.png": "evaluation loss against bytes moved",
    "time.png": "what the evaluation says against simulated time",
    "classes.png": "bytes and losses of the capacity classes",
    "coverage.png": "how often each rank component was trained",
}


def caption(run: Run, name: str) -> str:
    """The sentence for one of the pictures that `plots.draw_all` drew of this run."""
    writers = {
        "loss.png": _loss_caption,
        "bytes.png": _bytes_caption,
        "time.png": _time_caption,
        "classes.png": _classes_caption,
        "coverage.png": _coverage_caption,
    }
    return writers[name](run)


def _loss_caption(run: Run) -> str:
    losses = run.series("eval_loss")[1]
    if not losses:
        return "The mean training loss of each round's clients."
    text = f"The whole adapter's evaluation loss {_moved(losses[0], losses[-1])}"
    metric = run.series("eval_metric")[1]
    if metric:
        text += f" and its {run.score} {_moved(metric[0], metric[-1])}"
    text += f" in {counted(run.rounds_done, 'round')}"
    if run.series("eval_loss_sketched")[1]:
        text += "; dashed, the same adapter seen through the clients' sketches"
    return text + "."


def _bytes_caption(run: Run) -> str:
    text = (
        f"The whole adapter's evaluation loss against bytes moved: {format_bytes(run.bytes_moved)}"
    )
    if not run.full_rank_bytes:
        return text + "."
    share = run.bytes_moved / run.full_rank_bytes
    return (
        f"{text}, {share:.1%} of what FedAvg-LoRA at full rank would have moved in the same rounds "
        "(dotted)."
    )


def _time_caption(run: Run) -> str:
    seconds = run.rounds[-1]["sim_seconds_total"]
    slowest = [
        max(record["clients"], key=lambda client: client["sim_seconds"])
        for record in run.rounds
        if record["clients"]
    ]
    of = [client["device"] for client in slowest]
    often = max(sorted(set(of)), key=of.count)
    return (
        f"The rounds take {format_seconds(seconds)} on the clients' devices, simulated from "
        f"counted operations and bytes; the slowest client asked was on {often} in "
        f"{of.count(often)} of {len(of)} rounds."
    )


def _classes_caption(run: Run) -> str:
    costs = [
        f"{format_bytes((record['bytes_up'] + record['bytes_down']) / record['participations'])} "
        f"with ratio {format_ratio(record['ratio'])}"
        for record in run.classes
        if record["participations"]
    ]
    ends = costs if len(costs) < 3 else [costs[0], costs[-1]]
    return f"Each time a client takes part it moves, up and down together, {' to '.join(ends)}."


def _coverage_caption(run: Run) -> str:
    columns = zip(*(record["coverage"] for record in run.coverage), strict=True)
    means = [sum(shares) / len(shares) for shares in columns]
    return (
        f"How often each of the {len(means)} rank components was trained: over the whole run, the "
        f"rarest by {min(means):.1%} and the commonest by {max(means):.1%} of the clients' modules."
    )


def _moved(before: float, after: float) -> str:
    old, new = f"{before:.3f}", f"{after:.3f}"
    if old == new:
        return f"stayed at {new}"
    return f"{'fell' if after < before else 'rose'} from {old} to {new}"
