import pytest

from rarefy.core.results import Spread
from rarefy.report import units


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (93_400_000, "93.4 MB"),
        (1_234_000_000, "1.23 GB"),
        (float("nan"), "not finite"),
    ],
)
def test_format_bytes(num_bytes: float, text: str) -> None:
    assert units.format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.0, "0 %"),
        (0.5, "50 %"),
        (0.375, "37.5 %"),
        (0.00042, "0.042 %"),
        (0.9996, "100 %"),
        (2.5, "250 %"),
        (float("inf"), "not finite"),
    ],
)
def test_format_percent(fraction: float, text: str) -> None:
    assert units.format_percent(fraction) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (2, "2"),
        (0.82034, "0.8203"),
        (3.375, "3.375"),
        (26.04, "26.04"),
        (475.25, "475.2"),
        (3583.4, "3583"),
        (12345678, "12,345,678"),
        (0.00012, "1.20e-04"),
        (-26.04, "-26.04"),
        (float("nan"), "not finite"),
    ],
)
def test_format_number(value: float, text: str) -> None:
    assert units.format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert units.format_seconds(seconds) == text


def test_counts_are_shown_as_model_names_do() -> None:
    assert units.format_count(134_515_008) == "134.5M"
    assert units.format_count(999_960) == "1.0M"
    assert units.format_count(420) == "420"


def test_a_spread_shows_its_range_only_where_there_is_one() -> None:
    assert units.format_spread(None, "bytes") == "not measured"
    assert units.format_spread(Spread(5.0, 5.0, 5.0, 1), "ms") == "5.000 ms"
    assert units.format_spread(Spread(5.0, 4.0, 6.0, 3), "ms") == "5.000 ms (4.000 to 6.000)"
    assert units.format_spread(Spread(5e6, 4e6, 6e6, 3), "bytes") == "5.00 MB (4.00 MB to 6.00 MB)"


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert units.printable("a\x1b[31mb\x07\r\x9bc\né") == "a?[31mb???c\né"
