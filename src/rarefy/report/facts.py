"""What a RunReport says as a whole: totals, changes, warnings, groups. Pure functions, no output format.

The three renderers (HTML, model card, terminal) share these, so that all of them state the same facts.
"""

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from rarefy.core.results import (
    NATS,
    CalibrationInfo,
    LayerResult,
    Metric,
    PairedDifference,
    RunReport,
    Spread,
    UntouchedLayer,
)
from rarefy.report.units import format_bytes, format_number, format_percent, format_value

Kind = Literal["size", "speed", "quality"]
Outcome = Literal["better", "same", "worse", "unknown"]

_TITLES = {
    "disk_bytes": "Size on disk",
    "weight_bytes": "Weights in memory",
    "peak_memory_bytes": "Peak memory",
    "perplexity": "Perplexity",
    "decode_tokens_per_s": "Decode speed",
    "prompt_tokens_per_s": "Prompt speed",
    "sequences_per_s": "Encoding speed",
    "sts_spearman": "Sentence similarity (Spearman)",
    "accuracy": "Accuracy",
    "fidelity": "Agreement with the original",
}
# How the headline ends "2.7x smaller ..." and "5.3x faster ...".
_WHERE = {
    "disk_bytes": "on disk",
    "weight_bytes": "in memory",
    "decode_tokens_per_s": "at generating",
    "prompt_tokens_per_s": "at reading the prompt",
    "sequences_per_s": "at encoding",
}
# A mean difference of so many standard errors or fewer may be chance: a larger one comes by chance in one case of
# twenty-two where examples are many, in one of twelve where they are eight.
DECISIVE_ERRORS = 2.0
# Relative changes below these are called no change, where the spread of repeated runs does not decide.
_SAME_WITHIN: dict[Kind, float] = {"size": 0.005, "speed": 0.02, "quality": 0.001}


@dataclass(frozen=True)
class Change:
    """One metric, compared: what kind it is, how it went and in which words."""

    metric: Metric
    title: str
    kind: Kind
    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Totals:
    """Sums over the compressed layers."""

    num_layers: int
    num_weights: int
    dense_bytes: int
    packed_bytes: int
    sparsity: float
    bits_per_weight: float


@dataclass(frozen=True)
class UntouchedGroup:
    """The untouched layers that share one kind and one reason."""

    kind: str
    reason: str
    names: tuple[str, ...]
    num_bytes: int


def title_of(metric_name: str) -> str:
    """Return the words for a metric's name; unknown names lose their underscores only."""
    known = _TITLES.get(metric_name)
    return known if known is not None else metric_name.replace("_", " ").capitalize()


def kind_of(metric: Metric) -> Kind:
    """Return whether a metric speaks of size, speed or quality; its unit decides."""
    if metric.unit == "bytes":
        return "size"
    if metric.unit.endswith("/s") or metric.unit in {"ms", "s", "us"}:
        return "speed"
    return "quality"


def change_of(metric: Metric) -> Change:
    """Compare a metric's two sides.

    Speeds and memory are repeated runs: overlapping spreads count as no measurable change. A quality is judged by the
    difference example by example, since both sides saw the same ones: within two of its standard errors it is no
    measurable change. The spread of the quality itself, over examples that are easy and hard, would hide a real loss.
    """
    kind = kind_of(metric)
    title = title_of(metric.name)
    before, after = metric.before, metric.after
    if before is None or after is None:
        return Change(metric, title, kind, "unknown", "")
    if not (math.isfinite(before.median) and math.isfinite(after.median)):
        return Change(metric, title, kind, "worse", "not finite")
    if _is_same(before, after, kind):
        return Change(metric, title, kind, "same", "unchanged" if kind == "quality" else "no measurable change")
    rose = after.median > before.median
    outcome: Outcome = "better" if rose == metric.higher_is_better else "worse"
    words = _change_words(metric, kind, before.median, after.median, outcome)
    if metric.paired is not None:
        words = f"{words} ± {_error_words(metric.paired)}"
        if abs(metric.paired.mean) <= DECISIVE_ERRORS * metric.paired.standard_error:
            return Change(metric, title, kind, "same", f"no measurable change ({words})")
    return Change(metric, title, kind, outcome, words)


