"""Names, versions and fields of an artifact, and the check of its quantization_config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from rarefy.core.errors import DamagedFileError, LayoutError, UnsupportedModelError
from rarefy.layouts import FORMATS, ArraySpec

QUANT_METHOD = "rarefy"
FORMAT_VERSION = 1

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# dtypes that the arrays of layouts have in safetensors; bfloat16 bits stay U16, so that no loader converts them
LAYOUT_DTYPES = {"float32": "F32", "uint16": "U16", "uint8": "U8"}

_QUANTIZATION_FIELDS = {"quant_method", "format_version", "layers", "tied"}


@final
@dataclass(frozen=True)
class LayoutSpec:
    """What config.json says of a compressed layer: the name of its format and its metadata."""

    format_name: str
    meta: Mapping[str, Any]

    def arrays(self) -> ArraySpec:
        """Dtype and shape of each array."""
        return FORMATS[self.format_name].array_spec(self.format_name, self.meta)


def parse_quantization_config(
    fields: object, *, where: str = "quantization_config"
) -> tuple[dict[str, LayoutSpec], dict[str, str]]:
    """Check quantization_config against the list of what is allowed.

    Args:
        fields: the JSON object.
        where: the file, for messages.

    Returns:
        The compressed layers by name, and the tied aliases.

    Raises:
        UnsupportedModelError: another tool's, or an unknown format_version.
        DamagedFileError: an unknown or malformed field.
        LayoutError: impossible metadata of a layer.
    """
    if not isinstance(fields, dict):
        raise DamagedFileError(where, f"{fields!r:.60}", allowed="an object")
    method = fields.get("quant_method")
    if method != QUANT_METHOD:
        raise UnsupportedModelError(
            where, f"quant_method {method!r:.40}", allowed=QUANT_METHOD, hint="start from the uncompressed model"
        )
    version = fields.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UnsupportedModelError(
            where,
            f"format_version {version!r:.40}",
            allowed=f"{FORMAT_VERSION}, the only version that this rarefy understands",
            hint="upgrade rarefy, or compress the model again",
        )
    if unknown := sorted(fields.keys() - _QUANTIZATION_FIELDS):
        raise DamagedFileError(where, f"unknown fields {unknown}", allowed=f"{sorted(_QUANTIZATION_FIELDS)}")
    layers, tied = fields.get("layers"), fields.get("tied", {})
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        raise DamagedFileError(f"{where} layers", f"{layers!r:.60}", allowed="an object of layer name to its format")
    specs: dict[str, LayoutSpec] = {}
    for name, layer in layers.items():
        format = layer.get("format")
        if not isinstance(format, str) or format not in FORMATS:
            raise DamagedFileError(
                f"{where} layer {name}",
                f"format {format!r:.40}",
                allowed=", ".join(FORMATS),
                hint="a newer rarefy may know it",
            )
        specs[name] = LayoutSpec(format, {key: value for key, value in layer.items() if key != "format"})
        try:
            specs[name].arrays()
        except LayoutError as error:
            raise in_layer(where, name, error) from error
    ok = isinstance(tied, dict) and all(
        alias not in specs and isinstance(name, str) and name in specs for alias, name in tied.items()
    )
    if not ok:
        raise DamagedFileError(f"{where} tied", f"{tied!r:.80}", allowed="an object of alias to the name of a layer")
    return specs, tied


def in_layer(where: str, name: str, error: LayoutError) -> LayoutError:
    """The same error, saying in which file and layer."""
    return LayoutError(f"{where} layer {name}: {error.where}", error.found, allowed=error.allowed, hint=error.hint)
