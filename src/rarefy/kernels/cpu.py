"""What the CPU can execute, and how many threads to use."""

import os
import platform
import re
from dataclasses import dataclass, fields
from math import ceil
from pathlib import Path
from typing import final

from rarefy.core.errors import UsageError

NUM_THREADS_VARIABLE = "RAREFY_NUM_THREADS"
MAX_THREADS = 256


@final
@dataclass(frozen=True)
class CpuFlags:
    """Instruction sets that both the CPU and the operating system support."""

    avx2: bool = False
    fma: bool = False
    f16c: bool = False
    bmi2: bool = False
    avx_vnni: bool = False
    avx512f: bool = False
    avx512bw: bool = False
    avx512vl: bool = False
    avx512dq: bool = False
    avx512_vnni: bool = False
    avx512vbmi: bool = False
    avx512_vbmi2: bool = False
    avx512_bf16: bool = False
    amx_tile: bool = False
    amx_int8: bool = False
    amx_bf16: bool = False
    asimddp: bool = False

    def names(self) -> tuple[str, ...]:
        """Names of the flags that are set."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name))


def parse_cpuinfo(text: str) -> CpuFlags:
    """Flags from the text of Linux's /proc/cpuinfo; a flag that it does not name is not set."""
    words: set[str] = set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # on x86 and on ARM
            words = set(value.split())
            break
    return CpuFlags(**{field.name: field.name in words for field in fields(CpuFlags)})


def read_cpuinfo() -> str:
    """Text of /proc/cpuinfo, empty where there is none."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_model() -> str:
    """The CPU's marketing name, or the best the platform tells."""
    for line in read_cpuinfo().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """CPUs that this process's control groups and all above them may use; infinite without a limit.

    Args:
        root: where Linux mounts the groups: version 2, or version 1 with the CPU controller in `cpu`.
        own: lists the groups of this process, `number:controllers:/path` a line.
    """
    try:
        text = own.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    groups = [fields for line in text.splitlines() if len(fields := line.split(":", 2)) == 3]
    limit = float("inf")
    for folder, controller in ((root, ""), (root / "cpu", "cpu")):
        paths = [path for _, controllers, path in groups if controller in controllers.split(",")]
        # Within a container the path may be the host's, where nothing of that name is mounted: the root is the limit.
        for path in paths or ["/"]:
            group = Path(path.lstrip("/"))
            for level in (group, *group.parents):
                limit = min(limit, _cpu_quota(folder / level))
    return limit


def _cpu_quota(group: Path) -> float:
    try:
        try:
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        except FileNotFoundError:
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (group / "cpu.cfs_period_us").read_text(encoding="ascii")
        limit = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such group
        return float("inf")
    return limit if limit > 0 else float("inf")


def available_cpus() -> int:
    """CPUs this process may run on: its affinity mask, and the container's quota if that is smaller."""
    try:
        affinity = len(os.sched_getaffinity(0))
    except AttributeError:
        affinity = os.cpu_count() or 1
    return max(1, min(affinity, ceil(min(cgroup_cpus(), MAX_THREADS))))


def last_level_cache_bytes(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the last level of cache, all instances that this machine's CPUs share together; 32 MiB if unknown.

    Args:
        root: where Linux describes the CPUs.
    """
    instances: dict[int, dict[str, int]] = {}
    for index in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level = int((index / "level").read_text(encoding="ascii"))
            size = (index / "size").read_text(encoding="ascii").strip()
            shared_by = (index / "shared_cpu_list").read_text(encoding="ascii").strip()
            num_bytes = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1:], 0)
        except (OSError, ValueError):
            continue
        instances.setdefault(level, {})[shared_by] = num_bytes
    return sum(instances[max(instances)].values()) if instances else 32 << 20


def default_num_threads() -> int:
    """RAREFY_NUM_THREADS if set, else `available_cpus()`.

    Raises:
        UsageError: the variable is not an integer between 1 and 256.
    """
    text = os.environ.get(NUM_THREADS_VARIABLE, "").strip()
    if not text:
        return available_cpus()
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_THREADS:
        raise UsageError(
            f"environment variable {NUM_THREADS_VARIABLE}",
            f"{text!r} is not a number of threads",
            allowed=f"an integer from 1 to {MAX_THREADS}",
            hint="unset it to use every CPU of this process",
        )
    return int(text)
