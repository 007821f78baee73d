"""The AMX kernels, whose tiles are emulated: on every CPU with AVX-512."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rarefy import kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_cpp_tests_with_emulated_tiles(tmp_path: Path) -> None:
    """Proves the logic of the kernels against the oracles, not that a processor runs them."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None or not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler or no cmake")
    if "avx512" not in kernels.runnable_isas(kernels.detect_cpu()):
        pytest.skip("the emulation needs AVX-512")
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DRAREFY_BUILD_TESTS=ON", "-DRAREFY_EMULATE_AMX=ON"]
    configured = subprocess.run(configure, check=True, capture_output=True, text=True)
    if "RAREFY_HAS_AMX - Failed" in configured.stdout:
        pytest.skip("the compiler knows no AMX")
    build = [cmake, "--build", str(tmp_path), "--parallel", "2", "--target", "matmul_test"]
    subprocess.run(build, check=True, capture_output=True)
    run = subprocess.run([str(tmp_path / "matmul_test")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    assert " amx\n" in run.stdout, run.stdout
