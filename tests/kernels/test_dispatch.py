"""The choice of kernels: a pure function, tested with CPUs that this machine is not."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rarefy import kernels
from rarefy.core.errors import UsageError
from rarefy.kernels import CpuFlags, Kernel, select
from rarefy.kernels.cpu import last_level_cache_bytes, parse_cpuinfo
from rarefy.kernels.extension import ISAS
from rarefy.layouts import FORMATS

AVX2 = CpuFlags(avx2=True, fma=True, f16c=True, bmi2=True)
AVX_VNNI = CpuFlags(avx2=True, fma=True, f16c=True, bmi2=True, avx_vnni=True)
ARM = CpuFlags(asimddp=True)
AVX512_BF16 = CpuFlags(
    **{name: True for name in CpuFlags.__dataclass_fields__ if not name.startswith("amx") and name != "asimddp"}
)
AVX512 = replace(AVX512_BF16, avx512_bf16=False)
AMX = CpuFlags(**{name: name != "asimddp" for name in CpuFlags.__dataclass_fields__})
COMPILED = frozenset(Kernel("matmul", name, isa) for name in FORMATS for isa in ISAS[1:])


@pytest.mark.parametrize("layout_format", sorted(FORMATS))
def test_the_fastest_that_the_cpu_runs(layout_format: str) -> None:
    def chosen(cpu: CpuFlags, cap: str | None = None) -> str:
        return select("matmul", layout_format, (8, 8), cpu, cap=cap, compiled=COMPILED).isa

    assert chosen(AVX512) == chosen(AVX512_BF16, "avx512") == "avx512"
    assert chosen(AVX512_BF16) == chosen(AMX, "avx512_bf16") == "avx512_bf16"
    assert chosen(AMX) == "amx"
    assert chosen(AMX, "avx512") == "avx512"
    assert chosen(AVX2) == "avx2"
    assert chosen(AVX_VNNI) == chosen(AVX512, "avx_vnni") == "avx_vnni"
    assert chosen(CpuFlags()) == "reference"
    assert chosen(ARM) == "neon"
    assert chosen(ARM, "avx512") == "neon"
    assert chosen(ARM, "reference") == "reference"
    assert chosen(AVX512, "avx2") == "avx2"
    assert chosen(AVX2, "avx512") == "avx2"
    assert chosen(AVX512, "reference") == "reference"
    assert chosen(AVX512, "numpy") == "numpy"


@pytest.mark.parametrize("missing", ["avx512_vbmi2", "avx512_vnni", "avx512vl", "fma"])
def test_one_missing_flag_disables_the_instruction_set(missing: str) -> None:
    flags = {name: getattr(AVX512, name) for name in CpuFlags.__dataclass_fields__}
    cpu = CpuFlags(**{**flags, missing: False})
    expected = "reference" if missing == "fma" else "avx_vnni"
    assert select("matmul", "dense-int8-v1", (8, 8), cpu, compiled=COMPILED).isa == expected


def test_without_compiled_kernels_numpy_runs() -> None:
    assert select("matmul", "dense-int8-v1", (8, 8), AVX512, compiled=frozenset()).isa == "numpy"


def test_impossible_requests() -> None:
    with pytest.raises(UsageError, match="allowed: matmul"):
        select("conv", "dense-int8-v1", (8, 8), AVX2, compiled=COMPILED)
    with pytest.raises(UsageError, match="allowed: numpy, reference, neon, avx2, avx_vnni, avx512, avx512_bf16, amx"):
        select("matmul", "dense-int8-v1", (8, 8), AVX2, cap="sse9", compiled=COMPILED)
    with pytest.raises(UsageError):
        select("matmul", "dense-int8-v1", (-1, 8), AVX2, compiled=COMPILED)


def test_every_format_has_a_kernel_of_every_compiled_instruction_set() -> None:
    if not kernels.compiled_kernels():
        pytest.skip("the extension is not built")
    isas = {kernel.isa for kernel in kernels.compiled_kernels()}
    assert "reference" in isas
    assert kernels.compiled_kernels() == {Kernel("matmul", name, isa) for name in FORMATS for isa in isas}


def test_isa_variable(monkeypatch: pytest.MonkeyPatch, weight) -> None:
    layout = weight("dense-int8-v1", 3, 5).layout
    monkeypatch.setenv("RAREFY_ISA", "numpy")
    assert kernels.prepare(layout).isa == "numpy"
    assert kernels.describe_cpu()["isa_cap"] == "numpy"
    monkeypatch.setenv("RAREFY_ISA", "sse9")
    with pytest.raises(
        UsageError, match=r"RAREFY_ISA.*allowed: numpy, reference, neon, avx2, avx_vnni, avx512, avx512_bf16, amx"
    ):
        kernels.prepare(layout)


def test_flags_from_cpuinfo() -> None:
    text = "processor\t: 0\nmodel name\t: some CPU\nflags\t\t: fpu avx2 fma f16c bmi2 avx512f avx512_vnni\n"
    assert parse_cpuinfo(text).names() == ("avx2", "fma", "f16c", "bmi2", "avx512f", "avx512_vnni")
    assert parse_cpuinfo("Features : fp asimd\n") == CpuFlags()
    assert parse_cpuinfo("Features\t: fp asimd asimddp\n") == ARM
    cpuinfo = Path("/proc/cpuinfo")
    if kernels.extension_status()[0] and cpuinfo.exists() and "flags" in cpuinfo.read_text(encoding="utf-8"):
        assert parse_cpuinfo(cpuinfo.read_text(encoding="utf-8")) == kernels.detect_cpu()


def test_missing_extension_gives_one_warning() -> None:
    """In a fresh interpreter in which the extension cannot be imported."""
    program = """
