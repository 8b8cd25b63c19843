# SPDX-License-Identifier: Apache-2.0
"""What the partial convolution's functions hand to each other."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..checks import Pair, pair


class Window(NamedTuple):
    """What one partial convolution reads and leaves behind of its masks; a function of the input masks alone."""

    planes: tuple[Tensor, ...]  # (N or 1, 1 or C_i, H_i, W_i) uint8, one for each source
    counts: Tensor  # (N or 1, 1, H', W') int32, valid values under each window
    mask: Tensor  # (N or 1, 1, H', W') uint8, the updated mask
    full: int  # values of a window where all are valid: channels * kh * kw


class WindowStep(NamedTuple):
    """One partial convolution in a chain of them, for its masks alone; see `partial_window_chain`."""

    inputs: list[int]  # for each source, the mask it comes with: a given one, or (after them) that of an earlier step
    channels: list[int]
    upsample: list[int]
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]

    def flat(self) -> list[int]:
        sources = [value for source in zip(self.inputs, self.channels, self.upsample, strict=True) for value in source]
        return [len(self.inputs), *sources, *self.kernel, *self.stride, *self.padding, *self.dilation]


class BatchNorm(NamedTuple):
    """Batch normalisation between a partial convolution and its activation, as `torch.nn.functional.batch_norm`."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float | Tensor
    eps: float


class Geometry(NamedTuple):
    """The geometry in the order of the operators' schemas."""

    upsample: list[int]  # one for each source
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    zeroed: list[int]  # for each source, 1 if it is promised to hold 0 in its holes already


class GivenGeometry(NamedTuple):
    """The geometry as a caller may write it."""

    upsample: list[int]
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    zeroed: list[bool]

    def checked(self, op: str) -> Geometry:
        return Geometry(
            self.upsample,
            list(pair(op, "stride", self.stride, 1)),
            list(pair(op, "padding", self.padding, 0)),
            list(pair(op, "dilation", self.dilation, 1)),
            self.groups,
            [int(z) for z in self.zeroed],
        )


class Epilogue(NamedTuple):
    """What follows the renormalised convolution."""

    activation: str
    slope: float
    norm: BatchNorm | None


class Inputs(NamedTuple):
    """What a convolution is called with, brought into one form."""

    op: str  # the function that messages name
    sources: list[Tensor]  # (N, C_i, H_i, W_i)
    masks: list[Tensor] | None  # (N or 1, 1 or C_i, H_i, W_i)
    names: Sequence[str]  # of the masks, in messages
    weight: Tensor  # (O, sum C_i / groups, kh, kw)
    bias: Tensor | None  # (O,)
    window: Window | None
    geometry: GivenGeometry
    epilogue: Epilogue
    fold: bool | None  # the upsampling into the kernel; None: as the table says
