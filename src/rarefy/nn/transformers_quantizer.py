"""rarefy as a quantization method of transformers: `AutoModel*.from_pretrained(artifact)` and `save_pretrained`.

transformers builds the model on the meta device, asks the quantizer to swap modules, fills every parameter and
persistent buffer from the checkpoint by name, and asks the quantizer to finish. Compressed layers keep their packed
arrays as buffers with the names that the artifact stores, so that the ordinary loading path reads them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from rarefy.artifact import (
    FORMAT_VERSION,
    QUANT_METHOD,
    Artifact,
    LayoutSpec,
    parse_quantization_config,
    read_artifact,
)
from rarefy.core.errors import DamagedFileError, LayoutError, UnsupportedModelError, UsageError
from rarefy.nn.biases import added_biases, set_biases
from rarefy.nn.holder import LayoutHolder
from rarefy.nn.replace import all_weights, replace_with_empty
from rarefy.nn.runtime_ops import use_engine_ops

if TYPE_CHECKING:
    # transformers imports this module while it is importing the one that defines PreTrainedModel.
    from transformers import PreTrainedConfig, PreTrainedModel


@final
class RarefyConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact's config.json.

    Args:
        quant_method: "rarefy".
        format_version: version of the artifact's format.
        layers: layer name -> {"format": name, **metadata of the layout}.
        tied: name of a layer without arrays of its own -> the layer whose arrays it reads.
        unknown: anything else, which is an error: a field that is not understood cannot be ignored.

    Raises:
        DamagedFileError: a field is unknown, missing, of the wrong type, or of a version this rarefy does not know.
    """

    def __init__(
        self,
        quant_method: str = QUANT_METHOD,
        format_version: int = FORMAT_VERSION,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        tied: Mapping[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        fields = {
            "quant_method": quant_method,
            "format_version": format_version,
            "layers": layers,
            "tied": dict(tied or {}),
        }
        self.specs, self.tied = parse_quantization_config({**fields, **unknown})
        # transformers lists its own methods in an enum of strings; a plain string compares like one of them.
        self.quant_method = cast(QuantizationMethod, quant_method)
        self.format_version = format_version

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into config.json."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "layers": {name: {"format": spec.format_name, **spec.meta} for name, spec in self.specs.items()},
            "tied": dict(self.tied),
        }

    def renamed(self, specs: Mapping[str, LayoutSpec], tied: Mapping[str, str]) -> "RarefyConfig":
        """The same configuration for a model that has these layers, under these names."""
        layers = {name: {"format": spec.format_name, **spec.meta} for name, spec in specs.items()}
        return RarefyConfig(layers=layers, tied=tied)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


@final
class RarefyQuantizer(HfQuantizer):
    """Loads and saves artifacts; compressing a model is `rarefy.compress`, not a loading option."""

    requires_calibration = True
    quantization_config: RarefyConfig
    _attention_is_free = False
    """Whether the caller left the choice of the attention implementation to us."""

    @property
    def is_trainable(self) -> bool:
        """False: the packed weights are frozen."""
        return False

    def is_serializable(self) -> bool:
        """True: `save_pretrained` writes an artifact."""
        return True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse devices other than the CPU."""
        for device in device_map.values() if isinstance(device_map, dict) else [device_map]:
            if device not in (None, "auto", "cpu") and torch.device(device).type != "cpu":
                raise UsageError("device_map", f"{device!r}", allowed="cpu", hint="rarefy's kernels run on the CPU")

    def update_device_map(self, device_map: Any) -> Any:
        """Let "auto" mean the CPU, whatever else the machine has."""
        return {"": "cpu"} if device_map in ("auto", "balanced", "balanced_low_0", "sequential") else device_map

    def update_attn_implementation(self, config: "PreTrainedConfig") -> "PreTrainedConfig":
        """Note whether an attention implementation was asked for; the model will have chosen one of its own later.

        Releases of transformers that do not call this leave attention to sdpa.
        """
        self._attention_is_free = config._attn_implementation is None
        return config

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **_: Any
    ) -> "PreTrainedModel":
        config = self.quantization_config
        names = _layer_names(model, (*config.specs, *config.tied))
        specs = {names[name]: spec for name, spec in config.specs.items() if name in names}
        tied = {names[a]: names[b] for a, b in config.tied.items() if a in names and b in names}
        if not specs:
            found = "it has none of the artifact's compressed layers"
            raise UnsupportedModelError(type(model).__name__, found, allowed=_architectures(model))
        is_own_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
        absent = sorted({*config.specs, *config.tied} - names.keys())
        if absent and is_own_class:
            raise DamagedFileError("quantization_config", f"layer {absent[0]!r} is not in the {type(model).__name__}")
        artifact = read_artifact(Path(checkpoint_files[0]).parent) if checkpoint_files else None
        own_names = {own: name for name, own in names.items() if name in config.specs}
        biases: dict[str, int] = {}
        try:
            if artifact is not None:
                stored = [own + ".bias" for own, name in own_names.items() if f"{name}.bias" in artifact.files]
                biases = added_biases(model, specs, stored)
            holders = replace_with_empty(model, specs, tied, device="meta")
        except UsageError as error:
            if isinstance(error, UnsupportedModelError):
                raise
            raise DamagedFileError("quantization_config", str(error)) from error
        set_biases(model, {name: torch.empty(size, device="meta") for name, size in biases.items()})
        if artifact is not None:
            _check_complete(model, holders, artifact, check_all=is_own_class)
        # Names from here on are this model's, so that save_pretrained writes a config that matches its tensors. The
        # configuration that was passed in stays as it is: it may serve to load a model of another class.
        self.quantization_config = config.renamed(specs, tied)
        return model

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        for name, module in model.named_modules():
            if not isinstance(module, LayoutHolder):
                continue
            try:
                module.layout  # noqa: B018 (validates every array before a kernel sees it)
            except LayoutError as error:
                raise LayoutError(f"layer {name}", str(error)) from error
            bias = getattr(module, "bias", None)
            if bias is not None and not bool(torch.isfinite(bias).all()):
                raise DamagedFileError(f"tensor {name}.bias", "NaN or infinity", allowed="finite values")
        # Tensors are saved under this model's own names, not under those of an older checkpoint format.
        model.__dict__["_weight_conversions"] = []
        # A packed model is for running; what is left to train (norms, biases) is trained when somebody asks for it.
        # Otherwise every call outside of `no_grad` would keep torch's graph, and run torch's own operations.
        model.requires_grad_(False)
        use_engine_ops(model)
        if self._attention_is_free:
            _use_engine_attention(model)
        return model

    def get_state_dict_and_metadata(self, model: "PreTrainedModel") -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors to save: matrices that were stored as bfloat16 are stored so again, without loss."""
        narrowed: dict[tuple[int, int, torch.Size], Tensor] = {}  # tied parameters must stay one storage
        state = {}
        for name, tensor in model.state_dict().items():
            packed = name.rpartition(".")[0]
            state[name] = tensor
            if tensor.dtype == torch.float32 and tensor.ndim >= 2 and packed not in self.quantization_config.specs:
                key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
                if key not in narrowed:
                    narrow = tensor.to(torch.bfloat16)
                    narrowed[key] = narrow if torch.equal(narrow.to(torch.float32), tensor) else tensor
                state[name] = narrowed[key]
        return state, {}

    def dequantize(self, *_: Any, **__: Any) -> "PreTrainedModel":
        """Refuse: the kernels read the packed form, and there is no dense module to go back to."""
        raise UsageError("dequantize", "packed layers stay packed", hint="load the dense model that was compressed")


def _use_engine_attention(model: "PreTrainedModel") -> None:
    """Let a model run the engine's attention where it chose sdpa by itself and takes other implementations."""
    # transformers imports this module before the modules that this import needs.
    from transformers import PreTrainedModel  # noqa: PLC0415

    from rarefy.nn.attention import NAME  # noqa: PLC0415

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if all(each._supports_attention_backend and each.config._attn_implementation == "sdpa" for each in models):
        model.set_attn_implementation(NAME)


def _architectures(model: "PreTrainedModel") -> str:
    return ", ".join(getattr(model.config, "architectures", None) or ["the class that was compressed"])


def _layer_names(model: "PreTrainedModel", layers: Iterable[str]) -> dict[str, str]:
    """Map the artifact's layer names to this model's; layers that it does not have are left out.

    A base model lacks the prefix that its layers carry in a model with a head (`model.`, `bert.`), and the reverse.
    """
    # A module that cannot be replaced counts too: the error says why it cannot.
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    modules |= {weight.layer for weight in all_weights(model)}
    prefix = f"{model.base_model_prefix}."
    found = {}
    for layer in layers:
        for candidate in (layer, layer.removeprefix(prefix), prefix + layer):
            if candidate in modules:
                found[layer] = candidate
                break
    return found


def _check_complete(
    model: "PreTrainedModel", holders: Mapping[str, LayoutHolder], artifact: Artifact, *, check_all: bool
) -> None:
    """Check that the artifact has every tensor that the model will ask for, before any is read.

    transformers would only warn of a missing tensor and initialise it at random.

    Args:
        model: on the meta device, with its compressed layers in place.
        holders: the compressed layers.
        artifact: the opened artifact.
        check_all: whether every tensor of the model must be there; False where a model gets a new head.

    Raises:
        DamagedFileError: a tensor is missing.
    """
    prefix = f"{model.base_model_prefix}."
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    stored = {*artifact.files, *(name.removeprefix(prefix) for name in artifact.files)}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    for name in sorted(model.state_dict()):
        needed = check_all or name.rpartition(".")[0] in holders
        known = name in stored or name.removeprefix(prefix) in stored or name in tied
        if needed and not known and not any(pattern.search(name) for pattern in ignored):
            raise DamagedFileError(
                str(artifact.path), f"no tensor {name!r}", hint="a weight is missing from the checkpoint"
            )


def _register() -> None:
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(RarefyConfig)
        register_quantizer(QUANT_METHOD)(RarefyQuantizer)


# To import this module is to register it: the import hook may come upon it while it is half imported.
_register()
