"""Whether a model can be gone through block by block."""

from collections.abc import Mapping

import torch

from rarefy.calibrate.calls import Call, calibration_mode
from rarefy.calibrate.inputs import cast_inputs, without_cache
from rarefy.calibrate.precision import cast_parameters, modules_outside
from rarefy.calibrate.walk import BlockWalk
from rarefy.core.errors import UnsupportedModelError
from rarefy.models.loaded import LoadedModel


def in_a_row(loaded: LoadedModel, blocks: Mapping[str, str], call: Call, dtype: torch.dtype) -> bool:
    """Whether a model calls its blocks once each, and nothing needs a block's output after later ones of its stack ran.

    In a U-Net something does, and a walk, which keeps the last output of a stack alone, would give it a wrong one.

    Args:
        loaded: the model.
        blocks: names of the blocks, and for each the stack it belongs to.
        call: arguments of the model, to try it with.
        dtype: of the forward passes.
    """
    keep = not loaded.streams
    loaded.materialize("", without=frozenset(blocks), dtype=dtype)
    try:
        with (
            calibration_mode(loaded.model),
            without_cache(loaded.model),
            cast_parameters(modules_outside(loaded.model, blocks), dtype, restore=keep, recurse=False),
            BlockWalk(loaded.model, blocks, cast_inputs([call], dtype), checks=True) as walk,
        ):
            while (reached := walk.next_block()) is not None:
                name, calls = reached
                loaded.materialize(name, dtype=dtype)
                block = loaded.model.get_submodule(name)
                with cast_parameters([block], dtype, restore=keep):
                    outputs = [block(*each.args, **each.kwargs) for each in calls]
                loaded.release(name)
                walk.finish(outputs)
            walk.check_rest()
    except UnsupportedModelError:
        return False
    finally:
        loaded.release("")
    return True