def paired_note(report: RunReport) -> str:
    """Return what "±" means in the words of a quality's change; "" where no metric has it."""
    num_pairs = {metric.paired.num_pairs for metric in report.metrics if metric.paired is not None}
    if not num_pairs:
        return ""
    return (
        f"Quality is judged by the difference on each of the same {' or '.join(map(str, sorted(num_pairs)))} held-out "
        "examples before and after: ± is its standard error, and what is within two of them is no measurable change. "
        "Ranges are those of the value itself, which differs far more from one example to the next."
    )


def changes(report: RunReport) -> tuple[Change, ...]:
    """Return every metric's change: size first, then speed, then quality, in the report's order within each."""
    order: dict[Kind, int] = {"size": 0, "speed": 1, "quality": 2}
    return tuple(sorted((change_of(metric) for metric in report.metrics), key=lambda change: order[change.kind]))


def warnings(report: RunReport) -> tuple[str, ...]:
    """Return the run's own warnings and one plain sentence for every metric that got worse."""
    own = list(report.warnings)
    for change in changes(report):
        if change.outcome != "worse":
            continue
        sentence = (
            f"{_WORSE_WORDS[change.kind]}: {change.title.lower()} went {_from_to(change.metric)} ({change.text})."
        )
        own.append(sentence)
    return tuple(dict.fromkeys(own))


_WORSE_WORDS: dict[Kind, str] = {
    "size": "The result is larger than the input",
    "speed": "The result is slower than the input",
    "quality": "The result is less accurate than the input",
}


def headline(report: RunReport) -> str:
    """Return the verdict as one sentence, made of the measured changes only."""
    parts: list[str] = []
    for change in changes(report):
        if change.outcome == "unknown":
            continue
        if change.kind == "quality":
            parts.append(f"{change.title.lower()} {_from_to(change.metric, joiner=' to ')}")
        elif change.metric.name == "peak_memory_bytes":
            continue
        elif change.outcome == "same":
            parts.append(f"{change.title.lower()} unchanged")
        else:
            parts.append(f"{change.text} {_WHERE.get(change.metric.name, f'({change.title.lower()})')}")
    if not parts:
        total = totals(report)
        parts.append(
            f"{total.num_layers} layers, {format_bytes(total.dense_bytes)} to {format_bytes(total.packed_bytes)}; "
            "speed and quality were not measured"
        )
    sentence = ", ".join(parts)
    return sentence[:1].upper() + sentence[1:]


def totals(report: RunReport) -> Totals:
    """Return the sums over the compressed layers; averages are weighted by the number of weights."""
    num_weights = sum(num_weights_of(layer) for layer in report.layers)
    packed = sum(layer.packed_bytes for layer in report.layers)
    zeros = sum(layer.sparsity * num_weights_of(layer) for layer in report.layers)
    return Totals(
        num_layers=len(report.layers),
        num_weights=num_weights,
        dense_bytes=sum(layer.dense_bytes for layer in report.layers),
        packed_bytes=packed,
        sparsity=zeros / num_weights if num_weights else 0.0,
        bits_per_weight=packed * 8 / num_weights if num_weights else 0.0,
    )


def num_weights_of(layer: LayerResult) -> int:
    """Return the number of weights of a layer, the product of its shape."""
    return math.prod(layer.shape)


