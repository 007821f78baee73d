"""The conformance suite must fail a layout that breaks any one promise."""

import dataclasses

import numpy as np
import pytest

from rarefy.core.errors import LayoutError
from rarefy.layouts import base
from rarefy.testing import check_layout


@dataclasses.dataclass(frozen=True, eq=False)
class Good:
    """float32 under the name "good-v1", with a flag that means nothing."""

    values: np.ndarray
    flag: bool = False

    format = "good-v1"
    shape = property(lambda self: tuple(self.values.shape))
    nbytes = property(lambda self: self.values.nbytes)

    def to_dense(self):
        return self.values.copy()

    def rows(self, indices):
        return self.values[indices]

    def arrays(self):
        return {"values": self.values}

    def meta(self):
        return {"shape": list(self.shape), "flag": self.flag}

    @classmethod
    def array_spec(cls, format, meta):
        base.check_format(format, "good-v1")
        shape = base.read_shape(format, meta, "flag")
        if type(meta["flag"]) is not bool:
            raise LayoutError(format, "flag")
        return {"values": (base.FLOAT32, shape)}

    @classmethod
    def from_arrays(cls, format, meta, arrays):
        return cls(base.check_arrays(format, cls.array_spec(format, meta), arrays)["values"], meta["flag"])


VALUES = np.arange(1, 13, dtype=np.float32).reshape(3, 4)


class WrongBytes(Good):
    nbytes = property(lambda self: 1)


class WrongShapeInMeta(Good):
    def meta(self):
        return {**super().meta(), "shape": [4, 3]}


class MetaIsNoJson(Good):
    def meta(self):
        return {"shape": self.shape, "flag": self.flag}


class FormatInMeta(Good):
    def meta(self):
        return {**super().meta(), "format": self.format}


class WrongDtype(Good):
    def to_dense(self):
        return self.values.astype(np.float64)


class Aliased(Good):
    def to_dense(self):
        return self.values


class NotFinite(Good):
    def to_dense(self):
        return self.values * np.float32(np.nan)


class OtherSpec(Good):
    @classmethod
    def array_spec(cls, format, meta):
        return {"other": (base.FLOAT32, super().array_spec(format, meta)["values"][1])}


class OtherDtypeInSpec(Good):
    @classmethod
    def array_spec(cls, format, meta):
        return {"values": (base.UINT16, super().array_spec(format, meta)["values"][1])}


class LosesTheFlag(Good):
    @classmethod
    def from_arrays(cls, format, meta, arrays):
        return cls(super().from_arrays(format, meta, arrays).values)


class ChangesAnArray(Good):
    @classmethod
    def from_arrays(cls, format, meta, arrays):
        return cls(super().from_arrays(format, meta, arrays).values + 1, meta["flag"])


class WrongRows(Good):
    def rows(self, indices):
        return self.values[indices] * 2


class AnyFlag(Good):
    @classmethod
    def array_spec(cls, format, meta):
        return super().array_spec(format, {**meta, "flag": True})


class AnyFormat(Good):
    @classmethod
    def array_spec(cls, format, meta):
        return super().array_spec("good-v1", meta)


class AnyArrays(Good):
    @classmethod
    def from_arrays(cls, format, meta, arrays):
        known = {name: array for name, array in arrays.items() if name == "values"}
        return super().from_arrays(format, meta, known)


class OtherError(Good):
    @classmethod
    def from_arrays(cls, format, meta, arrays):
        if "values" not in arrays:
            raise KeyError("values")
        return super().from_arrays(format, meta, arrays)


def test_a_good_layout_passes():
    check_layout(Good(VALUES.copy()))
    check_layout(Good(VALUES.copy(), flag=True))


@pytest.mark.parametrize(
    ("cls", "promise"),
    [
        (WrongBytes, "nbytes"),
        (WrongShapeInMeta, "shape"),
        (MetaIsNoJson, "plain JSON"),
        (FormatInMeta, "repeats the format"),
        (WrongDtype, "float32"),
        (Aliased, "access to the stored arrays"),
        (NotFinite, "finite"),
        (OtherSpec, "different arrays"),
        (OtherDtypeInSpec, "as array_spec"),
        (LosesTheFlag, "another format or meta"),
        (ChangesAnArray, "changes an array"),
        (WrongRows, r"rows\(\)"),
        (AnyFlag, "metadata without flag|flag = .* is accepted"),
        (AnyFormat, "unknown format is accepted"),
        (AnyArrays, "unknown array is accepted"),
        (OtherError, "raises KeyError"),
    ],
)
def test_every_broken_promise_is_noticed(cls, promise):
    with pytest.raises(AssertionError, match=promise):
        check_layout(cls(VALUES.copy(), flag=True))
