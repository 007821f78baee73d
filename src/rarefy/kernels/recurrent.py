"""The steps of a recurrent layer in one direction: in one call of the extension (native/recurrent), or in numpy.

Torch would hand sigmoid and tanh of a few hundred numbers to several threads, whose start and end cost many times the
work, and which keep the processors from the threads of the products between them.

Legend of shape suffixes: L steps, B sequences, G gates times H, H hidden units, O what a step hands on.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from rarefy.kernels.extension import native
from rarefy.kernels.products import Prepared

Array = npt.NDArray[np.float32]

MODES: Final[dict[str, int]] = {"LSTM": 0, "GRU": 1, "RNN_TANH": 2, "RNN_RELU": 3}
"""Torch's names of what a layer computes -> the extension's number."""

_HALF, _ONE = np.float32(0.5), np.float32(1)


def run_steps(
    mode: str,
    x_LBG: Array,
    input_bias_G: Array | None,
    hidden_bias_G: Array | None,
    meet_hidden: Prepared,
    project: Prepared | None,
    hidden_BO: Array,
    cell_BH: Array | None,
    lengths_B: npt.NDArray[np.int64] | None,
    *,
    reverse: bool,
) -> tuple[Array, Array, Array | None]:
    """Run one layer in one direction.

    Args:
        mode: a key of `MODES`.
        x_LBG: the products with the inputs; as all arrays C-contiguous.
        input_bias_G: their bias.
        hidden_bias_G: the bias of the products with the states.
        meet_hidden: the weight of the states, (G, O).
        project: (O, H), what an LSTM with projections hands on of a hidden state.
        hidden_BO: the state before the first step.
        cell_BH: that of an LSTM's cells; else None.
        lengths_B: of the sequences if they differ, the longest first.
        reverse: from the last step to the first.

    Returns:
        What each step hands on (L, B, O), zeros where a sequence has ended, and the states after the last; new arrays.
    """
    operators = meet_hidden.weights, None if project is None else project.weights
    module = None if operators[0] is None or (project is not None and operators[1] is None) else native()
    if module is None:
        return run_in_numpy(
            *(mode, x_LBG, input_bias_G, hidden_bias_G, meet_hidden, project, hidden_BO, cell_BH, lengths_B),
            reverse=reverse,
        )
    made: tuple[Array, Array, Array | None] = module.run_recurrent(
        *(meet_hidden.isa, MODES[mode], x_LBG, input_bias_G, hidden_bias_G, *operators, hidden_BO, cell_BH, lengths_B),
        reverse,
    )
    return made


def run_in_numpy(
    mode: str,
    x_LBG: Array,
    input_bias_G: Array | None,
    hidden_bias_G: Array | None,
    meet_hidden: Prepared,
    project: Prepared | None,
    hidden_BO: Array,
    cell_BH: Array | None,
    lengths_B: npt.NDArray[np.int64] | None,
    *,
    reverse: bool,
) -> tuple[Array, Array, Array | None]:
    """`run_steps` without the extension, up to float32 rounding."""
    num_steps = len(x_LBG)
    y_LBO = np.zeros((num_steps, *hidden_BO.shape), np.float32)
    hidden_BO, cell_BH = hidden_BO.copy(), None if cell_BH is None else cell_BH.copy()
    for step in range(num_steps - 1, -1, -1) if reverse else range(num_steps):
        count = len(hidden_BO) if lengths_B is None else int(np.count_nonzero(lengths_B > step))
        # The states of sequences that end before this step are left as they are.
        before_BO, gates_BG = hidden_BO[:count], x_LBG[step, :count]
        if input_bias_G is not None:
            gates_BG = gates_BG + input_bias_G
        recurrent_BG = meet_hidden.matmul(before_BO)
        if hidden_bias_G is not None:
            recurrent_BG += hidden_bias_G
        if cell_BH is None:
            hidden = _step(mode, gates_BG, recurrent_BG, before_BO)
        else:
            hidden = _lstm_step(gates_BG, recurrent_BG, cell_BH[:count])
        if project is not None:
            hidden = project.matmul(hidden)
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