def group_untouched(layers: Iterable[UntouchedLayer]) -> tuple[UntouchedGroup, ...]:
    """Group untouched layers by kind and reason, the groups with the most bytes first."""
    groups: dict[tuple[str, str], list[UntouchedLayer]] = {}
    for layer in layers:
        groups.setdefault((layer.kind, layer.reason), []).append(layer)
    result = (
        UntouchedGroup(kind, reason, tuple(layer.name for layer in members), sum(layer.num_bytes for layer in members))
        for (kind, reason), members in groups.items()
    )
    return tuple(sorted(result, key=lambda group: (-group.num_bytes, group.kind, group.reason)))


def repeat_commands(report: RunReport, out: str = "OUT") -> tuple[str, ...]:
    """Return the shell commands that repeat this run and its measurements; none for example inputs given in Python."""
    info = report.calibration
    if info is not None and info.sequence_length == 0:
        return ()
    compress = ["rarefy", "compress", report.model, "-o", f"{out}-again", "--recipe", f"{out}/recipe.yaml"]
    if info is not None:
        if not info.source.startswith("built-in"):
            compress += ["--calibration", info.source]
        compress += ["--samples", str(info.num_samples), "--sequence-length", str(info.sequence_length)]
    compress += ["--seed", str(report.seed)]
    commands = [shlex.join(compress), shlex.join(["rarefy", "bench", report.model, out])]
    if any(metric.name == "perplexity" for metric in report.metrics):
        for model in (report.model, out):
            commands.append(shlex.join(["rarefy", "evaluate", model, "--metric", "perplexity", "--data", "FILE"]))
    return tuple(commands)


def samples_text(info: CalibrationInfo) -> str:
    """Return how much calibration data there was: windows of tokens, or batches of example inputs."""
    if info.sequence_length == 0:
        return f"{info.num_samples} batches of example inputs"
    return f"{info.num_samples} windows of {info.sequence_length} tokens"


def split_block(name: str) -> tuple[int, str] | None:
    """Split "model.layers.3.mlp.up_proj" into (3, "mlp.up_proj"); None where the name has no block number."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) < 6:
            rest = ".".join(parts[index + 1 :])
            return (int(part), rest) if rest else None
    return None


def _is_same(before: Spread, after: Spread, kind: Kind) -> bool:
    if kind != "quality" and before.num_runs > 1 and after.num_runs > 1:
        return before.low <= after.high and after.low <= before.high
    scale = max(abs(before.median), abs(after.median))
    return abs(before.median - after.median) <= _SAME_WITHIN[kind] * scale


def _change_words(metric: Metric, kind: Kind, before: float, after: float, outcome: Outcome) -> str:
    if before <= 0 or after <= 0:
        return f"{after - before:+.4g}"
    ratio = max(before, after) / min(before, after)
    if kind == "size":
        return f"{format_ratio(ratio)} {'smaller' if after < before else 'larger'}"
    if kind == "speed":
        return f"{format_ratio(ratio)} {'faster' if outcome == 'better' else 'slower'}"
    if metric.unit == "fraction":
        return f"{(after - before) * 100:+.1f} points"
    if metric.higher_is_better:
        return f"{after - before:+.4f}"
    return f"{'+' if after > before else '-'}{format_percent(abs(after / before - 1))}"


def _error_words(paired: PairedDifference) -> str:
    if paired.unit == NATS:
        return format_percent(math.exp(min(paired.mean, 700.0)) * paired.standard_error)
    return f"{paired.standard_error:.4f}"


def format_ratio(ratio: float) -> str:
    """Return a ratio of at least one, such as "5.1x" or "1.04x"."""
    return f"{ratio:.0f}x" if ratio >= 99.5 else f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x"


def _from_to(metric: Metric, joiner: str = " to ") -> str:
    before, after = metric.before, metric.after
    assert before is not None
    assert after is not None
    if metric.unit in {"bytes", "fraction"}:
        return f"{format_value(before.median, metric.unit)}{joiner}{format_value(after.median, metric.unit)}"
    return f"{format_number(before.median)}{joiner}{format_value(after.median, metric.unit)}"
