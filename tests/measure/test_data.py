from pathlib import Path

import pytest

from rarefy.core.errors import PathError, UsageError
from rarefy.measure.data import Labelled, Pair, read_labelled, read_pairs, read_text


def put(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_pairs_in_every_form(tmp_path: Path) -> None:
    expected = [Pair("a, b", "c", 2.5), Pair('say "d"', "e", 0.0)]
    for name, content in {
        "plain.csv": '"a, b",c,2.5\n"say ""d""",e,0\n',
        "header.csv": 'score,Sentence2,sentence1\n2.5,c,"a, b"\n0,e,"say ""d"""\n',
        "plain.tsv": 'a, b\tc\t2.5\nsay "d"\te\t0\n',
        "lines.jsonl": '{"sentence1": "a, b", "sentence2": "c", "score": 2.5}\n\n'
        '{"text1": "say \\"d\\"", "text2": "e", "score": "0"}\n',
    }.items():
        assert read_pairs(put(tmp_path, name, content)) == expected, name


def test_labels(tmp_path: Path) -> None:
    # an unpaired quote is an ordinary character in tab-separated data
    assert read_labelled(put(tmp_path, "a.tsv", 'a "quote\t1\nb\t0\n')) == [
        Labelled('a "quote', "1"),
        Labelled("b", "0"),
    ]
    assert read_labelled(put(tmp_path, "b.csv", "label,text\nneg,b\n")) == [Labelled("b", "neg")]
    # one word that is also a column's name is no header
    assert read_labelled(put(tmp_path, "c.csv", "text,1\n")) == [Labelled("text", "1")]


def test_text(tmp_path: Path) -> None:
    assert read_text(put(tmp_path, "a.txt", " = Title = \n\nbody\n")) == " = Title = \n\nbody\n"
    assert read_text(put(tmp_path, "a.jsonl", '{"text": "one"}\n{"text": "two"}\n')) == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "no rows"),
        ("a.csv", "sentence1,sentence2,score\n", "no rows"),
        ("a.csv", "a,b,3\nc,d,high\n", r"row 2: score 'high'"),
        ("a.csv", "a,b,nan\n", "score 'nan'"),
        ("a.csv", "a,b\n", r"row 1: 2 column\(s\); allowed: the columns sentence1, sentence2, score"),
        ("a.csv", "sentence1,other,score\na,b,1\n", "no column 'sentence2'; it has 'sentence1', 'other', 'score'"),
        ("a.csv", '"a,b,1\n', "not a table"),
        ("a.csv", b"\xff\xfe,b,1\n", "not UTF-8"),
        ("a.xlsx", "x", "extension '.xlsx'"),
        ("a.jsonl", "{]\n", "line 1: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: a list; allowed: an object"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b"}\n', "no field 'score'; it has 'sentence1', 'sentence2'"),
    ],
)
def test_bad_pairs(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_pairs(put(tmp_path, name, content))


def test_bad_text_and_paths(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no text in it"):
        read_text(put(tmp_path, "a.txt", " \n"))
    with pytest.raises(PathError, match="no such file"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(PathError, match="a directory"):
        read_text(tmp_path)
