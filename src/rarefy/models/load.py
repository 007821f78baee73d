"""Load a model from a directory, a hub id, a GGUF file or memory, whole or to be streamed block by block."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as hf_logging

from rarefy.core.errors import DamagedFileError, PathError, RarefyError, UnsupportedModelError
from rarefy.models.loaded import LoadedModel
from rarefy.models.store import GgufStore, SafetensorsStore, WeightStore, one_gguf_reader, safetensors_files
from rarefy.models.structure import discover

# What travels with a model besides its weights: small text files that tokenizers, processors and pipelines read.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "LICENSE",
)


def load_model(
    source: str | os.PathLike[str] | nn.Module, *, dtype: torch.dtype = torch.float32, stream: bool = False
) -> LoadedModel:
    """Load a model.

    Args:
        source: a Hugging Face directory, a GGUF file, a hub id, or a module (used as it is, not copied).
        dtype: of the weights in memory; ignored when they stream (float32 then) and for a module.
        stream: build the model without weights and read them when asked for. Where the checkpoint's names are not those
            of the model, it is loaded whole, and a note says so.

    Raises:
        PathError: the path does not exist, or nothing there is a model.
        UnsupportedModelError: a model of a kind that cannot be read.
        DamagedFileError: a file that is truncated or contradicts itself.
    """
    if isinstance(source, nn.Module):
        return _from_module(source)
    text = os.fspath(source)
    path = Path(text).expanduser()
    with _quiet(), _translated(text):
        if path.is_file():
            _check_gguf(path, text)
            with one_gguf_reader():
                return _from_gguf(path, text, dtype, stream)
        if path.is_dir():
            return _from_directory(path, text, dtype, stream)
        return _from_directory(_from_hub(text), text, dtype, stream)


def _from_module(model: nn.Module) -> LoadedModel:
    config = getattr(model, "config", None)
    companions: dict[str, bytes] = {}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        companions["generation_config.json"] = _json_bytes(generation.to_dict())
    return LoadedModel(
        model=model,
        tokenizer=None,
        source=type(model).__name__,
        kind="module",
        architecture=type(model).__name__,
        config=_plain_config(config, type(model).__name__) if isinstance(config, transformers.PreTrainedConfig) else {},
        companions=companions,
    )


def _from_hub(name: str) -> Path:
    """Download a hub model (weights as safetensors only) and return its directory."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 (only a hub id needs it)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    nowhere = PathError(
        name,
        "no such file or directory, and no model of that name could be fetched from the hub",
        allowed="a Hugging Face directory, a .gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M",
        hint="check the spelling; a hub id needs a network connection or a copy in the local cache",
    )
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise PathError(name, "no such file or directory", allowed="a Hugging Face directory or a .gguf file")
    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "1_Pooling/*"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise nowhere from error


def _from_directory(path: Path, text: str, dtype: torch.dtype, stream: bool) -> LoadedModel:
    config_file = path / "config.json"
    if not config_file.is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            _check_gguf(ggufs[0], text)
            with one_gguf_reader():
                return _from_gguf(ggufs[0], text, dtype, stream)
        raise PathError(
            text,
            "a directory without config.json" + (f" and with {len(ggufs)} GGUF files" if ggufs else ""),
            allowed="a Hugging Face model directory",
            hint="name the GGUF file itself" if ggufs else "a model saved by save_pretrained has a config.json",
        )
    try:
        raw = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFileError(str(config_file), f"not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise DamagedFileError(str(config_file), f"a JSON {type(raw).__name__}", allowed="an object")
    quantized = raw.get("quantization_config")
    if isinstance(quantized, dict):
        raise UnsupportedModelError(
            text,
            f"the model is already quantized ({quantized.get('quant_method')})",
            allowed="float weights",
            hint="start from the original model",
        )
    files = safetensors_files(path)
    config = _read_config(path, raw, text)
    model_class = _model_class(raw.get("architectures"), config, text)
    store = SafetensorsStore(files)
    model = _build(model_class, config)
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    companions = {name: (path / name).read_bytes() for name in _COMPANIONS if (path / name).is_file()}
    tokenizer = _tokenizer(path, None)
    if tokenizer is not None and "tokenizer.json" not in companions:
        companions.update(_tokenizer_files(tokenizer))
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        source=text,
        kind="directory",
        architecture=model_class.__name__,
        config=_plain_config(config, model_class.__name__),
        path=path,
        companions=companions,
    )
    options = {"config": config, "local_files_only": True, "use_safetensors": True}
    return _with_weights(loaded, store, dtype, stream, path, options)


def _check_gguf(path: Path, text: str) -> None:
    with path.open("rb") as opened:
        magic = opened.read(4)
    if magic != b"GGUF":
        raise PathError(
            text,
            "a file that is not GGUF",
            allowed="a Hugging Face model directory or a .gguf file",
            hint="for model.safetensors, name the directory that holds it and its config.json",
        )


def _from_gguf(path: Path, text: str, dtype: torch.dtype, stream: bool) -> LoadedModel:
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model_class = _model_class(config.architectures, config, text)
    model = _build(model_class, config)
    tokenizer = _tokenizer(path.parent, path.name)
    companions = {} if tokenizer is None else _tokenizer_files(tokenizer)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        companions["generation_config.json"] = _json_bytes(generation.to_dict())
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        source=text,
        kind="gguf",
        architecture=model_class.__name__,
        config=_plain_config(config, model_class.__name__),
        path=path,
        companions=companions,
    )
    store = GgufStore(path, model, config.to_dict())
    return _with_weights(loaded, store, dtype, stream, path.parent, {"gguf_file": path.name})


