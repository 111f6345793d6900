"""The page of a report: one HTML file without scripts and without anything fetched.

Everything that comes from the run folder passes `escape` where it enters the markup, and the
page's content security policy forbids scripts and requests should that ever be forgotten.
"""

import base64
from html import escape

from fslora.report.captions import TITLES, caption
from fslora.report.records import Record, Run, is_number
from fslora.report.style import CSS
from fslora.report.units import format_bytes, format_ratio, format_seconds, short_name

ABSENT = "–"
NAMES = {
    "fslora": "FSLoRA",
    "fedit": "FedIT",
    "fedit-min": "FedIT at the least rank",
    "fedit-max": "FedIT at the highest rank",
    "hetlora": "HetLoRA",
    "flexlora": "FlexLoRA",
    "flora": "FLoRA",
    "ffa-lora": "FFA-LoRA",
    "rolora": "RoLoRA",
    "fedex-lora": "FedEx-LoRA",
    "fed-plora": "Fed-PLoRA",
    "zero-shot": "Zero-shot",
    "head-only": "Head only",
    "centralised": "Centralised training",
    "local-only": "Local training",
}
_FEDERATED = "{who} trained one LoRA adapter of rank {rank} for {model} on {data} {steps}."
_CUT = f"{_FEDERATED[:-1]}, each client {{shares}} of the ranks."
_SENTENCES = {
    "fslora": f"{_FEDERATED[:-1]}, each client a sketch of {{shares}} of the ranks.",
    **dict.fromkeys(("hetlora", "flexlora", "flora", "fed-plora"), _CUT),
    "zero-shot": "{model} as it came, judged on {data}: nobody trained.",
    "head-only": "{who} trained the head of {model} alone on {data} {steps}.",
    "centralised": "One LoRA adapter of rank {rank} for {model} was trained on all of {data} in "
    "one place, {steps} for each of {per_round} clients a round.",
    "local-only": "{who} each trained a LoRA adapter of its own for {model} on {data} {steps}, "
    "with {shares} of {rank} ranks.",
}


def render_page(run: Run, pictures: dict[str, bytes]) -> str:
    """The page as HTML text.

    Args:
        run: what the run folder says.
        pictures: PNG files by name, as `plots.draw_all` gives them; they are embedded.
    """
    name = NAMES.get(_strategy(run), _strategy(run))
    title = escape(f"{name}: {_source(run, 'model')} on {_source(run, 'data')}")
    sections = [
        f"<h1>{title}</h1>",
        f"<p>{escape(_sentence(run))}</p>",
        *(f'<p class="note">{escape(note)}</p>' for note in run.notes),
        _headline(run),
        _class_table(run),
        _pictures(run, pictures),
        _rejected(run),
        _reload(run),
        _settings(run),
    ]
    return document(title, sections)


def document(title: str, sections: list[str]) -> str:
    """A whole page of a title and sections, all escaped already; empty ones are left out."""
    body = "\n".join(section for section in sections if section)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _setting(run: Run, key: str) -> str:
    value = run.config.get(key)
    if value is None:
        return "unknown" if key not in run.config else "none"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _source(run: Run, key: str) -> str:
    return short_name(_setting(run, key))


def _plain(item: object) -> str:
    if isinstance(item, dict):
        return "(" + ", ".join(f"{key} {value}" for key, value in item.items()) + ")"
    return str(item)


def _strategy(run: Run) -> str:
    return str(run.config.get("strategy", "fslora"))


def _sentence(run: Run) -> str:
    shares = [format_ratio(record["ratio"]) for record in run.classes]
    done, asked = run.rounds_done, run.config.get("rounds", run.rounds_done)
    rounds = (f"{done}" if done == asked else f"{done} of {asked}") + " round" + "s" * (asked != 1)
    return _SENTENCES.get(_strategy(run), _FEDERATED).format(
        who=f"{_setting(run, 'clients')} clients, {_setting(run, 'per_round')} a round,",
        per_round=_setting(run, "per_round"),
        rank=_setting(run, "rank"),
        model=_source(run, "model"),
        data=f"{_source(run, 'data')} ({_setting(run, 'task')}, partition "
        f"{_setting(run, 'partition')})",
        steps=f"in {rounds} of {_setting(run, 'local_steps')} local steps",
        shares=" or ".join("all" if share == "1" else share for share in shares) or "some",
    )


