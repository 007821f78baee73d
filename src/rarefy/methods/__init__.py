"""Compression methods: one file each, and the one dictionary that recipes, documentation and tests go through."""

from rarefy.methods.base import LayerMethod
from rarefy.methods.bias_correction import BiasCorrection
from rarefy.methods.lowrank.asvd import ASVD
from rarefy.methods.lowrank.drone import DRONE
from rarefy.methods.lowrank.frequency_svd import FrequencySVD
from rarefy.methods.lowrank.oats import OATS
from rarefy.methods.lowrank.robust_pca import RobustPCA
from rarefy.methods.lowrank.scaled_gd import ScaledGD
from rarefy.methods.lowrank.spatial import Spatial
from rarefy.methods.lowrank.svd import SVD
from rarefy.methods.lowrank.svd_llm import SVDLLM
from rarefy.methods.lowrank.svt import SVT
from rarefy.methods.lowrank.tucker import Tucker
from rarefy.methods.pruning.alps import ALPS
from rarefy.methods.pruning.apoz import APoZ
from rarefy.methods.pruning.dsnot import DSnoT
from rarefy.methods.pruning.lasso import Lasso
from rarefy.methods.pruning.least_squares import Refit
from rarefy.methods.pruning.magnitude import Magnitude
from rarefy.methods.pruning.obd import OBD
from rarefy.methods.pruning.obert import OBERT
from rarefy.methods.pruning.random import Random
from rarefy.methods.pruning.ria import RIA
from rarefy.methods.pruning.sparsegpt import SparseGPT
from rarefy.methods.pruning.taylor import Taylor
from rarefy.methods.pruning.wanda import Wanda
from rarefy.methods.quantization.gptq import GPTQ
from rarefy.methods.quantization.rtn import RTN
from rarefy.methods.rescale import Rescale

METHODS: dict[str, type[LayerMethod]] = {
    "random": Random,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "dsnot": DSnoT,
    "apoz": APoZ,
    "taylor": Taylor,
    "obd": OBD,
    "obert": OBERT,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
    "lasso": Lasso,
    "refit": Refit,
    "rescale": Rescale,
    "bias-correction": BiasCorrection,
    "svd": SVD,
    "svt": SVT,
    "asvd": ASVD,
    "svd-llm": SVDLLM,
    "drone": DRONE,
    "frequency-svd": FrequencySVD,
    "scaled-gd": ScaledGD,
    "tucker": Tucker,
    "spatial": Spatial,
    "oats": OATS,
    "robust-pca": RobustPCA,
    "rtn": RTN,
    "gptq": GPTQ,
}

__all__ = [
    "ALPS",
    "ASVD",
    "DRONE",
    "GPTQ",
    "METHODS",
    "OATS",
    "OBD",
    "OBERT",
    "RIA",
    "RTN",
    "SVD",
    "SVDLLM",
    "SVT",
    "APoZ",
    "BiasCorrection",
    "DSnoT",
    "FrequencySVD",
    "Lasso",
    "LayerMethod",
    "Magnitude",
    "Random",
    "Refit",
    "Rescale",
    "RobustPCA",
    "ScaledGD",
    "SparseGPT",
    "Spatial",
    "Taylor",
    "Tucker",
    "Wanda",
]
