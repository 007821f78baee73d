"""Tiny models of every family, and artifacts written straight from solutions (no compression method involved)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from rarefy.artifact import write_artifact
from rarefy.core.grids import IntGrid, dequantize, fit_minmax, quantize, to_bf16_bits
from rarefy.core.patterns import NM, Blocks, Pattern, Unstructured
from rarefy.core.solution import Solution
from rarefy.layouts import FORMATS, NF4, AnyLayout, Binary, LookupTable, LowRank, Sum, Tapwise, Ternary, pack

torch.set_num_threads(2)

TINY = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96}


def solution_for(format_name: str, weight_OI: np.ndarray, *, symmetric: bool = False) -> Solution:
    """A solution that `pack` stores in the given format, by magnitude and round-to-nearest."""
    kind, values, _ = format_name.split("-")
    patterns = {"dense": None, "bitmask": Unstructured(0.6), "nm": NM(3, 8), "block": Blocks((8, 16), 0.5)}
    pattern: Pattern | None = patterns[kind]
    mask = None
    if isinstance(pattern, Unstructured):
        mask = np.abs(weight_OI) > np.quantile(np.abs(weight_OI), 0.6)
    elif isinstance(pattern, Blocks):
        mask = np.add.outer(np.arange(weight_OI.shape[0]) // 8, np.arange(weight_OI.shape[1]) // 16) % 2 == 0
    elif isinstance(pattern, NM):
        mask = np.zeros(weight_OI.shape, dtype=bool)
        keep_G = pattern.keep_counts_G(weight_OI.shape[1])
        for group, keep in enumerate(keep_G):
            columns = slice(group * pattern.group, (group + 1) * pattern.group)
            order = np.argsort(-np.abs(weight_OI[:, columns]), axis=1, kind="stable")[:, : int(keep)]
            np.put_along_axis(mask[:, columns], order, True, axis=1)
    weight = weight_OI.astype(np.float32)
    grid = None
    if values.startswith("int"):
        grid = fit_minmax(weight, IntGrid(int(values[3:]), 32, symmetric))
        weight = dequantize(quantize(weight, grid), grid)
    elif values == "bf16":
        weight = bf16(weight)
    if mask is not None:
        weight = np.where(mask, weight, np.float32(0))
    return Solution(weight, mask, pattern, grid)


def bf16(weight: np.ndarray) -> np.ndarray:
    return torch.from_numpy(weight).to(torch.bfloat16).float().numpy()


def make_layout(format_name: str, weight_OI: np.ndarray, *, symmetric: bool = False) -> AnyLayout:
    if format_name == "sum-v1":
        rest = weight_OI - make_layout("lowrank-bf16-v1", weight_OI).to_dense()
        return Sum(make_layout("lowrank-bf16-v1", weight_OI), make_layout("bitmask-bf16-v1", rest))
    if format_name.startswith("tapwise"):
        rows, width = weight_OI.shape
        runs = max(runs for runs in (1, 2, 3, 4) if width % runs == 0)
        run_width = width // runs
        right = np.linalg.svd(weight_OI.reshape(-1, run_width), full_matrices=False)[2][: max(1, run_width // 2)]
        left = (weight_OI.reshape(rows, runs, run_width) @ right.T).reshape(rows, -1)
        return Tapwise(make_layout("dense-bf16-v1", left), make_layout("dense-bf16-v1", right), runs)
    if format_name.startswith("lowrank"):
        u, s, vt = np.linalg.svd(weight_OI.astype(np.float64), full_matrices=False)
        factor_format = format_name.replace("lowrank", "dense")
        rank = max(1, len(s) // 2)
        factors = (u[:, :rank] * s[:rank], vt[:rank])
        return LowRank(*(make_layout(factor_format, factor, symmetric=symmetric) for factor in factors))
    size = np.abs(weight_OI).mean(axis=1, keepdims=True, dtype=np.float32)
    size[size == 0] = 1  # the row of a padding token
    match format_name:
        case "ternary-v1":
            return Ternary.from_levels(np.sign(weight_OI) * (np.abs(weight_OI) > size / 2), bf16(size), None)
        case "binary-v1":
            return Binary.from_levels(np.where(weight_OI > 0, 1, -1), bf16(size), None)
        case "lut4-v1":
            return LookupTable.from_dense(weight_OI, NF4, scaled=True, group_size=32)
        case "lut8-v1":
            table = np.quantile(weight_OI, np.linspace(0, 1, 256)).astype(np.float32)
            return LookupTable.from_dense(weight_OI, table, scaled=False)
    solution = solution_for(format_name, weight_OI, symmetric=symmetric)
    layout = pack(solution, float_format="f32" if "f32" in format_name else "bf16")
    assert layout.format == format_name
    return layout


def make_model(family: str) -> nn.Module:
    """A model with random weights, built from a configuration, always the same."""
    torch.manual_seed(0)
    config = {**TINY, "initializer_range": 0.2}
    decoder = {
        **config, "intermediate_size": 80, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0
    }  # fmt: skip
    long = {"max_position_embeddings": 700}
    bert = {**config, "intermediate_size": 80, "max_position_embeddings": 64}
    t = transformers
    builders: dict[str, Callable[[], nn.Module]] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder, tie_word_embeddings=True)),
        "llama-untied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder, tie_word_embeddings=False)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**{**decoder, **long}, sliding_window=70)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**decoder, tie_word_embeddings=True)),
        "qwen2-window": lambda: t.Qwen2ForCausalLM(
            t.Qwen2Config(**{**decoder, **long}, use_sliding_window=True, sliding_window=20, max_window_layers=1)
        ),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**decoder, head_dim=12, sliding_window=8)),
        "bert": lambda: t.BertModel(t.BertConfig(**bert)),
        "bert-mlm": lambda: t.BertForMaskedLM(t.BertConfig(**bert)),
        "bert-classifier": lambda: t.BertForSequenceClassification(t.BertConfig(**bert, num_labels=3)),
        "distilbert": lambda: t.DistilBertModel(
            t.DistilBertConfig(dim=48, hidden_dim=80, n_heads=4, n_layers=2, vocab_size=96, max_position_embeddings=64)
        ),
        # embeddings that scale their rows, in encoder and decoder
        "bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(
                d_model=48,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=80,
                decoder_ffn_dim=80,
                vocab_size=96,
                max_position_embeddings=64,
                scale_embedding=True,
                init_std=0.2,
            )
        ),
        # one block that runs twice, a factorised embedding
        "albert": lambda: t.AlbertModel(t.AlbertConfig(**bert, embedding_size=32)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(d_model=48, d_kv=12, d_ff=80, num_heads=4, num_layers=2, vocab_size=96, decoder_start_token_id=0)
        ),
    }
    model = builders[family]().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            # Biases and norms away from 0 and 1, so that one that is lost shows.
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        elif parameter.ndim == 2:
            parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


Chooser = Callable[[str, nn.Module], str | None]


def write(path: Path, model: Any, choose: Chooser, *, tied: Mapping[str, str] | None = None) -> dict[str, AnyLayout]:
    """Write `model` as an artifact with the layers that `choose` names a format for, and give it the same weights."""
    tied = dict(tied or {})
    layers: dict[str, AnyLayout] = {}
    for name, module in model.named_modules():
        format_name = None if name in tied else choose(name, module)
        if format_name is not None:
            layers[name] = make_layout(format_name, module.weight.detach().numpy())
            module.weight.data = torch.from_numpy(layers[name].to_dense()).clone()
    for alias, name in tied.items():
        model.get_submodule(alias).weight = model.get_submodule(name).weight
    packed = {f"{name}.weight" for name in (*layers, *tied)}
    tensors: dict[str, np.ndarray] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in packed or id(tensor) in seen:
            continue
        seen[id(tensor)] = name
        array = tensor.detach().numpy()
        tensors[name] = to_bf16_bits(array) if array.ndim >= 2 else array
    config = model.config.to_dict()
    config["architectures"] = [type(model).__name__]
    write_artifact(path, config=config, layers=layers, tied=tied, tensors=tensors, extra_files={}, force=True)
    return layers


def choose_linear(format_name: str) -> Chooser:
    """Every nn.Linear in the given format."""
    return lambda name, module: format_name if type(module) is nn.Linear else None


@pytest.fixture(params=sorted(FORMATS))
def format_name(request: pytest.FixtureRequest) -> str:
    """Each storage format in turn."""
    name: str = request.param
    return name


@pytest.fixture
def token_ids() -> torch.Tensor:
    return torch.randint(1, 96, (2, 11), generator=torch.Generator().manual_seed(1))


# Test modules cannot import this file (pytest's importlib mode), so what they call comes as fixtures.
@pytest.fixture(scope="session")
def layout_for() -> Callable[..., AnyLayout]:
    return make_layout


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], nn.Module]:
    return make_model


@pytest.fixture(scope="session")
def write_compressed() -> Callable[..., dict[str, AnyLayout]]:
    return write


@pytest.fixture(scope="session")
def linear_only() -> Callable[[str], Chooser]:
    return choose_linear
