"""The steps of a recurrent layer in one direction: in one call of the extension (native/recurrent), or in numpy.

Torch would hand sigmoid and tanh of a few hundred numbers to several threads, whose start and end cost many times the
work, and which keep the processors from the threads of the products between them.

Legend of shape suffixes: L steps, B sequences, G gates times H, H hidden units, O what a step hands on.
"""

from dataclasses import dataclass
from typing import Final, final

import numpy as np
import numpy.typing as npt

from rarefy.kernels.extension import native
from rarefy.kernels.products import Prepared

Array = npt.NDArray[np.float32]

MODES: Final[dict[str, int]] = {"LSTM": 0, "GRU": 1, "RNN_TANH": 2, "RNN_RELU": 3}
"""Torch's names of what a layer computes -> the extension's number."""

_HALF, _ONE = np.float32(0.5), np.float32(1)


@final
@dataclass(frozen=True)
class Steps:
    """What one layer is to do in one direction. All arrays are C-contiguous.

    Attributes:
        mode: a key of `MODES`.
        x_LBG: the products with the inputs.
        input_bias_G: their bias.
        hidden_bias_G: the bias of the products with the states.
        meet_hidden: the weight of the states, (G, O).
        project: (O, H), what an LSTM with projections hands on of a hidden state.
        hidden_BO: the state before the first step.
        cell_BH: that of an LSTM's cells; else None.
        lengths_B: of the sequences if they differ, the longest first.
        reverse: from the last step to the first.
    """

    mode: str
    x_LBG: Array
    input_bias_G: Array | None
    hidden_bias_G: Array | None
    meet_hidden: Prepared
    project: Prepared | None
    hidden_BO: Array
    cell_BH: Array | None
    lengths_B: npt.NDArray[np.int64] | None
    reverse: bool


def run_steps(steps: Steps) -> tuple[Array, Array, Array | None]:
    """Run one layer in one direction.

    Returns:
        What each step hands on (L, B, O), zeros where a sequence has ended, and the states after the last; new arrays.
    """
    weight, project = steps.meet_hidden.weights, None if steps.project is None else steps.project.weights
    module = None if weight is None or (steps.project is not None and project is None) else native()
    if module is None:
        return run_in_numpy(steps)
    made: tuple[Array, Array, Array | None] = module.run_recurrent(
        steps.meet_hidden.isa,
        MODES[steps.mode],
        steps.x_LBG,
        steps.input_bias_G,
        steps.hidden_bias_G,
        weight,
        project,
        steps.hidden_BO,
        steps.cell_BH,
        steps.lengths_B,
        steps.reverse,
    )
    return made


def run_in_numpy(steps: Steps) -> tuple[Array, Array, Array | None]:
    """`run_steps` without the extension, up to float32 rounding."""
    num_steps = len(steps.x_LBG)
    y_LBO = np.zeros((num_steps, *steps.hidden_BO.shape), np.float32)
    hidden_BO, cell_BH = steps.hidden_BO.copy(), None if steps.cell_BH is None else steps.cell_BH.copy()
    for step in range(num_steps - 1, -1, -1) if steps.reverse else range(num_steps):
        count = len(hidden_BO) if steps.lengths_B is None else int(np.count_nonzero(steps.lengths_B > step))
        # The states of sequences that end before this step are left as they are.
        before_BO, gates_BG = hidden_BO[:count], steps.x_LBG[step, :count]
        if steps.input_bias_G is not None:
            gates_BG = gates_BG + steps.input_bias_G
        recurrent_BG = steps.meet_hidden.matmul(before_BO)
        if steps.hidden_bias_G is not None:
            recurrent_BG += steps.hidden_bias_G
        if cell_BH is None:
            hidden = _step(steps.mode, gates_BG, recurrent_BG, before_BO)
        else:
            hidden = _lstm_step(gates_BG, recurrent_BG, cell_BH[:count])
        if steps.project is not None:
            hidden = steps.project.matmul(hidden)
        y_LBO[step, :count] = hidden
        before_BO[...] = hidden
    return y_LBO, hidden_BO, cell_BH


def _lstm_step(gates_BG: Array, recurrent_BG: Array, cell_BH: Array) -> Array:
    """One step of an LSTM: the hidden state, and the cells in place."""
    recurrent_BG += gates_BG
    i, f, g, o = np.split(recurrent_BG, 4, axis=1)
    for gate in (i, f, o):
        _sigmoid(gate)
    cell_BH *= f
    cell_BH += i * np.tanh(g)
    return np.tanh(cell_BH) * o


def _step(mode: str, gates_BG: Array, recurrent_BG: Array, hidden_BO: Array) -> Array:
    """One step of another one: its hidden state. The formulas are those of torch's documentation, and `recurrent_BG`
    is where they are computed."""
    match mode:
        case "GRU":
            width = hidden_BO.shape[1]
            recurrent_BG[:, : 2 * width] += gates_BG[:, : 2 * width]
            _sigmoid(recurrent_BG[:, : 2 * width])
            r, z, n = np.split(recurrent_BG, 3, axis=1)
            n *= r
            n += gates_BG[:, 2 * width :]
            np.tanh(n, out=n)
            hidden = hidden_BO - n
            hidden *= z
            hidden += n
            return hidden
        case "RNN_TANH":
            recurrent_BG += gates_BG
            np.tanh(recurrent_BG, out=recurrent_BG)
            return recurrent_BG
        case _:
            recurrent_BG += gates_BG
            np.maximum(recurrent_BG, 0, out=recurrent_BG)
            return recurrent_BG


def _sigmoid(x: Array) -> None:
    """1 / (1 + exp(-x)) in place, as (1 + tanh(x / 2)) / 2, which cannot overflow."""
    x *= _HALF
    np.tanh(x, out=x)
    x += _ONE
    x *= _HALF
