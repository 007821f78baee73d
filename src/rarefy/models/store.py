"""Where weights come from, one tensor at a time: safetensors files or a GGUF file.

A store lets a model be built on the meta device and filled block by block, so that a run never holds all of the
weights at once. Names are those of the model's own ``state_dict``.
"""

from __future__ import annotations

import functools
import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from rarefy.core.errors import DamagedFileError, PathError, UnsupportedModelError

# Values that are dequantized in one go.
_DEQUANTIZED_AT_ONCE = 1 << 20

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"


class WeightStore(Protocol):
    """A read-only source of named tensors."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor, without reading any."""
        ...

    def stored_dtype(self, name: str) -> str:
        """The name of the type on disk, such as ``bfloat16`` or ``Q4_1``."""
        ...

    def stored_bytes(self, name: str) -> int:
        """How many bytes the tensor takes on disk."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """A fresh tensor; floating-point values as float32."""
        ...


_SAFETENSORS_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


def safetensors_files(directory: Path) -> list[Path]:
    """The weight files of a Hugging Face directory, in the order of its index.

    Raises:
        PathError: no safetensors weights in the directory.
        DamagedFileError: an index that cannot be read, or that names a missing file.
    """
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(file) for file in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedFileError(str(index), f"not a safetensors index ({error})") from error
        for name in names:
            if Path(name).name != name:
                raise DamagedFileError(str(index), f"names the file {name!r}", allowed="file names without a folder")
            if not (directory / name).is_file():
                raise DamagedFileError(str(directory), f"the index names {name}, which does not exist")
        return [directory / name for name in names]
    single = directory / WEIGHTS_FILE
    if single.is_file():
        return [single]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern))
    if pickles:
        raise UnsupportedModelError(
            str(directory),
            f"only pickled weights ({pickles[0]})",
            allowed="safetensors",
            hint="pickles can run code when read; convert the model once with `save_pretrained(..., "
            "safe_serialization=True)` where you trust it",
        )
    raise PathError(str(directory), "no model weights", allowed=f"{WEIGHTS_FILE}, or shards with {INDEX_FILE}")


@final
class SafetensorsStore:
    """Tensors of one or more safetensors files, memory-mapped and read on demand."""

    def __init__(self, files: list[Path]) -> None:
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for file in files:
            try:
                with safe_open(str(file), framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                        view = opened.get_slice(name)
                        self._file_of[name] = file
                        self._shapes[name] = tuple(view.get_shape())
                        self._dtypes[name] = view.get_dtype()
            except (SafetensorError, OSError, ValueError) as error:
                raise DamagedFileError(
                    str(file), f"not a complete safetensors file ({error})", hint="copy or download it again"
                ) from error

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor, without reading any."""
        return self._shapes

    def stored_dtype(self, name: str) -> str:
        """The name of the type on disk."""
        code = self._dtypes[name]
        return _SAFETENSORS_DTYPES.get(code, (code.lower(), 0))[0]

    def stored_bytes(self, name: str) -> int:
        """How many bytes the tensor takes on disk."""
        count = 1
        for size in self._shapes[name]:
            count *= size
        return count * _SAFETENSORS_DTYPES.get(self._dtypes[name], ("", 0))[1]

    def read(self, name: str) -> torch.Tensor:
        """A fresh tensor; floating-point values as float32.

        The file is opened anew each time: a mapping kept open would count its pages as ours for the whole run.
        """
        try:
            with safe_open(str(self._file_of[name]), framework="pt") as opened:
                tensor: torch.Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(str(self._file_of[name]), f"tensor {name} cannot be read ({error})") from error
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


