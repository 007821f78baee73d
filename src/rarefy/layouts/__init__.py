"""Storage layouts: how a weight matrix lies in memory and on disk. Pure data, one final class and one file each.

Disk and memory form are the same: canonical, row-major, without alignment games. Kernels repack at load. docs/format.md
specifies the bytes.
"""

from rarefy.layouts.base import Array, ArraySpec, Layout, Meta, MetaValue
from rarefy.layouts.binary import Binary
from rarefy.layouts.bitmask_float import BitmaskFloat
from rarefy.layouts.bitmask_int import BitmaskInt
from rarefy.layouts.block_float import BlockFloat
from rarefy.layouts.block_int import BlockInt
from rarefy.layouts.dense_float import DenseFloat
from rarefy.layouts.dense_int import DenseInt
from rarefy.layouts.factored import FloatFormat
from rarefy.layouts.lookup_table import NF4, LookupTable
from rarefy.layouts.low_rank import LowRank
from rarefy.layouts.nm_float import NMFloat
from rarefy.layouts.nm_int import NMInt
from rarefy.layouts.packing import (
    FORMATS,
    AnyLayout,
    choose_format,
    pack,
    packed_nbytes,
    unpack,
)
from rarefy.layouts.sum import Sum
from rarefy.layouts.tapwise import Tapwise
from rarefy.layouts.ternary import Ternary

__all__ = [
    "FORMATS",
    "NF4",
    "AnyLayout",
    "Array",
    "ArraySpec",
    "Binary",
    "BitmaskFloat",
    "BitmaskInt",
    "BlockFloat",
    "BlockInt",
    "DenseFloat",
    "DenseInt",
    "FloatFormat",
    "Layout",
    "LookupTable",
    "LowRank",
    "Meta",
    "MetaValue",
    "NMFloat",
    "NMInt",
    "Sum",
    "Tapwise",
    "Ternary",
    "choose_format",
    "pack",
    "packed_nbytes",
    "unpack",
]
