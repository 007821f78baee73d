"""The verdict of a run for a terminal: before and after side by side, warnings, untouched layers.

It is laid out for 80 columns and needs neither colour nor a terminal: rich leaves both out in a pipe.
"""

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rarefy.core.results import RunReport, Spread
from rarefy.report.facts import Change, changes, group_untouched, headline, paired_note, totals, warnings
from rarefy.report.units import format_bytes, format_number, format_percent, format_range, format_value, printable

_STYLES = {"better": "green", "worse": "red", "same": "", "unknown": "dim"}
_MAX_NAMES = 3
_MAX_GROUPS = 12


def render_verdict(report: RunReport) -> RenderableType:
    """Return the verdict as a rich renderable.

    Args:
        report: The facts of one run.

    Returns:
        The headline, the table of metrics, the plain warnings and notes, the totals and the untouched layers.
    """
    parts: list[RenderableType] = [Text(printable(headline(report)) + ".", style="bold"), Text()]
    compared = changes(report)
    if compared:
        parts += [_metric_table(compared), Text()]
    if paired_note(report):
        parts += [Text(paired_note(report), style="dim"), Text()]
    notes = warnings(report)
    if notes:
        parts += [_hanging("warning: ", note, "yellow") for note in notes]
        parts.append(Text())
    if report.notes:
        parts += [_hanging("note: ", note, "dim") for note in report.notes]
        parts.append(Text())
    total = totals(report)
    if total.num_layers:
        parts.append(
            Text(
                f"Compressed: {total.num_layers} layers, {format_bytes(total.dense_bytes)} to "
                f"{format_bytes(total.packed_bytes)}, {format_percent(total.sparsity)} zeros, "
                f"{format_number(total.bits_per_weight)} stored bits per weight."
            )
        )
    parts += _untouched_lines(report)
    return Group(*parts)


def _metric_table(compared: tuple[Change, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("change")
    for change in compared:
        unit = change.metric.unit
        title = change.title if unit in {"bytes", "fraction", ""} else f"{change.title}, {unit}"
        table.add_row(
            Text(printable(title)),
            _cell(change.metric.before, unit),
            _cell(change.metric.after, unit),
            Text(change.text, style=_STYLES[change.outcome]),
        )
    return table


def _cell(spread: Spread | None, unit: str) -> Text:
    if spread is None:
        return Text("not measured", style="dim")
    text = Text(format_value(spread.median, unit if unit in {"bytes", "fraction"} else ""))
    if spread.num_runs > 1 and spread.low != spread.high:
        text.append(f"\n{format_range(spread, unit)}", style="dim")
    return text


def _untouched_lines(report: RunReport) -> list[RenderableType]:
    groups = group_untouched(report.untouched)
    if not groups:
        return [Text("Untouched: none.")]
    lines: list[RenderableType] = [Text(f"Untouched: {len(report.untouched)} layers.")]
    for group in groups[:_MAX_GROUPS]:
        names = ", ".join(group.names[:_MAX_NAMES])
        if len(group.names) > _MAX_NAMES:
            names += f" and {len(group.names) - _MAX_NAMES} more"
        text = f"{len(group.names)} {group.kind}, {format_bytes(group.num_bytes)}: {group.reason} ({names})"
        lines.append(_hanging("  ", text, ""))
    if len(groups) > _MAX_GROUPS:
        lines.append(Text(f"  and {len(groups) - _MAX_GROUPS} more groups, all of them in the report"))
    return lines


def _hanging(mark: str, text: str, style: str) -> RenderableType:
    """Return `text` after `mark`, with the wrapped lines indented below the text."""
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(mark, style=style), Text(printable(text), style=style))
    return Padding(grid, 0, expand=False)
