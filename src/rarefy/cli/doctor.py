"""`rarefy doctor`: what this machine can do and what rarefy makes of it."""

import platform
from importlib import metadata
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from rarefy import __version__
from rarefy.cli.console import stdout_console, write_json
from rarefy.cli.optional import COMPRESS_PACKAGES
from rarefy.cli.options import DebugFlag, JsonFlag
from rarefy.kernels import Bandwidth, describe_cpu, measure_bandwidth, measure_fork_join
from rarefy.report.units import format_bytes

_RUNTIME_PACKAGES = ("numpy", "safetensors", "tokenizers", "jinja2")
_DISTRIBUTIONS = {"yaml": "pyyaml"}


def doctor(
    bandwidth: Annotated[
        bool,
        typer.Option("--bandwidth/--no-bandwidth", help="Time reading memory, and fork-join of threads (a second)."),
    ] = True,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Show the CPU, the kernels chosen for it, threads, memory bandwidth and versions.

    RAREFY_ISA (numpy, reference, neon, avx2, avx_vnni, avx512, avx512_bf16 or amx) caps the instruction set,
    RAREFY_NUM_THREADS sets the threads.

    Examples:

        rarefy doctor

        RAREFY_ISA=avx2 rarefy doctor --no-bandwidth --json
    """
    del debug
    cpu = describe_cpu()
    measured = measure_bandwidth() if bandwidth else None
    fork_join = measure_fork_join() if bandwidth else None
    fork_join_us = None if fork_join is None else fork_join * 1e6
    versions: dict[str, str | None] = {"rarefy": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in _RUNTIME_PACKAGES}
    optional = {name: _version(name) for name in sorted(COMPRESS_PACKAGES)}
    if as_json:
        write_json(
            {
                "cpu": cpu,
                "bandwidth": _bandwidth_json(measured),
                "fork_join_us": fork_join_us,
                "versions": versions,
                "compress_extra": optional,
            }
        )
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    table.add_row("CPU", Text(f"{cpu['model']}, {cpu['cpus']} usable"))
    table.add_row("Instruction sets", Text(" ".join(cpu["flags"]) or "none that rarefy uses"))
    timed = "" if fork_join_us is None else f", {fork_join_us:.1f} µs to fork and join"
    table.add_row("Threads", Text(f"{cpu['num_threads']}{timed}"))
    extension = "present" if cpu["extension"] else f"MISSING, the slow numpy reference runs ({cpu['extension_error']})"
    table.add_row("Compiled kernels", Text(extension))
    if cpu["isa_cap"] is not None:
        table.add_row("RAREFY_ISA", Text(f"{cpu['isa_cap']}: nothing faster is chosen"))
    table.add_row("Kernel per layout", Text("\n".join(_kernel_lines(cpu["chosen"]))))
    if measured is not None:
        table.add_row("Memory bandwidth", Text(_bandwidth_text(measured)))
    table.add_row("Versions", Text(", ".join(f"{name} {version}" for name, version in versions.items())))
    present = [f"{name} {version}" for name, version in optional.items() if version is not None]
    missing = [name for name, version in optional.items() if version is None]
    table.add_row("Compress extra", Text(", ".join(present) or "none of it is installed"))
    if missing:
        table.add_row("", Text(f"missing: {', '.join(missing)}; pip install 'rarefy[compress]' adds them"))
    stdout_console().print(table)


def _kernel_lines(chosen: dict[str, str]) -> list[str]:
    by_isa: dict[str, list[str]] = {}
    for name, isa in chosen.items():
        by_isa.setdefault(isa, []).append(name)
    return [f"{isa}: {', '.join(names)}" for isa, names in by_isa.items()]


def _bandwidth_text(measured: Bandwidth) -> str:
    return (
        f"{format_bytes(measured.bytes_per_s)}/s ({format_bytes(measured.low)}/s to {format_bytes(measured.high)}/s), "
        f"{measured.num_threads} {'thread' if measured.num_threads == 1 else 'threads'} reading "
        f"{format_bytes(measured.num_bytes)}"
    )


def _bandwidth_json(measured: Bandwidth | None) -> dict[str, float | int | str] | None:
    return None if measured is None else dict(vars(measured))


def _version(package: str) -> str | None:
    try:
        return metadata.version(_DISTRIBUTIONS.get(package, package))
    except metadata.PackageNotFoundError:
        return None
