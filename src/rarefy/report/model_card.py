"""The README.md of a compressed model: a Hugging Face model card with the measured facts and how to load it."""

import json
import re

from rarefy.core.results import RunReport
from rarefy.report.facts import (
    changes,
    group_untouched,
    headline,
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
    format_spread,
)

# Task of the model class, for the card's front matter and for the Auto class of the loading example.
_TASKS = (
    ("ForCausalLM", "text-generation", "AutoModelForCausalLM"),
    ("ForConditionalGeneration", None, "AutoModelForSeq2SeqLM"),
    ("ForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
    ("ForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
    ("ForQuestionAnswering", "question-answering", "AutoModelForQuestionAnswering"),
    ("ForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
    ("Model", "feature-extraction", "AutoModel"),
)
_MAX_NAMES = 6


def render_model_card(report: RunReport) -> str:
    """Return the model card as Markdown with YAML front matter.

    Args:
        report: The facts of one run. The licence and the authors of the source model are not among them.
    """
    task, auto_class = _task_of(report.architecture)
    sections = (
        _front_matter(task),
        f"# {_plain(_short_name(report.model))}, compressed with rarefy\n",
        f"{_plain(headline(report))}.\n",
        _warning_lines(report),
        _use(task, auto_class),
        _measured(report),
        _compressed(report),
        _untouched(report),
        _made(report),
    )
    return "\n".join(section for section in sections if section)


def _front_matter(task: str | None) -> str:
    lines = ["---", "library_name: rarefy", "tags:", "- rarefy", "- compressed", "- cpu"]
    if task is not None:
        lines.append(f"pipeline_tag: {task}")
    return "\n".join([*lines, "---", ""])


def _task_of(architecture: str) -> tuple[str | None, str]:
    for suffix, task, auto_class in _TASKS:
        if architecture.endswith(suffix):
            return task, auto_class
    return None, "AutoModel"


def _warning_lines(report: RunReport) -> str:
    told = [("Warning", note) for note in warnings(report)] + [("Note", note) for note in report.notes]
    return "\n".join(f"> **{kind}:** {_plain(note)}\n" for kind, note in told)


def _use(task: str | None, auto_class: str) -> str:
    if task == "text-generation":
        shell = 'rarefy generate . "Once upon a time"'
        engine = 'print(rarefy.Engine(".").generate("Once upon a time", max_new_tokens=64))'
    elif task == "feature-extraction":
        shell = 'rarefy embed . "A sentence"'
        engine = 'print(rarefy.Engine(".").embed(["A sentence"]).shape)'
    else:
        shell = "rarefy inspect ."
        engine = ""
    python = [
        "import rarefy  # makes from_pretrained understand this directory",
        f"from transformers import {auto_class}",
    ]
    python += ["", f'model = {auto_class}.from_pretrained(".")']
    blocks = [f"In this directory, from the shell:\n\n```sh\n{shell}\n```\n"]
    if engine:
        blocks.append(f"From Python, without torch:\n\n```python\nimport rarefy\n\n{engine}\n```\n")
    blocks.append(
        "With transformers (`pip install 'rarefy[compress]'`):\n\n```python\n" + "\n".join(python) + "\n```\n"
    )
    return "## Use\n\n" + "\n".join(blocks)


def _measured(report: RunReport) -> str:
    compared = changes(report)
    if not compared:
        return ""
    lines = ["## Before and after\n", "| | before | after | change |", "|---|---|---|---|"]
    for change in compared:
        unit = change.metric.unit
        cells = (format_spread(change.metric.before, unit), format_spread(change.metric.after, unit), change.text)
        lines.append(f"| {_plain(change.title)} | {' | '.join(map(_plain, cells))} |")
    how = [f"- {_plain(change.title)}: {_plain(change.metric.how)}" for change in compared if change.metric.how]
    note = [paired_note(report), ""] if paired_note(report) else []
    return "\n".join([*lines, "", *note, *how, ""])


def _compressed(report: RunReport) -> str:
    if not report.layers:
        return ""
    total = totals(report)
    formats: dict[str, int] = {}
    for layer in report.layers:
        formats[layer.format] = formats.get(layer.format, 0) + 1
    listed = ", ".join(f"{count} as `{_plain(name)}`" for name, count in formats.items())
    return (
        f"## Compressed layers\n\n{total.num_layers} layers with {format_count(total.num_weights)} weights: {listed}. "
        f"{format_percent(total.sparsity)} of the weights are zero; a weight takes "
        f"{format_number(total.bits_per_weight)} bits with everything counted "
        f"({format_bytes(total.dense_bytes)} before, {format_bytes(total.packed_bytes)} after).\n"
    )


def _untouched(report: RunReport) -> str:
    groups = group_untouched(report.untouched)
    if not groups:
        return ""
    lines = ["## Untouched layers\n", "| count | kind | bytes | reason | names |", "|---|---|---|---|---|"]
    for group in groups:
        names = ", ".join(group.names[:_MAX_NAMES]) + (", ..." if len(group.names) > _MAX_NAMES else "")
        cells = (str(len(group.names)), group.kind, format_bytes(group.num_bytes), group.reason, names)
        lines.append(f"| {' | '.join(map(_plain, cells))} |")
    return "\n".join([*lines, ""])


def _made(report: RunReport) -> str:
    info = report.calibration
    calibration = (
        "none"
        if info is None
        else f"{_plain(info.source)}, {samples_text(info)}" + (f" ({_plain(info.note)})" if info.note else "")
    )
    versions = ", ".join(f"{_plain(name)} {_plain(str(version))}" for name, version in report.versions.items())
    # JSON is YAML too. A fence longer than any run of backticks inside cannot be closed by the text.
    recipe = json.dumps(report.recipe, indent=2, ensure_ascii=False)
    commands = "\n".join(repeat_commands(report))
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", recipe + commands)), 3)
    return (
        f"## How it was made\n\n- Source: {_plain(report.model)} ({_plain(report.architecture)}, "
        f"{format_count(report.num_parameters)} parameters)\n- Calibration: {calibration}\n- Seed: {report.seed}\n"
        f"- Versions: {versions}\n\n{fence}json\n{recipe}\n{fence}\n\n"
        + (f"To repeat it:\n\n{fence}sh\n{commands}\n{fence}\n\n" if commands else "")
        + "`report.html` in this directory shows every layer.\n"
    )


def _short_name(model: str) -> str:
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] or model


def _plain(text: str) -> str:
    """Return `text` on one line with everything escaped that Markdown or HTML would act on."""
    one_line = " ".join(text.split())
    escaped = re.sub(r"([\\`*\[\]#|])", r"\\\1", one_line).replace("&", "&amp;")
    return escaped.replace("<", "&lt;").replace(">", "&gt;")
