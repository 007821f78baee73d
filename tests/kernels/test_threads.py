"""The thread pool: how many threads, and how they get along with forks, other threads and other pools."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rarefy import kernels
from rarefy.core.errors import UsageError
from rarefy.kernels.cpu import available_cpus, cgroup_cpus, default_num_threads

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
needs_extension = pytest.mark.skipif(not kernels.extension_status()[0], reason="the extension is not built")
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity masks")


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "RAREFY_NUM_THREADS"} | environment
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=120)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "257", "٣", "+2", "1_0", "9" * 5000])
def test_wrong_number_of_threads(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("RAREFY_NUM_THREADS", text)
    with pytest.raises(UsageError, match=r"RAREFY_NUM_THREADS.*1 to 256"):
        default_num_threads()


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_NUM_THREADS", " 3 ")
    assert default_num_threads() == 3
    monkeypatch.setenv("RAREFY_NUM_THREADS", "")
    assert default_num_threads() == available_cpus() >= 1


@needs_affinity
def test_the_default_is_what_the_affinity_mask_allows() -> None:
    program = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from rarefy import kernels
print(kernels.get_num_threads(), kernels.available_cpus())
"""
    assert run(program).stdout.split() == ["1", "1"]
    wanted = "3" if kernels.extension_status()[0] else "1"
    assert run(program, RAREFY_NUM_THREADS="3").stdout.split() == [wanted, "1"]


