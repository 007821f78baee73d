"""LSTM, GRU and plain recurrent layers whose weights are packed layouts: products over time, and torch between them.

The inputs of all steps meet their weight in one product; the hidden states meet theirs step by step, in one call of the
kernels unless somebody wants a gradient.

Legend of shape suffixes: B batch, L steps, T rows, I inputs, H hidden units, O what a step hands on (H, or fewer where
it is projected), G gates times H.
"""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rarefy.core.errors import UsageError
from rarefy.kernels import Prepared, Steps, run_steps
from rarefy.nn.holder import LayoutHolder
from rarefy.nn.linear import CompressedLinear
from rarefy.nn.matrices import LayerKind, Matrix, Packed, missing_parameter

_SUPPORTED = (nn.LSTM, nn.GRU, nn.RNN)

State = tuple[Tensor, Tensor]
"""Hidden and cell state, (B, O) and (B, H); other than an LSTM has a cell state of no use."""


@final
@dataclass(frozen=True)
class _Shape:
    """What a recurrent layer is, apart from its weights."""

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    @classmethod
    def of(cls, module: nn.RNNBase) -> "_Shape":
        """That of a torch module."""
        return cls(
            module.mode,
            module.input_size,
            module.hidden_size,
            module.num_layers,
            module.bias,
            module.batch_first,
            module.dropout,
            module.bidirectional,
            module.proj_size,
        )

    @property
    def num_directions(self) -> int:
        """1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Width of what one direction hands on."""
        return self.proj_size or self.hidden_size


def _suffixes(shape: _Shape) -> list[list[str]]:
    """For each layer the ends of the parameters' names, one for each direction."""
    ends = ["", "_reverse"][: shape.num_directions]
    return [[f"_l{layer}{end}" for end in ends] for layer in range(shape.num_layers)]


