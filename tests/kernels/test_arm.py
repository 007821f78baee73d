"""The kernels for ARM, cross-compiled and run in an emulator: what `make test-arm` runs."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = "aarch64-linux-gnu-g++"
WARNINGS_FAIL = ("-std=c++17", "-Wall", "-Wextra", "-Werror")


def find(program: str, package: str) -> str:
    found = shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{program} is missing ({package})")
    return found


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the C++ tests for ARM."""
    find(COMPILER, "Debian: g++-aarch64-linux-gnu")
    cmake = find("cmake", "pip install cmake")
    folder = tmp_path_factory.mktemp("arm")
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'native/aarch64.cmake'}"
    options = ["-DRAREFY_BUILD_TESTS=ON", "-DCMAKE_CXX_FLAGS=-Werror"]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), toolchain, *options],
        [cmake, "--build", str(folder), "--parallel", "2"],
    ):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("cpu", "isas"), [("max", "reference neon"), ("cortex-a53", "reference")])
def test_cpp_tests_in_an_emulator(programs: Path, cpu: str, isas: str) -> None:
    """On a CPU with the dot product, and on one without, which must not meet a single instruction of it."""
    emulator = find("qemu-aarch64", "Debian: qemu-user")
    for program in sorted(programs.glob("*_test")):
        run = subprocess.run([emulator, "-cpu", cpu, str(program)], capture_output=True, text=True, check=False)
        assert run.returncode == 0, f"{program.name}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        if program.name in ("matmul_test", "ops_test", "recurrent_test"):
            assert f"on {isas}\n" in run.stdout, run.stdout


@pytest.mark.slow
def test_the_bindings_compile() -> None:
    """With this machine's Python headers, which say the same on both processors."""
    compiler = find(COMPILER, "Debian: g++-aarch64-linux-gnu")
    nanobind = pytest.importorskip("nanobind")
    headers = [f"-isystem{path}" for path in (nanobind.include_dir(), sysconfig.get_path("include"))]
    options = [*WARNINGS_FAIL, "-fsyntax-only", "-DRAREFY_ARM=1", "-DRAREFY_X86=0", f"-I{ROOT / 'native'}", *headers]
    sources = [ROOT / "native/module.cc", *sorted(ROOT.glob("native/*/bind.cc"))]
    assert len(sources) > 1
    for source in sources:
        run = subprocess.run([compiler, *options, str(source)], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-4000:]
