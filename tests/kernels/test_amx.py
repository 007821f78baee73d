"""The AMX kernels, whose tiles are emulated: on every CPU with AVX-512."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rarefy import kernels

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(f"matmul_{source.stem}" for source in ROOT.glob("native/matmul/*test.cc"))


@pytest.mark.slow
def test_cpp_tests_with_emulated_tiles(
    cxx_compiler: str, run_cmake: Callable[..., str], run_program: Callable[..., str], tmp_path: Path
) -> None:
    """Proves the logic of the kernels against the oracles, not that a processor runs them."""
    if "avx512" not in kernels.runnable_isas(kernels.detect_cpu()):
        pytest.skip("the emulation needs AVX-512")
    # The passes of AVX-VNNI, which no other pass needs, are tested where a CPU has them: by the build under sanitizers.
    options = ["-DRAREFY_BUILD_TESTS=ON", "-DRAREFY_EMULATE_AMX=ON", "-DRAREFY_HAS_AVX_VNNI=OFF"]
    if "RAREFY_HAS_AMX - Failed" in run_cmake("-S", ROOT, "-B", tmp_path, *options):
        pytest.skip("the compiler knows no AMX")
    run_cmake("--build", tmp_path, "--parallel", "2", "--target", *PROGRAMS)
    assert PROGRAMS
    for program in PROGRAMS:
        assert " amx\n" in run_program(tmp_path / program)
