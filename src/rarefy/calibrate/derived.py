"""What blocks are given, where it follows from the outputs of others and from what the blocks before them were given.

In a row of blocks that is nearly all: the hidden states are the block's before, masks and positions are what that was
given. The first sample shows how they follow, so that the model need not run up to the block for every other sample.
Whether they do follow so for a sample is seen at the end, when the model runs with all outputs in place (`agrees`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from rarefy.calibrate.calls import Call, Place, same, substitute

# A value: of what a block returned, or of what it was given, and where it lies in that.
_Source = tuple[str, Place]


@final
@dataclass(frozen=True)
class _Arguments:
    """A block's arguments: the first sample's without its tensors, and where the values at their places come from."""

    call: Call
    returned: Mapping[Place, _Source]
    given: Mapping[Place, _Source]


@final
@dataclass
class DerivedCalls:
    """The calls of blocks whose arguments follow from others. Blocks come in the order in which the model calls them.

    Args:
        num_samples: how many there are.
        source_of: the block that returned a tensor, as it is, and the tensor's place in that; None: none did.
    """

    num_samples: int
    source_of: Callable[[Tensor], _Source | None]
    _arguments: dict[str, _Arguments] = field(default_factory=dict)
    # what blocks were given that none returned, of each sample, and the first sample's arguments of the last block
    _given: dict[_Source, list[Any]] = field(default_factory=dict)
    _last: tuple[str, Mapping[Place, Any]] = field(default_factory=lambda: ("", {}))

    def __contains__(self, block: str) -> bool:
        return block in self._arguments

    def see(self, block: str, sample: int, call: Call) -> None:
        """Learn from a call that the model made; all samples in their order where a block is not derived."""
        leaves = call.leaves()
        if sample == 0:
            self._relate(block, call, leaves)
        if block in self._arguments:
            return
        for path, leaf in leaves.items():
            if not isinstance(leaf, Tensor) or (self.source_of(leaf) is None and not leaf.requires_grad):
                self._given.setdefault((block, path), []).append(leaf)

    def call(self, block: str, sample: int, returned: Callable[[str, Place], Tensor]) -> Call:
        """What a sample gives a block.

        Args:
            block: a derived one.
            sample: its number.
            returned: gives what a block returned for the sample, at a place in it.
        """
        own = self._arguments[block]
        values = {path: self._given[source][sample] for path, source in own.given.items()}
        values |= {path: returned(*source) for path, source in own.returned.items()}
        return Call(*substitute((own.call.args, own.call.kwargs), values))

    def agrees(self, block: str, sample: int, call: Call) -> bool:
        """Whether a call that the model made is the one that is derived."""
        own, leaves = self._arguments[block], call.leaves()
        return leaves.keys() == own.call.leaves().keys() and all(
            self.source_of(leaf) == own.returned[path]
            if path in own.returned
            else same(leaf, self._given[own.given[path]][sample])
            for path, leaf in leaves.items()
        )

    def _relate(self, block: str, call: Call, leaves: Mapping[Place, Any]) -> None:
        """From the first sample: where each value comes from, if it is known of all."""
        before, before_leaves = self._last
        returned: dict[Place, _Source] = {}
        given: dict[Place, _Source] = {}
        for path, leaf in leaves.items():
            source = self.source_of(leaf) if isinstance(leaf, Tensor) else None
            if source is not None:
                returned[path] = source
            elif (
                path in before_leaves and same(leaf, before_leaves[path]) and not getattr(leaf, "requires_grad", False)
            ):
                earlier = self._arguments.get(before)
                given[path] = (before, path) if earlier is None else earlier.given.get(path, (before, path))
        known = all(len(self._given.get(source, ())) == self.num_samples for source in given.values())
        if before and known and len(returned) + len(given) == len(leaves):
            blank = substitute((call.args, call.kwargs), dict.fromkeys(leaves))
            self._arguments[block] = _Arguments(Call(*blank), returned, given)
        needed = {source for own in self._arguments.values() for source in own.given.values()}
        self._given = {source: values for source, values in self._given.items() if source in needed}
        self._last = block, leaves
