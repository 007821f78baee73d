"""The steps of a recurrent layer in numpy: what torch's small operations would take most of the time for.

Torch hands sigmoid and tanh of a few hundred numbers to several threads, whose start and end cost many times the work,
and keep the processors from the threads of the products between them.

Legend of shape suffixes: L steps, B batch, G gates times H, H hidden units, O what a step hands on.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_HALF, _ONE = np.float32(0.5), np.float32(1)


def run_steps(
    mode: str,
    gates_LBG: Array,
    hidden_bias_G: Array | None,
    meet_hidden: Callable[[Array], Array],
    project: Callable[[Array], Array] | None,
    hidden_BO: Array,
    cell_BH: Array,
    lengths_B: npt.NDArray[np.int64] | None,
    *,
    reverse: bool,
) -> tuple[Array, Array, Array]:
    """Run one layer in one direction.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        gates_LBG: the products with the inputs, and their bias; for all but a GRU that of the states too.
        hidden_bias_G: of a GRU the bias of the products with the states.
        meet_hidden: the product with the states; its result is written to.
        project: what an LSTM with projections hands on of a hidden state.
        hidden_BO: the state before the first step.
        cell_BH: that of an LSTM's cells.
        lengths_B: of the sequences if they differ.
        reverse: from the last step to the first.

    Returns:
        What each step hands on (L, B, O), and the states after the last; where a sequence has ended, any numbers.
    """
    num_steps, width = len(gates_LBG), cell_BH.shape[1]
    # All gates of an LSTM at once: sigmoid(x) = tanh(x / 2) / 2 + 1 / 2, and of the third one tanh(x).
    scale_G, shift_G = np.full(4 * width, _HALF), np.full(4 * width, _HALF)
    scale_G[2 * width : 3 * width], shift_G[2 * width : 3 * width] = 1, 0
    y_LBO = np.empty((num_steps, *hidden_BO.shape), np.float32)
    for step in range(num_steps - 1, -1, -1) if reverse else range(num_steps):
        recurrent_BG = meet_hidden(hidden_BO)
        if hidden_bias_G is not None:
            recurrent_BG += hidden_bias_G
        if mode == "LSTM":
            hidden, cell = _lstm_step(gates_LBG[step], recurrent_BG, cell_BH, scale_G, shift_G)
        else:
            hidden, cell = _step(mode, gates_LBG[step], recurrent_BG, hidden_BO), cell_BH
        if project is not None:
            hidden = project(hidden)
        y_LBO[step] = hidden
        if lengths_B is not None:  # sequences that end before this step keep their state
            inside = (lengths_B > step)[:, None]
            hidden, cell = np.where(inside, hidden, hidden_BO), np.where(inside, cell, cell_BH)
        hidden_BO, cell_BH = hidden, cell
    return y_LBO, hidden_BO, cell_BH


def _lstm_step(
    gates_BG: Array, recurrent_BG: Array, cell_BH: Array, scale_G: Array, shift_G: Array
) -> tuple[Array, Array]:
    """One step of an LSTM: the hidden state and the cells after it."""
    width = cell_BH.shape[1]
    recurrent_BG += gates_BG
    recurrent_BG *= scale_G
    np.tanh(recurrent_BG, out=recurrent_BG)
    recurrent_BG *= scale_G
    recurrent_BG += shift_G
    i, f, g, o = (recurrent_BG[:, k * width : (k + 1) * width] for k in range(4))
    i *= g
    cell = f * cell_BH
    cell += i
    hidden = np.tanh(cell)
    hidden *= o
    return hidden, cell


def _step(mode: str, gates_BG: Array, recurrent_BG: Array, hidden_BO: Array) -> Array:
    """One step of another one: its hidden state. The formulas are those of torch's documentation, and `recurrent_BG`
    is where they are computed."""
    match mode:
        case "GRU":
            width = hidden_BO.shape[1]
            recurrent_BG[:, : 2 * width] += gates_BG[:, : 2 * width]
            _sigmoid(recurrent_BG[:, : 2 * width])
            r, z, n = (recurrent_BG[:, k * width : (k + 1) * width] for k in range(3))
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