def _headline(run: Run) -> str:
    tiles = []
    if loss := run.before_after("eval_loss"):
        tiles.append(("evaluation loss, full rank", _arrow(*loss), "nats, before → after"))
    if metric := run.before_after("eval_metric"):
        tiles.append((run.score, _arrow(*metric), "before → after"))
    moved = format_bytes(run.bytes_moved)
    if run.full_rank_bytes:
        share = run.bytes_moved / run.full_rank_bytes
        tiles.append(
            (
                "share of full-rank bytes",
                f"{share:.1%}",
                f"{moved} instead of {format_bytes(run.full_rank_bytes)} with FedAvg-LoRA",
            )
        )
    else:
        tiles.append(("bytes moved", moved, "up and down, all clients"))
    seconds = sum(record["wall_seconds"] for record in run.rounds)
    device = _setting(run, "device")
    if run.summary is not None:
        device = run.summary.get("device", device)
    tiles.append(("time", format_seconds(seconds), f"on {device}, evaluations not included"))
    items = "\n".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(value)}</b> {escape(unit)}</dd></div>"
        for name, value, unit in tiles
    )
    return f'<dl class="tiles">\n{items}\n</dl>'


def _class_table(run: Run) -> str:
    rows = [
        [
            format_ratio(record["ratio"]),
            _count(record.get("sketch_size")),
            _count(record["clients"]),
            _count(record["participations"]),
            format_bytes(record["bytes_up"]),
            format_bytes(record["bytes_down"]),
            _percent(record.get("share_of_full_rank")),
            _loss(record.get("loss_before")),
            _loss(record.get("loss_after")),
        ]
        for record in run.classes
    ]
    if not rows:
        return ""
    heads = ["sketch ratio", "ranks", "clients", "participations", "bytes up", "bytes down"]
    heads += ["share of full-rank bytes", "loss before", "loss after"]
    # An interrupted run knows nothing in some columns.
    known = [at for at in range(len(heads)) if any(row[at] != ABSENT for row in rows)]
    heads, rows = [heads[at] for at in known], [[row[at] for at in known] for row in rows]
    return "<h2>Capacity classes</h2>\n" + table(heads, rows, "classes")


def _pictures(run: Run, pictures: dict[str, bytes]) -> str:
    return figures([(png, TITLES[name], caption(run, name)) for name, png in pictures.items()])


def figures(pictures: list[tuple[bytes, str, str]]) -> str:
    """Pictures, each given as PNG, the text in its place, and its caption; embedded."""
    drawn = [
        f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" '
        f'alt="{escape(title)}"><figcaption>{escape(text)}</figcaption></figure>'
        for png, title, text in pictures
    ]
    return '<div class="pictures">\n' + "\n".join(drawn) + "\n</div>" if drawn else ""


def _rejected(run: Run) -> str:
    if not run.rejected:
        return ""
    rows = [
        [str(at), str(client["id"]), format_ratio(client["ratio"]), str(client["rejected"])]
        for at, client in run.rejected
    ]
    few = " open" if len(rows) <= 5 else ""
    return (
        f"<details{few}><summary>Rejected updates: {len(rows)}</summary>\n"
        + table(["round", "client", "sketch ratio", "reason"], rows, "rejected")
        + "\n</details>"
    )


def _reload(run: Run) -> str:
    if run.config.get("strategy") == "local-only":
        return ""  # every client has a model of its own
    classifier = run.config.get("task") == "classification"
    auto = f"AutoPeftModelFor{'SequenceClassification' if classifier else 'CausalLM'}"
    labels = ", num_labels=…" if classifier else ""
    snippet = (
        f"from peft import {auto}\n\n"
        f'model = {auto}.from_pretrained("adapter"{labels})  # the folder beside this page'
    )
    return f"<h2>Use the adapter</h2>\n<pre>{escape(snippet)}</pre>"


def _settings(run: Run) -> str:
    rows = [[key, _setting(run, key)] for key in run.config]
    if run.summary is not None:
        facts: Record = {
            "adapted modules": run.summary["modules"],
            "adapter parameters": f"{run.summary['parameters']:,}",
            "kernels": run.summary["implementation"],
            **run.summary["versions"],
        }
        rows += [[key, str(value)] for key, value in facts.items()]
    found = table(["setting", "value"], rows, "settings")
    return f"<details><summary>Settings and versions</summary>\n{found}\n</details>"


def table(heads: list[str], rows: list[list[str]], name: str) -> str:
    """A table of a class of the style sheet.

    Each cell repeats its head, which a phone shows instead of the head row.
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    lines = [
        "<tr>"
        + "".join(
            f'<td data-head="{escape(text)}">{escape(cell)}</td>'
            for text, cell in zip(heads, row, strict=True)
        )
        + "</tr>"
        for row in rows
    ]
    return (
        f'<table class="{name}"><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table>"
    )


def _arrow(before: float, after: float) -> str:
    return f"{before:.3f} → {after:.3f}"


def _count(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1%}"


def _loss(value: float | None) -> str:
    return ABSENT if value is None or not is_number(value) else f"{value:.3f}"
