"""AMX is used only where it proves itself, on whatever machine: here AVX-512 or a fault stands in for the tiles."""

from types import SimpleNamespace

import numpy as np
import pytest

from rarefy.core.grids import from_bf16_bits
from rarefy.kernels import extension
from rarefy.kernels.tiles import tiles_agree


class _Module:
    """An extension whose every product is right but for a fault in those through tiles."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def cpu_flags(self):
        return {"avx2": True, "amx_tile": True, "amx_int8": True, "amx_bf16": True}

    def prepare(self, format, isa, num_outputs, num_inputs, integers, arrays):
        if "codes" in arrays:
            zero_points = np.float32(arrays.get("zero_points", 128))
            weight = (arrays["codes"].astype(np.float32) - zero_points) * from_bf16_bits(arrays["scales"])
        else:
            weight = from_bf16_bits(arrays["values"])
        assert weight.shape == (num_outputs, num_inputs)
        return SimpleNamespace(weight=weight, faulty=isa == "amx" and self._fault == format)

    def matmul(self, x, weights, outputs):
        for weight, y in zip(weights, outputs, strict=True):
            y[:] = x @ weight.weight.T
            if weight.faulty:
                y[3, 5] += 0.01


def test_right_products_agree():
    assert tiles_agree(_Module(""))


@pytest.mark.parametrize(
    "fault", ["dense-int8-v1", "block-int8-v1", "dense-bf16-v1", "bitmask-bf16-v1", "block-bf16-v1"]
)
def test_one_wrong_number_is_enough(fault):
    assert not tiles_agree(_Module(fault))


@pytest.mark.parametrize("fault", ["", "dense-int8-v1"])
def test_a_cpu_whose_tiles_are_wrong_is_one_without(fault, monkeypatch, recwarn):
    monkeypatch.setattr(extension, "_import", lambda: (_Module(fault), ""))
    flags = extension.detect_cpu.__wrapped__()
    assert flags.avx2
    assert flags.amx_tile is flags.amx_int8 is flags.amx_bf16 is (not fault)
    assert ["AMX gives other products" in str(warning.message) for warning in recwarn] == [True] * bool(fault)


def test_what_the_check_multiplies_is_accepted_by_the_extension():
    module = extension.native()
    if module is None or not extension.detect_cpu().avx512_vnni:
        pytest.skip("no AVX-512 here")
    real = SimpleNamespace(
        prepare=lambda format, isa, *rest: module.prepare(format, "avx512", *rest), matmul=module.matmul
    )
    assert tiles_agree(real)