import sys, warnings
sys.modules["rarefy._native"] = None
import numpy as np
from rarefy import kernels
from rarefy.core.solution import Solution
from rarefy.layouts import pack
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    weight = np.eye(3, 4, dtype=np.float32)
    for _ in range(3):
        y = kernels.matmul(np.arange(4.0), pack(Solution.dense(weight)))
        kernels.set_num_threads(2)
    assert kernels.describe_cpu()["extension"] is False
    assert kernels.measure_bandwidth(num_bytes=1 << 20, repeats=1).how == "numpy"
assert y.tolist() == [0.0, 1.0, 2.0], y
assert len(caught) == 1 and caught[0].category is kernels.SlowReferenceWarning, caught
print(caught[0].message)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "numpy reference" in run.stdout


def test_describe_cpu_is_complete() -> None:
    facts = kernels.describe_cpu()
    assert set(facts["chosen"]) == set(FORMATS)
    assert facts["num_threads"] >= 1
    assert facts["extension"] is (facts["extension_error"] == "")


def test_bandwidth_is_a_plausible_number_with_its_range() -> None:
    bandwidth = kernels.measure_bandwidth(num_bytes=16 << 20, repeats=3)
    assert 1e8 < bandwidth.low <= bandwidth.bytes_per_s <= bandwidth.high < 1e13
    assert bandwidth.num_threads == kernels.get_num_threads()
    assert bandwidth.num_bytes == 16 << 20


def test_every_way_of_reading_reads_everything() -> None:
    """The probe itself compares the sum of what it read with what it wrote, and raises where they differ."""
    native = pytest.importorskip("rarefy._native")
    probe = native.BandwidthProbe(16 << 20)
    before = native.num_threads()
    try:
        for num_threads in (1, 3):
            native.set_num_threads(num_threads)
            for num_streams in range(1, 17):
                for prefetch_bytes in (0, 64, 1 << 20):
                    assert probe.read(8 << 20, num_streams, prefetch_bytes) > 0
    finally:
        native.set_num_threads(before)
    for wrong in (
        (8 << 20, 0, 0),
        (8 << 20, 17, 0),
        (8 << 20, 4, -1),
        (8 << 20, 4, 2 << 20),
        (32 << 20, 4, 0),
        (63, 1, 0),
    ):
        with pytest.raises(ValueError, match="BandwidthProbe"):
            probe.read(*wrong)
    for num_bytes in (0, -1, 1 << 41):
        with pytest.raises(ValueError, match="BandwidthProbe"):
            native.BandwidthProbe(num_bytes)


def test_the_last_level_cache_is_the_sum_of_its_instances(tmp_path: Path) -> None:
    assert last_level_cache_bytes(tmp_path) == 32 << 20
    for cpu in range(4):
        for index, (level, size, shared_by) in enumerate(
            ((1, "48K", str(cpu)), (2, "1024K", str(cpu)), (3, "16M", "0-1" if cpu < 2 else "2-3"))
        ):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared_by)):
                (folder / name).write_text(text + "\n")
    assert last_level_cache_bytes(tmp_path) == 32 << 20
    (tmp_path / "cpu0/cache/index2/size").write_text("nonsense\n")
    assert last_level_cache_bytes(tmp_path) == 32 << 20, "the other CPU of the pair still tells it"
    (tmp_path / "cpu1/cache/index2/size").write_text("nonsense\n")
    assert last_level_cache_bytes(tmp_path) == 16 << 20
