"""The tables of a comparison, once as text cells, for the page and for Markdown alike."""

from typing import Any, NamedTuple

from fslora.report.records import Record, is_number
from fslora.report.units import counted, format_bytes, format_seconds

ABSENT = "–"


class Table(NamedTuple):
    """A table with a heading and a sentence on how to read it."""

    title: str
    note: str
    heads: list[str]
    rows: list[list[str]]


def without_empty(found: Table) -> Table:
    """Leave out columns that say nothing of any method and only cost room."""
    told = [
        at
        for at in range(len(found.heads))
        if not found.rows or any(row[at] not in (ABSENT, "") for row in found.rows)
    ]
    heads, *rows = [[row[at] for at in told] for row in (found.heads, *found.rows)]
    return found._replace(heads=heads, rows=rows)


def paper_table(datasets: list[Record]) -> Table:
    """Method, cost, the figure of each data set as mean ± standard deviation, and the average."""
    labels = dict.fromkeys(each["label"] for data in datasets for each in data["strategies"])
    averaged = len(datasets) > 1 and len({data["figure"] for data in datasets}) == 1
    heads = ["method", "bytes moved", "simulated time", *map(column_head, datasets)]
    rows = []
    for label in labels:
        found = [strategy_of(data, label) for data in datasets]
        finals = [each["final"] if each else None for each in found]
        shown = [
            mean_std(final[data["figure"]], data) if final else ABSENT
            for final, data in zip(finals, datasets, strict=True)
        ]
        costs = [_total(finals, "bytes", format_bytes), _total(finals, "sim_seconds", format_time)]
        row = [label, *costs, *shown]
        if averaged:
            row.append(_average(finals, datasets))
        rows.append(row)
    note = "Mean ± standard deviation over the seeds; costs are means"
    note += " and, over the data sets, sums." if len(datasets) > 1 else " of a whole run."
    return Table("All methods", note, [*heads, *(["average"] if averaged else [])], rows)


def final_table(data: Record) -> Table:
    """Where every strategy ended, with the interval of its mean, and what it paid."""
    other = "loss" if data["figure"] == "metric" else "metric"
    heads = ["method", figure_name(data), "95% interval", name_of(other, data)]
    heads += ["up", "down", "simulated time"]
    rows = []
    for each in data["strategies"]:
        final = each["final"]
        rows.append(
            [
                each["label"],
                value_of(final[data["figure"]]["mean"], data),
                interval(final[data["figure"]], data),
                formatted(final[other]["mean"], other),
                _of(final["bytes_up"]["mean"], format_bytes),
                _of(final["bytes_down"]["mean"], format_bytes),
                _of(final["sim_seconds"]["mean"], format_time),
            ]
        )
    count = len(data["seeds"])
    rounds = counted(data["settings"]["rounds"], "round")
    note = f"Means over {counted(count, 'seed')} after {rounds}."
    if count == 1:
        note += " One seed gives no interval, and no winner can be called."
    return Table("After the last round", note, heads, rows)


def pair_table(data: Record) -> Table | None:
    """The first strategy held against each other one, seed by seed."""
    if not data["pairs"]:
        return None
    first = data["pairs"][0]["one"]
    rows = [
        [
            pair["other"],
            value_of(pair["difference"]["mean"], data, sign=True),
            interval(pair["difference"], data, sign=True),
            _wins(pair["winner"]),
        ]
        for pair in data["pairs"]
    ]
    note = (
        f"{figure_name(data).capitalize()} of {first} less that of the other, in the same seeds "
        "and splits. A win is called only where the 95% interval leaves out 0; the intervals are "
        "not corrected for how many there are."
    )
    heads = ["against", "difference", "95% interval", "verdict"]
    return Table(f"{first} against each other method", note, heads, rows)


def target_tables(data: Record) -> list[Table]:
    """For each target what reaching it cost, and how that compares with the first strategy."""
    return [_target_table(data, place) for place in range(len(data["strategies"][0]["targets"]))]


