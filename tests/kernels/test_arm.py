"""The kernels for ARM, cross-compiled and run in an emulator: what `make test-arm` runs."""

import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = "aarch64-linux-gnu-g++"
WARNINGS_FAIL = ("-std=c++17", "-Wall", "-Wextra", "-Werror")
PROGRAMS = sorted(f"{source.parent.name}_{source.stem}" for source in ROOT.glob("native/*/*test.cc"))


@pytest.fixture(scope="module")
def programs(tool: Callable[..., str], run_cmake: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the C++ tests for ARM."""
    tool(COMPILER, "Debian: g++-aarch64-linux-gnu")
    folder = tmp_path_factory.mktemp("arm")
    toolchain = f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'native/aarch64.cmake'}"
    run_cmake("-S", ROOT, "-B", folder, toolchain, "-DRAREFY_BUILD_TESTS=ON", "-DCMAKE_CXX_FLAGS=-Werror")
    run_cmake("--build", folder, "--parallel", "2")
    assert sorted(path.name for path in folder.glob("*_test")) == PROGRAMS
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(("cpu", "isas"), [("max", "reference neon"), ("cortex-a53", "reference")])
def test_cpp_tests_in_an_emulator(
    programs: Path, tool: Callable[..., str], run_program: Callable[..., str], program: str, cpu: str, isas: str
) -> None:
    """On a CPU with the dot product, and on one without, which must not meet a single instruction of it."""
    output = run_program(tool("qemu-aarch64", "Debian: qemu-user"), "-cpu", cpu, programs / program)
    if program.startswith(("matmul_", "ops_")):
        assert f"on {isas}\n" in output, output


@pytest.mark.slow
def test_the_bindings_compile(tool: Callable[..., str]) -> None:
    """With this machine's Python headers, which say the same on both processors."""
    compiler = tool(COMPILER, "Debian: g++-aarch64-linux-gnu")
    nanobind = pytest.importorskip("nanobind")
    headers = [f"-isystem{path}" for path in (nanobind.include_dir(), sysconfig.get_path("include"))]
    options = [*WARNINGS_FAIL, "-fsyntax-only", "-DRAREFY_ARM=1", "-DRAREFY_X86=0", f"-I{ROOT / 'native'}", *headers]
    sources = [ROOT / "native/module.cc", *sorted(ROOT.glob("native/*/bind.cc"))]
    assert len(sources) > 1
    for source in sources:
        run = subprocess.run([compiler, *options, str(source)], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-4000:]
