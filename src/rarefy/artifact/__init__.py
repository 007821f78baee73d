"""The artifact: a directory in Hugging Face shape that holds packed layers. docs/format.md specifies it.

`read_artifact` opens an artifact, or any plain directory with config.json and safetensors, without torch.
`write_artifact` writes one at once or not at all.
"""

from rarefy.artifact.read import Artifact, read_artifact
from rarefy.artifact.schema import FORMAT_VERSION, QUANT_METHOD, LayoutSpec, parse_quantization_config
from rarefy.artifact.write import SHARD_BYTES, STORED_DTYPES, check_output, write_artifact

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "SHARD_BYTES",
    "STORED_DTYPES",
    "Artifact",
    "LayoutSpec",
    "check_output",
    "parse_quantization_config",
    "read_artifact",
    "write_artifact",
]
