import pickle

import pytest

from rarefy.core import errors


def test_message_says_where_what_allowed_and_hint():
    error = errors.PatternError("layer a.b", "input axis 3", allowed="4 and up", hint="exclude it")
    assert str(error) == "layer a.b: input axis 3; allowed: 4 and up; hint: exclude it"
    assert str(errors.LayoutError("x", "y")) == "x: y"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("RarefyError", 1),
        ("UsageError", 2),
        ("RecipeError", 2),
        ("PathError", 2),
        ("CalibrationError", 2),
        ("UnsupportedModelError", 2),
        ("PatternError", 2),
        ("DamagedFileError", 1),
        ("LayoutError", 1),
        ("NonFiniteError", 1),
        ("OutputError", 1),
    ],
)
def test_exit_codes(name, code):
    cls = getattr(errors, name)
    assert cls.exit_code == code
    assert issubclass(cls, errors.RarefyError)


def test_survives_a_worker_process():
    error = errors.RecipeError("line 3", "x", allowed="y", hint="z")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.RecipeError
    assert (str(again), again.hint) == (str(error), "z")