def _with_weights(
    loaded: LoadedModel,
    store: WeightStore,
    dtype: torch.dtype,
    stream: bool,
    directory: Path,
    options: Mapping[str, Any],
) -> LoadedModel:
    """Connect the store, and read everything from it unless it is to be streamed.

    Where the names of the checkpoint are not those of the model (old names, merged experts), transformers converts
    them, which it only does for the model as a whole.
    """
    names = _match_names(loaded.model, store)
    if names is not None:
        loaded.attach(store, names)
        if not stream:
            loaded.materialize("", dtype=dtype)
            loaded.store = None
        return loaded
    model_class: Any = type(loaded.model)
    model, info = model_class.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    loaded.model = model.eval()
    loaded.notes = _check_loading(model, info, loaded.source)
    if stream:
        loaded.notes += ("the checkpoint's names differ from the model's, so it was loaded whole and not streamed",)
    return loaded


def _read_config(path: Path, raw: Mapping[str, Any], text: str) -> transformers.PreTrainedConfig:
    model_type = raw.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            text,
            f"unknown model_type {model_type!r}",
            allowed="the architectures of the installed transformers",
            hint="a newer transformers may know it; code that ships with a model is never run",
        )
    config: transformers.PreTrainedConfig = transformers.AutoConfig.from_pretrained(
        path, local_files_only=True, trust_remote_code=False
    )
    return config


def _model_class(
    architectures: list[str] | None, config: transformers.PreTrainedConfig, text: str
) -> type[transformers.PreTrainedModel]:
    """The class that the configuration names, or the one that transformers generates text with."""
    name = architectures[0] if architectures else None
    if name is not None:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
        raise UnsupportedModelError(
            text, f"unknown architecture {name!r}", allowed="a model class of the installed transformers"
        )
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForSeq2SeqLM,
        transformers.AutoModel,
    ):
        if type(config) in auto._model_mapping:
            chosen: Any = auto._model_mapping[type(config)]
            # some configurations serve several classes; the first is the common one
            return chosen[0] if isinstance(chosen, tuple) else chosen  # type: ignore[no-any-return]
    raise UnsupportedModelError(text, f"no model class for {config.model_type!r}")


def _build(
    model_class: type[transformers.PreTrainedModel], config: transformers.PreTrainedConfig
) -> transformers.PreTrainedModel:
    """The model with parameters on the meta device and real buffers (rotary tables are computed, not stored)."""
    untyped: Any = model_class
    with accelerate.init_empty_weights(include_buffers=False):
        model: transformers.PreTrainedModel = untyped._from_config(config)
    # init_empty_weights makes a new meta parameter at every assignment, which unties what was tied.
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train(False)
    return model


def _match_names(model: nn.Module, store: WeightStore) -> dict[str, str] | None:
    """The stored name of every tensor of the model, or None if they do not correspond one to one."""
    stored = store.shapes()
    base = str(getattr(model, "base_model_prefix", ""))
    prefix = f"{base}." if base else ""
    names: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    found_by_owner: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        candidates = (name, prefix + name, name.removeprefix(prefix))
        match = next((c for c in candidates if c in stored and stored[c] == tuple(tensor.shape)), None)
        if match is not None:
            names[name] = match
            found_by_owner.setdefault(first[id(tensor)], match)
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = first[id(tensor)]
        if owner not in found_by_owner:
            return None
        names[name] = found_by_owner[owner]
    return names


def _check_loading(model: nn.Module, info: Mapping[str, Any], text: str) -> tuple[str, ...]:
    """Refuse weights that were never in the file; note the harmless kind (a pooler that was not saved)."""
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", ()))
    if mismatched:
        raise DamagedFileError(text, f"shapes differ from the configuration: {', '.join(mismatched[:3])}")
    missing = sorted(str(key) for key in info.get("missing_keys", ()))
    inside = tuple(f"{block.name}." for block in discover(model).blocks)
    essential = [key for key in missing if key.startswith(inside)] if inside else missing
    if essential:
        shown = ", ".join(essential[:3]) + (f" and {len(essential) - 3} more" if len(essential) > 3 else "")
        raise DamagedFileError(text, f"weights are missing: {shown}", hint="is the checkpoint complete?")
    if missing:
        return (f"not in the checkpoint, so initialised at random: {', '.join(missing)}",)
    return ()


def _plain_config(config: transformers.PreTrainedConfig, architecture: str) -> dict[str, Any]:
    plain = json.loads(config.to_json_string(use_diff=False))
    assert isinstance(plain, dict)
    for key in ("quantization_config", "_name_or_path", "_commit_hash", "transformers_version"):
        plain.pop(key, None)
    plain["architectures"] = [architecture]
    return plain


def _tokenizer(directory: Path, gguf_file: str | None) -> transformers.PreTrainedTokenizerBase | None:
    extra = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        tokenizer: transformers.PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **extra
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None  # vision and audio models have none; text calibration says so when it needs one
    return tokenizer


def _tokenizer_files(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return {file.name: file.read_bytes() for file in sorted(Path(scratch).iterdir()) if file.is_file()}


def _json_bytes(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, default=str) + "\n").encode()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own messages and bars; what matters in them is checked and told by us."""
    logging: Any = hf_logging  # not annotated
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _translated(text: str) -> Iterator[None]:
    """Turn what transformers and its readers raise into our errors, keeping the cause."""
    try:
        yield
    except (RarefyError, KeyboardInterrupt, MemoryError):
        raise
    except (SafetensorError, EOFError) as error:
        raise DamagedFileError(text, f"a weight file cannot be read ({error})") from error
    except Exception as error:  # the libraries document no closed set of exceptions
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(text, f"transformers cannot load it ({first_line})") from error