def _target_table(data: Record, place: int) -> Table:
    first = data["strategies"][0]
    target = first["targets"][place]
    pairs = {pair["other"]: pair["targets"][place] for pair in data["pairs"]}
    heads = ["method", "reached", "rounds", "up", "down", "of it heads", "simulated time"]
    quotients = ("bytes", "bytes_up", "bytes_down", "sim_seconds")
    names = ("bytes ×", "up ×", "down ×", "time ×")
    rows = []
    for each in data["strategies"]:
        cost = each["targets"][place]
        seeds = len(each["runs"])
        all_reached = cost["reached"] == seeds
        reached = f"{cost['reached']} of {counted(seeds, 'seed')}" if cost["reached"] else "never"
        row = [each["label"], reached]
        for key, form in (
            ("round", "{:.1f}".format),
            ("bytes_up", format_bytes),
            ("bytes_down", format_bytes),
            ("head_bytes", format_bytes),
            ("sim_seconds", format_time),
        ):
            row.append(_of(cost[key]["mean"], form) if all_reached else ABSENT)
        pair = pairs.get(each["label"])
        row += [_quotient(pair[key]) if pair else ABSENT for key in quotients]
        rows.append(row)
    what = f"{name_of(target['figure'], data)} {formatted(target['value'], target['figure'])}"
    note = (
        "What had been paid when an evaluation first reached it: means over the seeds, left out "
        f"where a seed never did. ×: what {first['label']} pays for 1 that the method pays, "
        "geometric mean and 95% interval over the same seeds; ✓ where the interval leaves out 1."
    )
    return Table(f"To {what}", note, [*heads, *names], rows)


def search_table(data: Record) -> Table | None:
    """What the search tried, and what it chose."""
    if not data["search"]:
        return None
    grid, trials = data["search"]["grid"], data["search"]["trials"]
    names = [name_of(figure, data) for figure in ("metric", "loss")]
    heads = ["method", "seed", *grid, *names, "chosen"]
    rows = [
        [
            trial["label"],
            str(trial["seed"]),
            *(f"{trial['values'][key]}" for key in grid),
            formatted(trial["metric"], "metric"),
            "failed" if trial["failed"] else formatted(trial["loss"], "loss"),
            "✓" if trial["chosen"] else "",
        ]
        for trial in trials
    ]
    note = (
        "The same grid for every method, judged on rows held out of the clients' own training "
        "data; no test row was used."
    )
    return Table("Search", note, heads, rows)


def runs_table(data: Record) -> Table:
    """Every single run."""
    names = [name_of(figure, data) for figure in ("metric", "loss")]
    heads = ["method", "seed", "lr", "server lr", *names, "bytes", "wall"]
    rows = []
    for each in data["strategies"]:
        for run in each["runs"]:
            head = [each["label"], str(run["seed"]), f"{run['lr']:g}", f"{run['server_lr']:g}"]
            if run["failed"]:
                rows.append([*head, "failed", *[ABSENT] * 3])
                continue
            rows.append(
                [
                    *head,
                    formatted(run["metric"], "metric"),
                    formatted(run["loss"], "loss"),
                    format_bytes(run["bytes"]),
                    format_seconds(run["wall_seconds"]),
                ]
            )
    return Table("Every run", "", heads, rows)


def notes(data: Record) -> list[str]:
    """What a reader has to know before believing the tables, one sentence each."""
    found = []
    for each in data["strategies"]:
        found += [
            f"{each['label']} failed with seed {run['seed']} ({run['failed']}); its means are "
            "without it."
            for run in each["runs"]
            if run["failed"]
        ]
    if data["search"]:
        for key, values in data["search"]["grid"].items():
            ordered = not any(isinstance(value, str | bool) for value in values)
            ends = {min(values), max(values)} if ordered and len(values) > 1 else set()
            trials = data["search"]["trials"]
            edge = dict.fromkeys(
                trial["label"]
                for trial in trials
                if trial["chosen"]
                and trial["values"][key] in ends
                and any(  # zero-shot does not care
                    other["label"] == trial["label"] and other["loss"] != trial["loss"]
                    for other in trials
                )
            )
            if edge:
                whose = ", ".join(edge) if len(ends) < len(values) else "each method"
                found.append(
                    f"The best {key} of {whose} is at an end of the grid; a wider one may hold a "
                    "better."
                )
    return found


