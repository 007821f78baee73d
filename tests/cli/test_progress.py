from types import SimpleNamespace

import pytest

from rarefy.cli.progress import ProgressDisplay


def test_without_a_terminal_progress_is_lines_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([100.0, 101.0, 120.0, 125.0, 140.0])
    monkeypatch.setattr("rarefy.cli.progress.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with ProgressDisplay() as display:
        display("compress", 1, 4, "model.layers.0")
        display("compress", 2, 4, "model.layers.1")
        display("compress", 3, 4, "model.layers.2")
        display("compress", 4, 4)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "compress: 2/4, 20 s, about 20 s left",
        "compress: 4/4, 40 s",
    ]


def test_it_can_be_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(enabled=False) as display:
        display("compress", 1, 1)
    assert capsys.readouterr().err == ""
