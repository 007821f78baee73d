"""How long a text a model can read."""

from torch import nn


def num_positions(model: nn.Module) -> int | None:
    """The most tokens that a model has positions for; None where nothing says so.

    A table of learned positions is exact. RoBERTa's kind starts behind the padding index, so its configuration promises
    more than can be used. Without such a table the configuration's max_position_embeddings is the answer.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
