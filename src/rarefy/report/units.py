"""Numbers as people read them: bytes, counts, percentages, durations, measured values with their spread.

Byte units are decimal (1 MB = 1,000,000 bytes), as file managers and model hubs show them.
"""

import math
import unicodedata

from rarefy.core.results import Spread

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNT_UNITS = ("", "K", "M", "B", "T")


def format_bytes(num_bytes: float) -> str:
    """Return `num_bytes` with a decimal unit and three significant digits, such as "93.4 MB"."""
    return _scaled(num_bytes, _BYTE_UNITS, " ")


def format_count(count: float) -> str:
    """Return a count in the short form of model names, such as "134.5M"."""
    if abs(count) < 1000:
        return f"{count:g}"
    value, index = float(count), 0
    while abs(value) >= 999.95 and index < len(_COUNT_UNITS) - 1:
        value, index = value / 1000, index + 1
    return f"{value:.1f}{_COUNT_UNITS[index]}"


def format_percent(fraction: float) -> str:
    """Return a fraction as a percentage: "50 %", "37.5 %", "0.04 %"."""
    if not math.isfinite(fraction):
        return "not finite"
    percent = fraction * 100
    if percent == 0 or abs(percent) >= 99.95 or abs(percent - round(percent)) < 0.05 <= abs(percent):
        return f"{percent:.0f} %"
    return f"{percent:.1f} %" if abs(percent) >= 1 else f"{percent:.2g} %"


def format_number(value: float) -> str:
    """Return a plain number with about four significant digits and no exponent in the everyday range."""
    if not math.isfinite(value):
        return "not finite"
    magnitude = abs(value)
    if isinstance(value, int) and magnitude < 10_000:
        return str(value)
    if magnitude == 0:
        return "0"
    if magnitude >= 10_000:
        return f"{value:,.0f}"
    if magnitude >= 1000:
        return f"{value:.0f}"
    if magnitude >= 100:
        return f"{value:.1f}"
    if magnitude >= 10:
        return f"{value:.2f}"
    if magnitude >= 0.01:
        return f"{value:.4f}" if magnitude < 1 else f"{value:.3f}"
    return f"{value:.2e}"


def format_seconds(seconds: float) -> str:
    """Return a duration: "0.4 s", "12 s", "3 min 05 s", "2 h 10 min"."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_value(value: float, unit: str) -> str:
    """Return a measured value in its unit; bytes are scaled, fractions become percentages."""
    if unit == "bytes":
        return format_bytes(value)
    if unit == "fraction":
        return format_percent(value)
    text = format_number(value)
    return f"{text} {unit}" if unit else text


def format_spread(spread: Spread | None, unit: str) -> str:
    """Return the median, with the lowest and highest run in brackets where there were several."""
    if spread is None:
        return "not measured"
    text = format_value(spread.median, unit)
    if spread.num_runs < 2 or spread.low == spread.high:
        return text
    return f"{text} ({format_range(spread, unit)})"


def format_range(spread: Spread, unit: str) -> str:
    """Return the lowest and highest run, such as "17.65 to 18.75"; the unit stays away unless it scales the figure."""
    scaled = unit if unit in {"bytes", "fraction"} else ""
    return f"{format_value(spread.low, scaled)} to {format_value(spread.high, scaled)}"


def _scaled(value: float, units: tuple[str, ...], gap: str) -> str:
    if not math.isfinite(value):
        return "not finite"
    scaled, index = float(value), 0
    while abs(scaled) >= 999.5 and index < len(units) - 1:
        scaled, index = scaled / 1000, index + 1
    if index == 0:
        return f"{scaled:.0f}{gap}{units[0]}"
    digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{digits}f}{gap}{units[index]}"


def printable(text: str) -> str:
    """Return `text` without control characters: a checkpoint's names must not drive the reader's terminal."""
    return "".join(char if char == "\n" or unicodedata.category(char) != "Cc" else "?" for char in text)