@final
class PackedRecurrent(nn.Module):
    """What `nn.LSTM`, `nn.GRU` and `nn.RNN` compute, with packed weights under torch's names (`weight_hh_l0`, ...).

    A weight that is not packed stays the parameter that it was.

    Args:
        module: the layer to stand in for; its biases and unpacked weights become this one's.
        packed: for each packed weight its format, and the module whose arrays it shares.
        device: where to allocate the buffers.

    Notes:
        The packed weights are frozen; gradients flow to the inputs, states, biases and unpacked weights as
        `CompressedLinear` lets them. Dropout between layers works in training, as torch's.
    """

    def __init__(self, module: nn.RNNBase, packed: Mapping[str, Packed], device: torch.device | str) -> None:
        super().__init__()
        self.shape = _Shape.of(module)
        self.batch_first, self.hidden_size, self.num_layers = module.batch_first, module.hidden_size, module.num_layers
        self.input_size, self.bidirectional = module.input_size, module.bidirectional
        # Calibration looks on here: told the name of each weight and the rows that it met, once a call.
        self.watch: Callable[[str, Tensor], None] | None = None
        for name, parameter in module._parameters.items():
            if name not in packed:
                self.register_parameter(name, parameter)
                continue
            spec = packed[name].spec
            layer = CompressedLinear(spec.format_name, spec.meta, source=packed[name].source, device=device)
            self.add_module(name, layer)

    def flatten_parameters(self) -> None:
        """Do nothing; torch's layers have it for GPUs, and models call it."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | State | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Run the layer over sequences.

        Args:
            input: (L, B, I), (B, L, I) if `batch_first`, (L, I) without a batch, or a PackedSequence.
            hx: the first hidden state (layers * directions, B, O), of an LSTM with the first cell state; zeros if None.

        Returns:
            What the last layer gave at every step, in the form of the input, and the last states, in that of `hx`.

        Raises:
            UsageError: the input has another width, is not floating, or is not on the CPU.
        """
        x_LBI, lengths = _unpacked(input, self.shape)
        states = self._states(hx, x_LBI, input)
        last: list[State] = []
        for number, suffixes in enumerate(_suffixes(self.shape)):
            if number and self.shape.dropout:
                x_LBI = nn.functional.dropout(x_LBI, self.shape.dropout, self.training)
            outputs = []
            for suffix in suffixes:
                y_LBO, state = self._direction(suffix, x_LBI, states[len(last)], lengths)
                outputs.append(y_LBO)
                last.append(state)
            x_LBI = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        hidden, cell = (torch.stack(parts) for parts in zip(*last, strict=True))
        if isinstance(input, PackedSequence):
            order = input.unsorted_indices
            if order is not None:
                hidden, cell = hidden.index_select(1, order), cell.index_select(1, order)
            assert lengths is not None
            data = pack_padded_sequence(x_LBI, lengths).data
            y: Tensor | PackedSequence = PackedSequence(
                data, input.batch_sizes, input.sorted_indices, input.unsorted_indices
            )
        elif input.ndim == 2:
            y, hidden, cell = x_LBI[:, 0], hidden[:, 0], cell[:, 0]
        else:
            y = x_LBI.transpose(0, 1) if self.shape.batch_first else x_LBI
        return y, (hidden, cell) if self.shape.mode == "LSTM" else hidden

    def _states(self, hx: Tensor | State | None, x_LBI: Tensor, input: Tensor | PackedSequence) -> list[State]:
        """The first state of each layer and direction."""
        shape, num_batch = self.shape, x_LBI.shape[1]
        count = shape.num_layers * shape.num_directions
        zeros = x_LBI.new_zeros
        if hx is None:
            hidden, cell = (zeros(count, num_batch, width) for width in (shape.output_size, shape.hidden_size))
        elif isinstance(hx, Tensor):
            hidden, cell = hx, zeros(count, num_batch, shape.hidden_size)
        else:
            hidden, cell = hx
        if hx is not None and not isinstance(input, PackedSequence) and input.ndim == 2:
            hidden = hidden[:, None]
            cell = cell if isinstance(hx, Tensor) else cell[:, None]
        if isinstance(input, PackedSequence) and hx is not None and input.sorted_indices is not None:
            hidden, cell = (state.index_select(1, input.sorted_indices) for state in (hidden, cell))
        for name, state, width in (("hidden", hidden, shape.output_size), ("cell", cell, shape.hidden_size)):
            if tuple(state.shape) != (count, num_batch, width):
                raise UsageError(
                    f"{shape.mode} {name} state", f"shape {tuple(state.shape)}", allowed=f"{(count, num_batch, width)}"
                )
        return list(zip(hidden.unbind(0), cell.unbind(0), strict=True))

    def _direction(self, suffix: str, x_LBI: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        """Run one layer in one direction; what it gives at every step, and the state after the last."""
        mode = self.shape.mode
        gates_LBG = self._times(f"weight_ih{suffix}", x_LBI)
        projection = f"weight_hr{suffix}" if self.shape.proj_size else None
        if self._needs_no_torch(suffix, gates_LBG):
            return self._in_kernels(suffix, gates_LBG, state, lengths)
        hidden_bias: Tensor | None = None
        if self.shape.bias:
            gates_LBG = gates_LBG + self.get_parameter(f"bias_ih{suffix}")
            hidden_bias = self.get_parameter(f"bias_hh{suffix}")
            if mode != "GRU":  # there a gate multiplies what comes of the hidden state, its bias included
                gates_LBG, hidden_bias = gates_LBG + hidden_bias, None
        num_steps = x_LBI.shape[0]
        outputs: list[Tensor] = [state[0]] * num_steps
        met: list[Tensor] = [state[0]] * num_steps
        unprojected: list[Tensor] = [state[1]] * num_steps
        steps = range(num_steps - 1, -1, -1) if suffix.endswith("_reverse") else range(num_steps)
        for step in steps:
            before = state
            met[step] = state[0]
            recurrent_BG = self._times(f"weight_hh{suffix}", state[0])
            if hidden_bias is not None:
                recurrent_BG = recurrent_BG + hidden_bias
            hidden, cell = _step(mode, gates_LBG[step], recurrent_BG, state)
            if projection is not None:
                unprojected[step] = hidden
                hidden = self._times(projection, hidden)
            state = (hidden, cell)
            if lengths is not None:  # sequences that end before this step keep their state
                inside = (lengths > step)[:, None]
                state = (torch.where(inside, hidden, before[0]), torch.where(inside, cell, before[1]))
            outputs[step] = hidden
        if self.watch is not None:
            self._show(f"weight_ih{suffix}", x_LBI, lengths)
            self._show(f"weight_hh{suffix}", torch.stack(met), lengths)
            if projection is not None:
                self._show(projection, torch.stack(unprojected), lengths)
        return torch.stack(outputs), state

    def _show(self, name: str, x_LBI: Tensor, lengths: Tensor | None) -> None:
        """Tell whoever looks on which rows a weight met; what lies behind the end of a sequence is none."""
        assert self.watch is not None
        if lengths is None:
            self.watch(name, x_LBI.reshape(-1, x_LBI.shape[-1]))
        else:
            self.watch(name, x_LBI[torch.arange(len(x_LBI))[:, None] < lengths])

    def _times(self, name: str, x: Tensor) -> Tensor:
        module = self._modules.get(name)
        if module is None:
            return nn.functional.linear(x, self.get_parameter(name).to(x.dtype))
        y: Tensor = module(x)
        return y

    def _needs_no_torch(self, suffix: str, gates_LBG: Tensor) -> bool:
        """Whether the kernels take all steps: nobody wants a gradient, and the weights that they meet are packed."""
        ends = ("weight_hh", "weight_hr") if self.shape.proj_size else ("weight_hh",)
        return (
            not torch.is_grad_enabled()
            and gates_LBG.dtype == torch.float32
            and all(isinstance(self._modules.get(end + suffix), CompressedLinear) for end in ends)
        )

    def _in_kernels(self, suffix: str, gates_LBG: Tensor, state: State, lengths: Tensor | None) -> tuple[Tensor, State]:
        bias = self.shape.bias
        steps = Steps(
            mode=self.shape.mode,
            x_LBG=_floats(gates_LBG),
            input_bias_G=_floats(self.get_parameter(f"bias_ih{suffix}")) if bias else None,
            hidden_bias_G=_floats(self.get_parameter(f"bias_hh{suffix}")) if bias else None,
            meet_hidden=self._prepared(f"weight_hh{suffix}"),
            project=self._prepared(f"weight_hr{suffix}") if self.shape.proj_size else None,
            hidden_BO=_floats(state[0]),
            cell_BH=_floats(state[1]) if self.shape.mode == "LSTM" else None,
            lengths_B=None if lengths is None else lengths.numpy(),
            reverse=suffix.endswith("_reverse"),
        )
        y_LBO, hidden, cell = run_steps(steps)
        last_cell = state[1] if cell is None else torch.from_numpy(cell)
        return torch.from_numpy(y_LBO), (torch.from_numpy(hidden), last_cell)

    def _prepared(self, name: str) -> Prepared:
        layer = self.get_submodule(name)
        assert isinstance(layer, CompressedLinear)
        return layer.prepared

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        shape = self.shape
        return f"{shape.mode}, {shape.input_size}, {shape.hidden_size}, num_layers={shape.num_layers}"


def _floats(x: Tensor) -> NDArray[np.float32]:
    """As the kernels take them."""
    return x.detach().to(torch.float32).contiguous().numpy()


def _step(mode: str, gates_BG: Tensor, recurrent_BG: Tensor, state: State) -> State:
    """One step from the two products, with their biases; the formulas of torch's documentation."""
    hidden, cell = state
    match mode:
        case "LSTM":
            i, f, g, o = (gates_BG + recurrent_BG).chunk(4, dim=-1)
            cell = torch.addcmul(torch.sigmoid(i) * torch.tanh(g), torch.sigmoid(f), cell)
            return torch.sigmoid(o) * torch.tanh(cell), cell
        case "GRU":
            r, z, n = gates_BG.chunk(3, dim=-1)
            recurrent_r, recurrent_z, recurrent_n = recurrent_BG.chunk(3, dim=-1)
            n = torch.tanh(n + torch.sigmoid(r + recurrent_r) * recurrent_n)
            return torch.lerp(n, hidden, torch.sigmoid(z + recurrent_z)), cell
        case "RNN_TANH":
            return torch.tanh(gates_BG + recurrent_BG), cell
        case _:
            return torch.relu(gates_BG + recurrent_BG), cell


def _unpacked(input: Tensor | PackedSequence, shape: _Shape) -> tuple[Tensor, Tensor | None]:
    """The input as (L, B, I), and the lengths of its sequences if they differ.

    Raises:
        UsageError: it does not fit the layer.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    num_axes = (2,) if isinstance(input, PackedSequence) else (2, 3)
    if data.ndim not in num_axes or data.shape[-1] != shape.input_size or not data.is_floating_point():
        raise UsageError(
            f"{shape.mode} input",
            f"{data.dtype} of shape {tuple(data.shape)}",
            allowed=f"float (steps, batch, {shape.input_size}), batch first if the layer is so, or without a batch",
        )
    steps = data.shape[1 if shape.batch_first and data.ndim == 3 else 0]
    if steps == 0:
        raise UsageError(f"{shape.mode} input", f"shape {tuple(data.shape)}", allowed="at least one step")
    if isinstance(input, PackedSequence):
        plain = PackedSequence(input.data, input.batch_sizes)
        x_LBI, lengths = pad_packed_sequence(plain)
        return x_LBI, lengths
    if data.ndim == 2:
        return data[:, None], None
    return (data.transpose(0, 1) if shape.batch_first else data), None


@final
class RecurrentKind:
    """`nn.LSTM`, `nn.GRU` and `nn.RNN`, whose every weight is a matrix of its own under its own name."""

    def covers(self, module: nn.Module) -> bool:
        """See Kind."""
        return isinstance(module, nn.RNNBase | nn.RNNCellBase)

    def label(self, _: nn.Module) -> LayerKind:
        """See Kind."""
        return "recurrent"

    def why_not(self, module: nn.Module) -> str | None:
        """Only the very class will do: what a subclass computes is not known."""
        if isinstance(module, nn.RNNCellBase):
            return f"{type(module).__name__}, a single step, has no packed counterpart"
        if type(module) not in _SUPPORTED:
            return f"{type(module).__name__} is a recurrent layer with a forward pass of its own"
        assert isinstance(module, nn.RNNBase)
        return next((why for name in _weight_names(module) if (why := missing_parameter(module, name))), None)

    def matrices(self, module: nn.Module) -> tuple[Matrix, ...]:
        """See Kind."""
        assert isinstance(module, nn.RNNBase)
        found = []
        for name in _weight_names(module):
            rows, width = module.get_parameter(name).shape
            found.append(Matrix(name, name, (rows, width), bias=name.replace("weight", "bias", 1)))
        return tuple(found)

    def rows_key(self, _: nn.Module) -> Hashable:
        """Hidden states are no other layer's."""
        return None

    def rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Collection[str]
    ) -> Iterator[tuple[str, int, Tensor]]:
        """The hidden states inside are seen by running the same layer, step by step, beside the model's own.

        The rows of one call are held together: they are as many numbers as the layer hands on.
        """
        assert isinstance(module, nn.RNNBase)
        met: list[tuple[str, int, Tensor]] = []
        beside = PackedRecurrent(module, {}, "cpu").eval()
        beside.watch = lambda name, x_TI: met.append((name, 0, x_TI)) if name in names else None
        beside(*args, **kwargs)
        yield from met

    def pack(
        self, module: nn.Module, packed: Mapping[str, Packed], device: torch.device | str
    ) -> tuple[nn.Module, dict[str, LayoutHolder]]:
        """See Kind."""
        assert isinstance(module, nn.RNNBase)
        new = PackedRecurrent(module, packed, device)
        return new, {name: new.get_submodule(name) for name in packed}  # type: ignore[misc]


def _weight_names(module: nn.RNNBase) -> list[str]:
    parts = ["weight_ih", "weight_hh", *(["weight_hr"] if module.proj_size else [])]
    return [part + suffix for layer in _suffixes(_Shape.of(module)) for suffix in layer for part in parts]