@final
class GgufStore:
    """Tensors of a GGUF file, dequantized on demand and put into the order that transformers expects.

    Args:
        file: the GGUF file.
        model: the (meta) model that the tensors are for; transformers' own table maps the names.
        config: the model's configuration, which the row permutation of q and k needs.

    Raises:
        UnsupportedModelError: a tensor is of a type that the installed gguf cannot convert.
        DamagedFileError: a tensor does not have the bytes that its shape asks for.
    """

    def __init__(self, file: Path, model: torch.nn.Module, config: Mapping[str, Any]) -> None:
        import gguf  # noqa: PLC0415 (only GGUF input needs it)
        from transformers import modeling_gguf_pytorch_utils  # noqa: PLC0415

        hf: Any = modeling_gguf_pytorch_utils  # partly annotated only
        self._file = file
        self._dequantize = gguf.dequantize
        reader = gguf.GGUFReader(str(file))
        self._mapping: mmap.mmap | None = getattr(reader, "mapping", None)
        architecture = str(hf.read_field(reader, "general.architecture")[0])
        self._processor: Any = hf.TENSOR_PROCESSORS.get(architecture, hf.TensorProcessor)(config=dict(config))
        to_hf = _gguf_names(gguf, architecture, int(config.get("num_hidden_layers", 0)), model, self._processor)
        self._tensors = {to_hf[t.name]: t for t in reader.tensors if t.name in to_hf}
        self._shapes = {
            name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._tensors.items()
        }
        # One row of each type: what cannot be converted is told now, and not an hour into a run.
        for name in {tensor.tensor_type: name for name, tensor in self._tensors.items()}.values():
            rows = slice(1) if len(self._shapes[name]) > 1 else slice(None)
            self._dequantize_into(np.empty(self._shapes[name], np.float32)[rows], self._tensors[name], rows)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor, without reading any."""
        return self._shapes

    def _forget_pages(self) -> None:
        # Pages of the file that have been read count as ours until the system needs them; it reads them again at will.
        if self._mapping is not None and hasattr(self._mapping, "madvise"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def stored_dtype(self, name: str) -> str:
        """The GGUF name of the type on disk, such as ``Q4_1``."""
        return str(self._tensors[name].tensor_type.name)

    def stored_bytes(self, name: str) -> int:
        """How many bytes the tensor takes on disk."""
        return int(self._tensors[name].n_bytes)

    def read(self, name: str) -> torch.Tensor:
        """A fresh float32 tensor."""
        tensor = self._tensors[name]
        values = np.empty(self._shapes[name], dtype=np.float32)
        # Rows are quantized independently; a few at a time keep the temporaries of the conversion small.
        rows = max(1, _DEQUANTIZED_AT_ONCE // max(1, values[:1].size)) if values.ndim > 1 else max(1, len(values))
        for start in range(0, len(values), rows):
            part = slice(start, start + rows)
            self._dequantize_into(values[part], tensor, part)
        self._forget_pages()
        result = self._processor.process(weights=values, name=tensor.name)
        if result.name is None:
            raise UnsupportedModelError(str(self._file), f"tensor {tensor.name} cannot be read on its own")
        return torch.from_numpy(np.require(result.weights, requirements=["C", "W"]))

    def _dequantize_into(self, values: npt.NDArray[np.float32], tensor: Any, part: slice) -> None:
        """Fill `values` with the rows `part` of a tensor."""
        try:
            values[...] = self._dequantize(tensor.data[part], tensor.tensor_type)
        except NotImplementedError as error:  # how gguf says that it knows a type but cannot convert it
            raise UnsupportedModelError(
                str(self._file),
                f"tensor {tensor.name} is stored as {tensor.tensor_type.name}, which the installed gguf cannot convert",
                hint="a newer gguf may; or start from another file of the same model",
            ) from error
        except (ValueError, IndexError) as error:
            raise DamagedFileError(str(self._file), f"tensor {tensor.name} cannot be read ({error})") from error


def _gguf_names(
    gguf: Any, architecture: str, num_layers: int, model: torch.nn.Module, processor: Any
) -> dict[str, str]:
    """The model's name of every GGUF tensor that gguf's own table knows under its full name."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in numbers:
        return {}
    table = gguf.get_tensor_name_map(numbers[architecture], num_layers)
    names = {}
    for name in model.state_dict():
        stem, dot, suffix = name.rpartition(".")
        stem, suffix = (stem, dot + suffix) if suffix in ("weight", "bias") else (name, "")
        found = table.get_name(processor.preprocess_name(stem))
        if found is not None:
            names[found + suffix] = name
    return names


@contextmanager
def one_gguf_reader() -> Iterator[None]:
    """Parse a GGUF file once, however often transformers asks for it inside this context.

    It parses the file anew for the configuration, for the tokenizer and for the weights; each takes seconds, because
    the vocabulary is stored as one field per token.
    """
    import gguf  # noqa: PLC0415 (only GGUF input needs it)

    original = gguf.GGUFReader

    class PlainReader(original):  # type: ignore[misc, valid-type]
        """Slices of a numpy.memmap are memmaps, which take several times as long to make as plain arrays."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)
            self.mapping = mapped._mmap

    setattr(gguf, "GGUFReader", functools.cache(PlainReader))  # noqa: B010 (a type checker refuses to rebind a class)
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", original)  # noqa: B010
