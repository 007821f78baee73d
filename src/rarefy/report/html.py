"""The report as one self-contained HTML page: inline style, inline drawings, nothing fetched from anywhere.

Every text that comes from the report is escaped: layer and model names are chosen by whoever wrote the checkpoint.
"""

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from rarefy.core.results import LayerResult, RunReport
from rarefy.report.charts import error_heatmap, layer_strips, pair_bars
from rarefy.report.facts import (
    Change,
    changes,
    group_untouched,
    headline,
    num_weights_of,
    paired_note,
    repeat_commands,
    samples_text,
    totals,
    warnings,
)
from rarefy.report.units import (
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_range,
    format_seconds,
    format_spread,
    format_value,
)

_MAX_NAMES = 6
_TABLE_HEADS = (
    ("Layer", False),
    ("Out × in", True),
    ("Format", False),
    ("Steps", False),
    ("Zeros", True),
    ("Bits", True),
    ("Error", True),
    ("Before", True),
    ("After", True),
    ("Ratio", True),
    ("Time", True),
)


def render_html(report: RunReport) -> str:
    """Return the whole page.

    Args:
        report: The facts of one run; nothing else is read.

    Returns:
        A complete HTML document that makes no request and keeps its content without JavaScript.
    """
    title = f"{report.model}: rarefy report"
    body = "".join(
        (
            _header(report),
            _verdict(report),
            _layers(report),
            _untouched(report),
            _how(report),
            "<footer>Written by rarefy. The same facts are in <code>report.json</code>, the recipe in "
            "<code>recipe.yaml</code>. Units: 1 MB = 1,000,000 bytes.</footer>",
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # No request can leave this page, whatever a hostile name manages to smuggle in.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("rarefy.report").joinpath("assets", name).read_text(encoding="utf-8")


def _header(report: RunReport) -> str:
    facts = [escape(report.architecture), f"{format_count(report.num_parameters)} parameters"]
    if report.num_blocks:
        facts.append(f"{report.num_blocks} blocks")
    methods = list(dict.fromkeys(step for layer in report.layers for step in layer.steps))
    if methods:
        facts.append("compressed with " + escape(" and ".join(methods)))
    return (
        f'<div class="eyebrow">rarefy report</div><h1>{escape(report.model)}</h1>'
        f'<p class="lede">{" · ".join(facts)}</p>'
    )


def _verdict(report: RunReport) -> str:
    parts = [f'<p class="verdict">{escape(headline(report))}.</p>']
    notes = warnings(report)
    if notes:
        parts.append(f'<ul class="warnings">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>')
    parts += [f'<p class="note">{escape(note)}</p>' for note in report.notes]
    compared = changes(report)
    if compared:
        parts.append(f'<div class="cards">{"".join(map(_card, compared))}</div>')
        parts.append(
            '<p class="note">Upper bar: before. Lower bar: after. The range of a speed or of memory is that of '
            "several runs; where the ranges before and after overlap there is no measurable change. "
            f"{paired_note(report)}</p>"
        )
    return "".join(parts)


def _card(change: Change) -> str:
    metric = change.metric
    scaled = metric.unit in {"bytes", "fraction"}
    after = "not measured"
    if metric.after is not None:
        after = escape(format_value(metric.after.median, metric.unit if scaled else ""))
        if metric.unit and not scaled:
            after += f' <span class="unit">{escape(metric.unit)}</span>'
    parts = [f'<div class="card"><h3>{escape(change.title)}</h3><div class="after">{after}</div>']
    if metric.after is not None and metric.after.num_runs > 1:
        runs = "" if change.kind == "quality" else f" in {metric.after.num_runs} runs"
        text = f"{format_range(metric.after, metric.unit)}{runs}"
        parts.append(f'<div class="spread">{escape(text)}</div>')
    was = format_spread(metric.before, metric.unit if scaled else "")
    parts.append(f'<div class="was-text">before: {escape(was)}</div>')
    if change.text:
        parts.append(f'<span class="badge {change.outcome}">{escape(change.text)}</span>')
    if metric.before is not None and metric.after is not None:
        parts.append(pair_bars(metric.before.median, metric.after.median, change.outcome))
    if metric.how:
        parts.append(f"<details><summary>How it was measured</summary>{escape(metric.how)}</details>")
    parts.append("</div>")
    return "".join(parts)


def _layers(report: RunReport) -> str:
    if not report.layers:
        return "<h2>Layers</h2><p>No layer was compressed.</p>"
    total = totals(report)
    worst = max(report.layers, key=lambda layer: layer.error)
    figures = (
        ("Compressed layers", f"{total.num_layers}"),
        ("Weights in them", format_count(total.num_weights)),
        ("Zeros", format_percent(total.sparsity)),
        ("Stored bits per weight", format_number(total.bits_per_weight)),
        ("Before", format_bytes(total.dense_bytes)),
        ("After", format_bytes(total.packed_bytes)),
    )
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in figures)
    parts = [
        f'<h2>Compressed layers</h2><dl class="figures">{listed}</dl>',
        '<p class="note">Each bar is one layer, in the order of the model; point at it for its figures. '
        f"The largest error is {escape(format_percent(worst.error))} in <code>{escape(worst.name)}</code>. "
        "The output error is ‖(W − V)X‖² / ‖WX‖² on the calibration inputs X; "
        "where marked, the weight error ‖W − V‖² / ‖W‖².</p>",
        f'<div class="scroll">{layer_strips(report.layers)}</div>',
    ]
    heatmap = error_heatmap(report.layers)
    if heatmap:
        parts.append("<h3>Error by block and kind of layer</h3>")
        parts.append(
            '<p class="note">The stronger the colour, the larger the error. '
            "One row per kind of layer, one column per block.</p>"
            f'<div class="scroll">{heatmap}</div>'
        )
    parts.append("<h3>All compressed layers</h3>")
    parts.append(
        '<input class="filter" type="search" placeholder="Filter, for example down_proj" data-table="layers" '
        'aria-label="Filter the layers" hidden>'
    )
    heads = "".join(
        f'<th scope="col"{" class=n" if numeric else ""}><button type="button">{escape(name)}</button></th>'
        for name, numeric in _TABLE_HEADS
    )
    rows = "".join(map(_layer_row, report.layers))
    parts.append(
        f'<div class="table" tabindex="0"><table class="sortable" id="layers"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    return "".join(parts)


def _layer_row(layer: LayerResult) -> str:
    ratio = layer.dense_bytes / layer.packed_bytes if layer.packed_bytes else float("inf")
    cells = (
        _number_cell(" × ".join(map(str, layer.shape)), num_weights_of(layer)),
        f"<td><code>{escape(layer.format)}</code></td>",
        f"<td>{escape(', '.join(layer.steps))}</td>",
        _number_cell(format_percent(layer.sparsity), layer.sparsity),
        _number_cell(format_number(layer.bits_per_weight), layer.bits_per_weight),
        _number_cell(
            format_percent(layer.error) + ("" if layer.error_metric == "output" else " (weight)"), layer.error
        ),
        _number_cell(format_bytes(layer.dense_bytes), layer.dense_bytes),
        _number_cell(format_bytes(layer.packed_bytes), layer.packed_bytes),
        _number_cell(f"{ratio:.1f}×", ratio),
        _number_cell(format_seconds(layer.seconds), layer.seconds),
    )
    return f"<tr><td><code>{escape(layer.name)}</code></td>{''.join(cells)}</tr>"


def _number_cell(text: str, value: float) -> str:
    return f'<td class="n" data-v="{value:.9g}">{escape(text)}</td>'


def _untouched(report: RunReport) -> str:
    groups = group_untouched(report.untouched)
    if not groups:
        return "<h2>Untouched layers</h2><p>None: every layer with weights was compressed.</p>"
    rows = "".join(
        f'<tr><td class="n">{len(group.names)}</td><td>{escape(group.kind)}</td>'
        f'<td class="n">{escape(format_bytes(group.num_bytes))}</td><td class="wrap">{escape(group.reason)}</td>'
        f'<td class="wrap">{_names(group.names)}</td></tr>'
        for group in groups
    )
    count = len(report.untouched)
    return (
        f'<h2>Untouched layers</h2><p class="note">{count} {"layer" if count == 1 else "layers"} kept as they were, '
        f"{escape(format_bytes(sum(group.num_bytes for group in groups)))} together.</p>"
        '<div class="table" tabindex="0"><table><thead><tr><th class="plain n">Count</th><th class="plain">Kind</th>'
        '<th class="plain n">Bytes</th><th class="plain">Reason</th><th class="plain">Names</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _names(names: Sequence[str]) -> str:
    listed = _codes(names[:_MAX_NAMES])
    if len(names) <= _MAX_NAMES:
        return listed
    rest = _codes(names[_MAX_NAMES:])
    return f"{listed}<details><summary>{len(names) - _MAX_NAMES} more</summary>{rest}</details>"


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"<code>{escape(name)}</code>" for name in names)


def _how(report: RunReport) -> str:
    info = report.calibration
    if info is None:
        calibration: dict[str, str] = {"Source": "none: no step of the recipe needs calibration data"}
    else:
        calibration = {
            "Source": info.source,
            "Samples": samples_text(info),
            "Tokens": f"{info.num_tokens:,}",
        }
        if info.note:
            calibration["Note"] = info.note
    phases = {name.replace("_", " ").capitalize(): format_seconds(value) for name, value in report.seconds.items()}
    run = {**phases, "Peak memory": format_bytes(report.peak_memory_bytes), "Seed": str(report.seed)}
    sections = (
        ("Calibration", calibration),
        ("Time and memory of this run", run),
        ("Machine", {name: _machine_value(name, value) for name, value in report.machine.items()}),
        ("Versions", report.versions),
    )
    columns = "".join(f"<section><h3>{name}</h3>{_fact_list(facts)}</section>" for name, facts in sections)
    commands = escape("\n".join(repeat_commands(report)))
    repeat = f'<h3>Repeat it</h3><p class="note">OUT is the directory of this report.</p><pre>{commands}</pre>'
    recipe = escape(json.dumps(report.recipe, indent=2, ensure_ascii=False))
    head = f'<h2>How it was made</h2><div class="columns">{columns}</div>'
    return f"{head}<h3>Recipe</h3><pre>{recipe}</pre>{repeat if commands else ''}"


def _machine_value(name: str, value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    return format_bytes(value) if name.endswith("bytes") else format_number(value)


def _fact_list(facts: dict[str, str]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'
