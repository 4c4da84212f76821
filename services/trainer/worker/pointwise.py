"""1 x 1 convolutions of ultralytics' networks as products of matrices, for learning on CPUs.

Most of them follow a concatenation. The product with a concatenation is the sum of the products
with its parts, so the parts are never copied together. The product with an enlarged part is the
enlarged product, so it is computed before the part is enlarged, with a quarter of the work.

A feature map of shape (n, c, h, w) is channels_last: as rows of shape (n * h * w, c) it is the same
memory. Weights and results are those of the modules replaced here, up to rounding; in evaluation
mode, on other devices and in lower precision these do the work themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import C3, SPPF, C2f, Concat

_SCALE = 2
"""Of every enlargement in these networks."""


class Enlarged(NamedTuple):
    """A feature map to be enlarged, each pixel to four.

    Attributes:
        small: The map.
    """

    small: Tensor


class Parts(NamedTuple):
    """Feature maps to be concatenated, by channels.

    Attributes:
        maps: The maps.
    """

    maps: Sequence[Tensor | Enlarged]


def replace(network: nn.Module) -> None:
    """Has the modules of a network compute in the way described above, where that pays."""
    for module in network.modules():
        if type(module) is nn.Conv2d and _is_pointwise(module):
            module.__class__ = _Pointwise
        elif type(module) in _REPLACEMENTS:
            module.__class__ = _REPLACEMENTS[type(module)]


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1


def _pays(module: nn.Module, found: Any) -> bool:
    """Says whether a module is to compute its outputs here."""
    if isinstance(found, Parts):
        found = found.maps[0]
    first = found.small if isinstance(found, Enlarged) else found
    return module.training and first.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def _enlarge(small: Tensor) -> Tensor:
    return nn.functional.interpolate(small, scale_factor=float(_SCALE), mode="nearest")


def _joined(found: Any) -> Tensor:
    """Returns the map that is meant."""
    if isinstance(found, Enlarged):
        return _enlarge(found.small)
    if isinstance(found, Parts):
        return torch.cat([_joined(one) for one in found.maps], 1)
    joined: Tensor = found
    return joined


class _Pointwise(nn.Conv2d):
    """A 1 x 1 convolution."""

    def forward(self, input: Tensor | Parts) -> Tensor:
        """Convolves."""
        maps = input.maps if isinstance(input, Parts) else [input]
        enlarged = tuple(isinstance(one, Enlarged) for one in maps)
        if not _pays(self, input) or all(enlarged):
            return super().forward(_joined(input))
        tensors = [one.small if isinstance(one, Enlarged) else one for one in maps]
        result: Tensor = _Product.apply(self.weight, self.bias, enlarged, *tensors)
        return result


def _reduced(large: Tensor) -> Tensor:
    """Adds up the four pixels that one was enlarged to."""
    return nn.functional.avg_pool2d(large, _SCALE, divisor_override=1)


def _rows(features: Tensor) -> Tensor:
    """Returns a map of shape (n, c, h, w) as rows of shape (n * h * w, c)."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _features(rows: Tensor, like: Tensor) -> Tensor:
    """Returns rows as a map with as many images, rows and columns as another."""
    num_images, _, height, width = like.shape
    return rows.view(num_images, height, width, -1).permute(0, 3, 1, 2)


class _Product(torch.autograd.Function):
    """The product of weights with parts, some of which are to be enlarged."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, enlarged: tuple[bool, ...], *parts: Tensor
    ) -> Tensor:
        """Multiplies and adds up; at least one part is not enlarged."""
        ctx.save_for_backward(weight, *parts)
        ctx.enlarged, ctx.has_bias = enlarged, bias is not None
        matrices = torch.split(weight.flatten(1), [part.shape[1] for part in parts], dim=1)
        terms = [*zip(parts, matrices, enlarged, strict=True)]
        (first, matrix), *more = [(part, matrix) for part, matrix, small in terms if not small]
        rows, matrix = _rows(first), matrix.t()
        rows = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
        for part, matrix in more:
            rows.addmm_(_rows(part), matrix.t())
        for part, matrix, small in terms:
            if small:
                num_images, _, height, width = part.shape
                product = (_rows(part) @ matrix.t()).view(num_images, height, 1, width, 1, -1)
                rows.view(num_images, height, _SCALE, width, _SCALE, -1).add_(product)
        return _features(rows, first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of all arguments of `forward`."""
        weight, *parts = ctx.saved_tensors
        rows, matrix = _rows(gradients[0]), weight.flatten(1)
        of_weight = torch.empty_like(matrix) if ctx.needs_input_grad[0] else None
        of_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[1] else None
        of_parts, first = [], 0
        for part, small, is_wanted in zip(
            parts, ctx.enlarged, ctx.needs_input_grad[3:], strict=True
        ):
            end = first + part.shape[1]
            received = _rows(_reduced(gradients[0])) if small else rows
            if of_weight is not None:
                torch.mm(received.t(), _rows(part), out=of_weight[:, first:end])
            product = received @ matrix[:, first:end] if is_wanted else None
            of_parts.append(None if product is None else _features(product, part))
            first = end
        return None if of_weight is None else of_weight.view_as(weight), of_bias, None, *of_parts


class _Halves(torch.autograd.Function):
    """A map as it is, and a copy of the second half of its channels."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> tuple[Tensor, Tensor]:
        """Copies."""
        half = both.chunk(2, 1)[1].contiguous(memory_format=torch.channels_last)
        return both.view_as(both), half

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Adds up."""
        of_both, of_half = gradients
        of_both.chunk(2, 1)[1].add_(of_half)  # made by `_Product`, and nobody else's
        return of_both


class _Upsample(nn.Upsample):
    def forward(self, input: Tensor) -> Any:
        """Leaves it to the product that follows."""
        if not _pays(self, input):
            return super().forward(input)
        return Enlarged(input)


class _Concat(Concat):
    def forward(self, x: list[Any]) -> Any:
        """Leaves it to the product that follows."""
        return Parts(x) if _pays(self, Parts(x)) else _joined(Parts(x))


class _C2f(C2f):
    def forward(self, x: Any) -> Any:
        """Computes as the library does, without its copies."""
        if not _pays(self, x):
            return super().forward(_joined(x))
        whole, last = _Halves.apply(self.cv1(x))
        maps = [whole]
        for bottleneck in self.m:
            last = bottleneck(last)
            maps.append(last)
        return self.cv2(Parts(maps))


class _C3(C3):
    def forward(self, x: Any) -> Any:
        """Computes as the library does, without its copies."""
        if not _pays(self, x):
            return super().forward(_joined(x))
        return self.cv3(Parts([self.m(self.cv1(x)), self.cv2(x)]))


class _Sppf(SPPF):
    def forward(self, x: Tensor) -> Any:
        """Computes as the library does, without its copies."""
        if not _pays(self, x) or self.add:
            return super().forward(x)
        maps = [self.cv1(x)]
        for _ in range(self.n):
            maps.append(self.m(maps[-1]))
        return self.cv2(Parts(maps))


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Upsample: _Upsample,
    Concat: _Concat,
    C2f: _C2f,
    C3: _C3,
    SPPF: _Sppf,
}