def test_quotas_of_control_groups(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    inner = root / "system.slice" / "our.service"
    inner.mkdir(parents=True)
    assert cgroup_cpus(root, tmp_path / "missing") == float("inf")
    own.write_text("0::/system.slice/our.service\n")
    assert cgroup_cpus(root, own) == float("inf")
    (inner / "cpu.max").write_text("max 100000\n")
    assert cgroup_cpus(root, own) == float("inf")
    (inner.parent / "cpu.max").write_text("250000 100000\n")
    assert cgroup_cpus(root, own) == 2.5, "a group above ours limits us too"
    (inner / "cpu.max").write_text("150000 100000\n")
    assert cgroup_cpus(root, own) == 1.5
    (root / "cpu.max").write_text("100000 100000\n")
    assert cgroup_cpus(root, own) == 1
    own.write_text("0::/not/mounted/here\n")
    assert cgroup_cpus(root, own) == 1
    for nonsense in ("", "nonsense", "0 0", "-1 100000", "1 2 3"):
        (root / "cpu.max").write_text(nonsense)
        assert cgroup_cpus(root, own) == float("inf")


def test_quotas_of_the_older_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("3:cpuset:/other\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\nnonsense\n")
    group = tmp_path / "cpu" / "docker" / "abc"
    group.mkdir(parents=True)
    (group / "cpu.cfs_period_us").write_text("100000\n")
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert cgroup_cpus(tmp_path, own) == float("inf")
    (group / "cpu.cfs_quota_us").write_text("300000\n")
    assert cgroup_cpus(tmp_path, own) == 3


def test_fork_and_join_are_timed() -> None:
    seconds = kernels.measure_fork_join()
    assert seconds is None if not kernels.extension_status()[0] else 0 < seconds < 1


@needs_extension
def test_a_system_that_gives_no_threads() -> None:
    program = """
import re, resource
import numpy as np
from rarefy import kernels
from rarefy.core.solution import Solution
from rarefy.layouts import pack
prepared = kernels.prepare(pack(Solution.dense(np.random.default_rng(0).standard_normal((256, 256), np.float32))))
x = np.ones((8, 256), np.float32)
kernels.set_num_threads(1)
expected = prepared.matmul(x)
kernels.set_num_threads(200)
size = int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20),) * 2)
for _ in range(20):
    assert np.array_equal(prepared.matmul(x), expected)
print(open("/proc/self/status").read().split("Threads:")[1].split()[0])
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the system has no /proc")
    done = run(program, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10


def test_several_python_threads_at_once(weight, num_threads) -> None:
    num_threads(2)
    prepared = kernels.prepare(weight("bitmask-int4-v1", 300, 200).layout)
    x = np.random.default_rng(10).standard_normal((20, 200)).astype(np.float32)
    expected = prepared.matmul(x)
    wrong: list[int] = []

    def work() -> None:
        for i in range(200):
            rows = x[: 1 + i % 20]
            if not np.array_equal(prepared.matmul(rows), expected[: rows.shape[0]]):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_multiply(weight, num_threads) -> None:
    num_threads(2)
    prepared = kernels.prepare(weight("dense-int8-v1", 200, 100).layout)
    x = np.random.default_rng(11).standard_normal((30, 100)).astype(np.float32)
    expected = prepared.matmul(x)
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(prepared.matmul(x), expected) for _ in range(20))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(prepared.matmul(x), expected)


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forks_while_other_threads_multiply_and_repack(weight, num_threads) -> None:
    num_threads(3)
    layout = weight("dense-int8-v1", 200, 100).layout
    prepared = kernels.prepare(layout)
    x = np.random.default_rng(12).standard_normal((30, 100)).astype(np.float32)
    expected = prepared.matmul(x)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            kernels.prepare(layout).matmul(x)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                os._exit(0 if np.array_equal(kernels.prepare(layout).matmul(x), expected) else 1)
            deadline = time.monotonic() + 60
            while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.002)
            if done[0] == 0:
                os.kill(child, 9)
                os.waitpid(child, 0)
            assert done[0] == child, "the child hangs"
            assert os.waitstatus_to_exitcode(done[1]) == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


_shared: list[kernels.Prepared] = []


def _multiply_shared(value: float) -> bytes:
    return _shared[0].matmul(np.full((9, 100), value, np.float32)).tobytes()


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_of_multiprocessing(weight, num_threads) -> None:
    num_threads(2)
    _shared[:] = [kernels.prepare(weight("bitmask-int4-v1", 200, 100).layout)]
    expected = [_multiply_shared(float(value)) for value in range(8)]
    with multiprocessing.get_context("fork").Pool(2) as workers:
        assert workers.map_async(_multiply_shared, [float(value) for value in range(8)]).get(60) == expected


@needs_extension
def test_python_runs_while_a_product_does(weight, num_threads) -> None:
    num_threads(1)
    prepared = kernels.prepare(weight("dense-f32-v1", 500, 500).layout, isa="reference")
    x = np.ones((200, 500), np.float32)
    seen: list[tuple[float, float]] = []
    started = threading.Event()

    def work() -> None:
        started.set()
        while not seen or seen[-1][1] - seen[0][0] < 0.3:
            begin = time.perf_counter()
            prepared.matmul(x)
            seen.append((begin, time.perf_counter()))

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    # Calls take tens of milliseconds: with the lock held, ticks would fall between them only.
    inside = [tick for tick in ticks for begin, end in seen if begin + 0.2 * (end - begin) < tick < end]
    assert len(inside) > len(seen)


def test_idle_threads_leave_the_cpus_to_others(weight, num_threads) -> None:
    num_threads(4)
    prepared = kernels.prepare(weight("dense-int8-v1", 600, 400).layout)
    prepared.matmul(np.ones((64, 400), np.float32))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


@needs_extension
def test_the_interpreter_may_end_while_threads_multiply() -> None:
    """Python ends them when they come back from a product; that must not abort the process."""
    program = """
import threading, time
import numpy as np
from rarefy import kernels
from rarefy.layouts import DenseFloat

weight = kernels.prepare(DenseFloat(np.ones((512, 2048), np.float32)))
x = np.ones((2, 2048), np.float32)
def multiply():
    while True:
        weight.matmul(x)
for _ in range(3):
    threading.Thread(target=multiply, daemon=True).start()
time.sleep(0.1)
print("end")
"""
    for _ in range(3):
        done = run(program, RAREFY_NUM_THREADS="2")
        assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
