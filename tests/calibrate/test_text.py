"""Calibration text: reading, windows, seeds, and errors that name the line or the field."""

import json

import pytest
import torch

from rarefy.calibrate.text import default_text, make_windows, read_text, special_tokens_around
from rarefy.core.errors import CalibrationError, PathError


class Words:
    """A tokenizer whose ids are the numbers that the text is made of."""

    def __init__(self, prefix=(), suffix=()):
        self.prefix, self.suffix = list(prefix), list(suffix)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [int(word) if word.isdigit() else 7 for word in text.split()]
        return {"input_ids": self.prefix + ids + self.suffix if add_special_tokens else ids}


def _windows(text, *, tokenizer=None, samples=4, length=5, held_out=2, seed=0):
    return make_windows(
        text,
        tokenizer or Words(),
        source="here",
        num_samples=samples,
        sequence_length=length,
        num_held_out=held_out,
        seed=seed,
    )


NUMBERS = " ".join(map(str, range(203)))


def test_windows_are_consecutive_tokens_without_overlap_and_drawn_once():
    windows = _windows(NUMBERS, samples=30, held_out=4)
    rows = torch.cat([windows.samples_NL, windows.held_out_NL])
    assert windows.samples_NL.shape == (30, 5)
    assert windows.held_out_NL.shape == (4, 5)
    assert sorted(row[0].item() for row in rows) == sorted({row[0].item() for row in rows})
    for row in rows:
        assert row[0] % 5 == 0
        assert row.tolist() == list(range(row[0], row[0] + 5))


def test_the_seed_decides():
    assert torch.equal(_windows(NUMBERS).samples_NL, _windows(NUMBERS).samples_NL)
    assert not torch.equal(_windows(NUMBERS).samples_NL, _windows(NUMBERS, seed=1).samples_NL)
    in_order = _windows(NUMBERS, seed=None, held_out=0).samples_NL
    assert in_order.flatten().tolist() == list(range(20))


def test_special_tokens_are_part_of_every_window():
    tokenizer = Words(prefix=[900], suffix=[901, 902])
    assert special_tokens_around(tokenizer) == ([900], [901, 902])
    windows = _windows(NUMBERS, tokenizer=tokenizer, length=8)
    for row in windows.samples_NL.tolist():
        assert row[0] == 900
        assert row[-2:] == [901, 902]
        assert row[1:6] == list(range(row[1], row[1] + 5))
    with pytest.raises(CalibrationError, match="sequence_length"):
        _windows(NUMBERS, tokenizer=tokenizer, length=3)


def test_short_text_uses_what_there_is_and_says_so():
    windows = _windows(NUMBERS, samples=100)
    assert len(windows.samples_NL) == 38
    assert len(windows.held_out_NL) == 2
    assert windows.info.num_samples == 38
    assert windows.info.num_tokens == 38 * 5
    assert "fewer than the 100" in windows.info.note
    one = _windows("1 2 3 4 5 6")
    assert len(one.samples_NL) == 1
    assert len(one.held_out_NL) == 0
    two = _windows("1 2 3 4 5 6 7 8 9 10")
    assert (len(two.samples_NL), len(two.held_out_NL)) == (1, 1)
    with pytest.raises(CalibrationError, match="4 tokens"):
        _windows("1 2 3 4")


def test_the_choice_of_samples_does_not_depend_on_how_many_are_held_out():
    assert torch.equal(_windows(NUMBERS, held_out=0).samples_NL, _windows(NUMBERS, held_out=4).samples_NL)


def test_plain_text_json_lines_and_directories(tmp_path):
    (tmp_path / "a.txt").write_text("plain", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": "one", "title": "x"}) + "\n\n" + json.dumps({"text": "two"}) + "\n", encoding="utf-8"
    )
    (tmp_path / "c.ndjson").write_text('{"sentence": "three", "label": 1}\n"four"\n', encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xff")
    assert read_text(tmp_path / "a.txt") == "plain"
    assert read_text(tmp_path / "b.jsonl") == "one\n\ntwo"
    assert read_text(tmp_path / "c.ndjson") == "three\n\nfour"
    assert read_text(tmp_path) == "plain\n\none\n\ntwo\n\nthree\n\nfour"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", '{"text": "x"}\n{"title": "a", "body": "b"}\n', r"a\.jsonl:2.*'title', 'body'.*\"text\""),
        ("a.jsonl", '{"label": 3}\n', r"a\.jsonl:1.*'label'"),
        ("a.jsonl", "{broken\n", r"a\.jsonl:1.*not a JSON line"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1.*list"),
        ("a.txt", " \n\n", "no text"),
    ],
)
def test_bad_text_is_refused_with_its_place(tmp_path, name, content, match):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CalibrationError, match=match):
        read_text(tmp_path / name)


def test_missing_empty_and_binary_sources(tmp_path):
    with pytest.raises(PathError, match="no such file"):
        read_text(tmp_path / "nothing.txt")
    with pytest.raises(CalibrationError, match="without text files"):
        read_text(tmp_path)
    (tmp_path / "latin.txt").write_bytes("häuser".encode("latin-1"))
    with pytest.raises(CalibrationError, match="UTF-8"):
        read_text(tmp_path / "latin.txt")


def test_the_default_text_is_long_english_and_the_same_every_time():
    text = default_text()
    assert text == default_text()
    # 128 windows of 512 tokens are 65 thousand tokens, about four characters each
    assert len(text) > 500_000
    assert text.count(" the ") > 5_000