def markdown(table: Table, level: int = 2) -> str:
    """A table as Markdown, its title a heading of a level."""
    lines = [table.heads, ["-"] * len(table.heads), *table.rows]
    rows = "\n".join("|" + "|".join(map(_cell, line)) + "|" for line in lines)
    note = f"{table.note}\n\n" if table.note else ""
    return f"{'#' * level} {table.title}\n\n{note}{rows}\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def strategy_of(data: Record, label: str) -> Record | None:
    """A strategy's record, None where the data set was compared without it."""
    return next((each for each in data["strategies"] if each["label"] == label), None)


def figure_name(data: Record) -> str:
    """What the data set is judged by, with its unit."""
    return name_of(data["figure"], data)


def name_of(figure: str, data: Record) -> str:
    """A figure's name, with its unit."""
    return f"{data['metric_name']} (%)" if figure == "metric" else "loss (nats)"


def column_head(data: Record) -> str:
    """A data set's name and what it is judged by."""
    return f"{data['name']}, {figure_name(data)}"


def value_of(value: float | None, data: Record, *, sign: bool = False) -> str:
    """A value of what the data set is judged by."""
    return formatted(value, data["figure"], sign=sign)


def formatted(value: float | None, figure: str, *, sign: bool = False) -> str:
    """A metric in percent, or a loss in nats."""
    if value is None or not is_number(value):
        return ABSENT
    plus = "+" if sign else ""
    text = f"{100 * value:{plus}.1f}" if figure == "metric" else f"{value:{plus}.3f}"
    return text if float(text) else text.lstrip("+-")  # a rounded −0.02 is not −0.0


def mean_std(found: Record, data: Record) -> str:
    """A figure as mean ± standard deviation."""
    mean = value_of(found["mean"], data)
    return mean if found["std"] is None else f"{mean} ± {value_of(found['std'], data)}"


def interval(found: Record, data: Record, *, sign: bool = False) -> str:
    """A figure's 95% interval."""
    if found["low"] is None:
        return ABSENT
    ends = (value_of(found[end], data, sign=sign) for end in ("low", "high"))
    return f"[{', '.join(ends)}]"


def format_time(seconds: float) -> str:
    """Simulated seconds; a run in which nobody moved or computed took none."""
    return format_seconds(seconds) if seconds else "0 s"


def _of(value: float | None, form: Any) -> str:  # noqa: ANN401 - any function of a number
    return ABSENT if value is None else str(form(value))


def _total(finals: list[Record | None], key: str, form: Any) -> str:  # noqa: ANN401
    means = [final[key]["mean"] for final in finals if final]
    known = len(means) == len(finals) and None not in means
    return str(form(sum(means))) if known else ABSENT


def _average(finals: list[Record | None], datasets: list[Record]) -> str:
    pairs = zip(finals, datasets, strict=True)
    means = [final[data["figure"]]["mean"] for final, data in pairs if final]
    known = len(means) == len(finals) and None not in means
    return value_of(sum(means) / len(means), datasets[0]) if known else ABSENT


def _quotient(found: Record) -> str:
    if found["mean"] is None:
        return ABSENT
    text = f"{found['mean']:.2f}"
    if found["low"] is not None:
        text += f" [{found['low']:.2f}, {found['high']:.2f}]"
    return text + (" ✓" if found["winner"] else "")


def _wins(winner: str | None) -> str:
    return "undecided" if winner is None else f"{winner} wins"
