"""Open whatever a user names as a model: an artifact, a Hugging Face directory or hub id, a GGUF file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import transformers
from torch import nn
from transformers.utils import logging as hf_logging

from rarefy.artifact import read_artifact
from rarefy.core.errors import DamagedFileError, UnsupportedModelError
from rarefy.models import load_model
from rarefy.models.positions import num_positions

LONGEST_TEXT = 512


@final
@dataclass(frozen=True)
class Opened:
    """A torch model and its tokenizer.

    Args:
        model: in evaluation mode.
        tokenizer: its transformers tokenizer, or None if it has none.
        is_artifact: whether it was compressed by rarefy.
    """

    model: nn.Module
    tokenizer: Any
    is_artifact: bool


def is_artifact(path: str | Path) -> bool:
    """Whether a directory is an artifact of rarefy; False for everything that is not a directory."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return False
    try:
        quantization = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
        return bool(quantization.get("quant_method") == "rarefy")
    except (ValueError, AttributeError) as error:
        raise DamagedFileError(str(config), f"not a JSON object ({error})") from error


def is_causal_language_model(model: Any) -> bool:
    """Whether a model predicts the next token of running text: it generates, and is no encoder-decoder."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and not getattr(model.config, "is_encoder_decoder", False)


def longest_text(model: nn.Module, tokenizer: Any) -> int:
    """Tokens of a text that a measurement reads: 512, or as many as the model and its tokenizer allow."""
    return min(LONGEST_TEXT, num_positions(model) or LONGEST_TEXT, int(tokenizer.model_max_length))


def open_with_transformers(path: str | Path, *, dtype: torch.dtype = torch.float32) -> Opened:
    """Load a model into torch, whole.

    Args:
        path: an artifact, a Hugging Face directory or hub id, or a GGUF file.
        dtype: what to compute in.

    Raises:
        RarefyError: the model cannot be loaded.
    """
    if not is_artifact(path):
        loaded = load_model(path, dtype=dtype, stream=False)
        return Opened(loaded.model.eval(), loaded.tokenizer, False)
    path = Path(path)
    name = (read_artifact(path).config.get("architectures") or [""])[0]
    model_class = getattr(transformers, str(name), None)
    if model_class is None:
        raise UnsupportedModelError(str(path), f"architecture {name!r}", allowed="one that transformers has")
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: nn.Module = model_class.from_pretrained(path, dtype=dtype, local_files_only=True)
        has_tokenizer = (path / "tokenizer.json").is_file()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True) if has_tokenizer else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(str(path), f"transformers cannot load it ({error})") from error
    finally:
        if bars:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    return Opened(model.eval(), tokenizer, True)
