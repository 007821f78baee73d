"""The loss whose gradients are taken. Shape suffixes: B samples, L tokens, V vocabulary entries or classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rarefy.calibrate.calls import Call
from rarefy.core.errors import UnsupportedModelError, UsageError

_PREDICTIONS_AT_ONCE = 64

# The model's output and the labels (None where there are none), to a scalar.
Loss = Callable[[Any, Tensor | None], Tensor]


def negative_log_likelihood(
    model: nn.Module, call: Call, output: Any, labels: Tensor | None, generator: torch.Generator
) -> Tensor:
    """How unlikely the model finds what is true of a sample: the mean over its predictions.

    - Labels in the call, of which the model made a loss of its own: that.
    - Labels given: cross-entropy of classes, half the squared error of numbers.
    - A language model, text: cross-entropy of the next token; of an encoder-decoder, of the next one to give back.
    - Else labels are drawn from the model's own prediction, which makes the mean of g g^T the true Fisher matrix and
      not the empirical one: classes where the output has `logits`, and otherwise, as for encoders that embed, numbers
      from the normal distribution around the first tensor of the output (g = J^T noise, so that the mean of g g^T is
      J^T J: what moves the outputs, counts).

    Args:
        model: the model.
        call: its arguments.
        output: what it returned.
        labels: of the samples, or None.
        generator: of what is drawn.

    Raises:
        UnsupportedModelError: nothing in the output is a tensor of floating-point numbers.
        UsageError: labels that do not fit the output.

    References:
        Kunstner et al., Limitations of the Empirical Fisher Approximation, arXiv:1905.12558, equations 2 and 3.
    """
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor) and labels is None:
        return own.float()
    logits = getattr(output, "logits", None)
    prediction: Tensor = _first_tensor(model, output) if logits is None else logits
    if labels is not None:
        return _against(prediction, labels)
    given_back = call.kwargs.get("decoder_input_ids")
    ids = call.kwargs.get("input_ids") if given_back is None else given_back
    predicts = given_back is not None or _predicts_the_next_token(model)
    if predicts and isinstance(logits, Tensor) and isinstance(ids, Tensor) and ids.shape[1] > 1:
        return _cross_entropy(prediction[:, :-1], ids[:, 1:])
    with torch.no_grad():
        if isinstance(logits, Tensor):
            chances = torch.softmax(prediction.float(), dim=-1).flatten(0, -2)
            drawn = torch.multinomial(chances, 1, generator=generator).view(prediction.shape[:-1])
        else:
            drawn = prediction.float() + torch.randn(prediction.shape, generator=generator)
    return _against(prediction, drawn)


def _against(prediction: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        if labels.shape != prediction.shape:
            raise UsageError(
                "labels", f"numbers of shape {tuple(labels.shape)}", allowed=f"the output's {tuple(prediction.shape)}"
            )
        return 0.5 * nn.functional.mse_loss(prediction.float(), labels.float())
    if prediction.ndim < 2 or labels.shape != prediction.shape[:-1]:
        raise UsageError(
            "labels",
            f"classes of shape {tuple(labels.shape)}",
            allowed=f"{tuple(prediction.shape[:-1])}, for an output of shape {tuple(prediction.shape)}",
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < prediction.shape[-1]:
        raise UsageError("labels", f"class {int(labels.max())}", allowed=f"0 to {prediction.shape[-1] - 1}")
    return _cross_entropy(prediction, labels)


def _cross_entropy(prediction: Tensor, labels: Tensor) -> Tensor:
    """The mean over predictions, in float32."""
    value: Tensor = _CrossEntropy.apply(prediction.flatten(0, -2), labels.flatten().long())  # type: ignore[no-untyped-call]
    return value


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradient is made with it, for a few predictions at a time.

    Over a large vocabulary the chances of all predictions in float32 are more than everything else that a sample needs.
    """

    @staticmethod
    def forward(ctx: Any, prediction_TV: Tensor, label_T: Tensor) -> Tensor:
        """The mean of -log p(label)."""
        num_predictions = len(label_T)
        gradient_TV = torch.empty_like(prediction_TV)
        total = torch.zeros((), dtype=torch.float32)
        for start in range(0, num_predictions, _PREDICTIONS_AT_ONCE):
            piece = slice(start, start + _PREDICTIONS_AT_ONCE)
            chance_TV = torch.log_softmax(prediction_TV[piece].float(), dim=-1)
            label_T1 = label_T[piece, None]
            total -= chance_TV.gather(1, label_T1).sum()
            chance_TV.exp_().scatter_add_(1, label_T1, torch.full(label_T1.shape, -1.0))
            gradient_TV[piece] = chance_TV.div_(num_predictions)
        ctx.save_for_backward(gradient_TV)
        return total / num_predictions

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """p - [label], over the number of predictions."""
        (gradient_TV,) = ctx.saved_tensors
        return gradient_TV if float(gradient) == 1 else gradient_TV * gradient.to(gradient_TV.dtype), None


def _predicts_the_next_token(model: nn.Module) -> bool:
    return type(model).__name__ in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def _first_tensor(model: nn.Module, output: Any) -> Tensor:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else (output,)
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise UnsupportedModelError(
        type(model).__name__,
        f"its output is {type(output).__name__}, in which there is nothing to make a loss of",
        hint="pass `loss` to rarefy.compress in Python",
    )
