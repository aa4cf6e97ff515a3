"""Linear layers of which each rank holds some output channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apb_ds.parallel.groups import SequenceGroup
from apb_ds.weights.cut import cut_rows, own_rows, rows_of


class ShardedLinear(nn.Linear):
    """A linear layer of which a rank holds rows ``rank * rows`` to ``(rank + 1) * rows``.

    All ranks call it together with the same input, unless its whole weight is there.

    Parameters
    ----------
    linear : nn.Linear
        The layer, whole or with this rank's rows alone.
    is_view : bool
        Whether the rows stay a view of the whole weight, as those of a head that is tied to an embedding.

    Attributes
    ----------
    in_features, out_features : of the whole layer
    rows : output channels of every rank, rounded up
    is_view : as given
    weight : (rows, in_features); rows beyond the last channel are zeros, or missing in a view
    bias : (out_features,), whole, or None
    whole : (out_features, in_features), the gathered weight while it is here, else None
    """

    def __init__(self, linear: nn.Linear, group: SequenceGroup, *, is_view: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rows = rows_of(self.out_features, group.world_size)
        self.is_view = is_view
        weight = linear.weight.detach()
        if is_view:
            weight = weight[group.rank * self.rows : (group.rank + 1) * self.rows]
        elif weight.shape[0] != self.rows:
            weight = cut_rows(weight, group.rank, group.world_size)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.whole: Tensor | None = None
        self._group = group
        self._joint = JointLinears([self], group)

    def join(self, joint: JointLinears) -> None:
        """Share messages with the layers that read the same input."""
        self._joint = joint

    def forward(self, states: Tensor) -> Tensor:
        """Compute (..., in_features) to (..., out_features)."""
        if self.whole is not None:
            return F.linear(states, self.whole, self.bias)
        return self._joint.outputs_of(self, states)

    def own_outputs(self, states: Tensor) -> Tensor:
        """Compute this rank's output channels, (..., rows); their bias is added before the sum is rounded."""
        bias: Tensor | None = self.bias
        if bias is not None:
            bias = _padded(own_rows(bias, self._group.rank, self._group.world_size), len(self.weight))
        return F.linear(states, self.weight, bias)

    def gather(self) -> Tensor:
        """Return the whole weight, (out_features, in_features). All ranks call this together."""
        return self._group.all_gather(self.weight.detach()).flatten(0, 1)[: self.out_features]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rows={self.rows} of {self._group.world_size} ranks"


class JointLinears:
    """Layers that read the same input one after the other: what they compute in place goes in one message.

    Parameters
    ----------
    linears : in the order in which they are called
    """

    def __init__(self, linears: Sequence[ShardedLinear], group: SequenceGroup) -> None:
        self._linears = tuple(linears)
        self._rows = [linear.rows for linear in linears]
        self._numbers = {id(linear): number for number, linear in enumerate(linears)}
        self._group = group
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def outputs_of(self, linear: ShardedLinear, states: Tensor) -> Tensor:
        """Return what a layer computes; those after it find theirs if they read the same tensor."""
        number = self._numbers[id(linear)]
        if self._input is not states or number not in self._outputs:
            self._compute(states)
        output = self._outputs.pop(number)
        if not self._outputs:
            self._input = None
        return output

    def _compute(self, states: Tensor) -> None:
        parts = [_padded(linear.own_outputs(states), linear.rows) for linear in self._linears]
        everyone = self._group.all_gather(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0])
        wholes = [part.movedim(0, -2).flatten(-2) for part in everyone.split(self._rows, dim=-1)]
        outputs = (whole[..., : linear.out_features] for linear, whole in zip(self._linears, wholes, strict=True))
        self._input, self._outputs = states, {number: output.contiguous() for number, output in enumerate(outputs)}


def _padded(states: Tensor, channels: int) -> Tensor:
    """Return (..., channels), with zeros where there are fewer."""
    return states if states.shape[-1] == channels else F.pad(states, (0, channels - states.shape[-1]))
