"""The live way of applying adapters: layers beside the base's, whose weights change at no cost and picture by picture.

y = base(x) + sum over i of w_i[row] * delta_i(x), added by a forward hook. The base's parameters are never touched, so
that they may be quantised, cast layer by layer or offloaded. All low-rank adapters of a module are one A and one B with
a weight for each rank, so that eight launch what one launches. Every other law's change is additive too, as
weight * (W' - W0): those are written out once and stacked.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from sdlora.errors import SdloraError
from sdlora.lowrank.effect import balanced, factor_pair
from sdlora.lowrank.laws import Delta, LowRank, Sum
from sdlora.lowrank.laws.delta import check_fit
from sdlora.lowrank.targets import shape_of

Slotted = tuple[tuple[Delta, int], ...]  # deltas, each with the slot of its weight
LiveTerms = Mapping[str, Slotted]  # by parameter path: "unet...to_q", "unet...to_q.bias"
Slots = tuple[int, ...]
Original = Callable[[str], Tensor | None]
Given = Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor | None]  # weights for what a forward pass is given


class Live:
    """Layers beside the base's: all low-rank adapters of a module as one concatenated A and B, a weight for each rank.

    modules: Linear, Conv2d, GroupNorm and LayerNorm by path. base: the untouched parameter of a path, None for a bias
    that the base lacks; asked only for laws that depend on it, and may raise SdloraError (a quantised base).
    """

    def __init__(self, modules: Mapping[str, Any], base: Original) -> None:
        self._modules, self._base = modules, base
        self._weights = _Weights()
        self._following: RemovableHandle | None = None
        self._held: dict[str, tuple[Mapping[str, Slotted], _Layer]] = {}  # by path of the module

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters that have layers now."""
        return tuple(path for terms, _ in self._held.values() for path in terms)

    @torch.inference_mode(False)
    @torch.no_grad()
    def install(self, terms: LiveTerms) -> None:
        """Exactly these and no others; modules whose terms are the very same keep what they have.

        A slot that `weigh` has not given a weight counts 0. If anything fails midway, nothing is installed at all and
        the error goes on.
        """
        wanted: dict[str, dict[str, Slotted]] = {}
        for path, slotted in terms.items():
            if slotted:
                wanted.setdefault(path.removesuffix(".bias"), {})[path] = slotted
        try:
            for path in [path for path, (held, _) in self._held.items() if wanted.get(path) != held]:
                self._remove(path)
            for path in [path for path in wanted if path not in self._held]:
                layer = _Layer(list(_parts(self._modules[path], path, wanted[path], self._base)), self._weights)
                self._held[path] = (wanted[path], layer)  # first: what interrupts this must leave a way back
                self._modules[path].register_forward_hook(layer)
        except BaseException:
            self.clear()
            raise

    def weigh(self, weights: Tensor) -> None:
        """The weights (rows, slots) in float32 from the next forward on. Costs one small tensor. Ends `follow`.

        Row i is for the pictures i, rows + i, 2 * rows + i ... of a batch: guidance puts as many negatives before the
        prompts. A batch that is no multiple of the rows raises SdloraError in the forward.
        """
        self._unfollow()
        self._weights.put(weights)

    def follow(self, unet: nn.Module, weights: Given) -> None:
        """Have before each pass of the UNet the weights for what it is given; None for those that are in force."""
        self._unfollow()
        self._following = unet.register_forward_pre_hook(_Lookout(weights, self._weights), with_kwargs=True)

    def _unfollow(self) -> None:
        if self._following:
            self._following.remove()
        self._following = None

    def clear(self) -> None:
        """Take every layer away: what is left is the base."""
        self._unfollow()
        for path in list(self._held):
            self._remove(path)

    def _remove(self, path: str) -> None:
        _, layer = self._held[path]
        hooks = self._modules[path]._forward_hooks if path in self._modules else {}
        for key in [key for key, hook in hooks.items() if hook is layer]:
            del hooks[key]
        del self._held[path]


class _Weights:
    """The weights in force, as layers ask for them. What is asked twice is gathered once."""

    def __init__(self) -> None:
        self.put(torch.zeros(1, 0))

    def put(self, weights: Tensor) -> None:
        self._host = weights.detach().to("cpu", torch.float32, copy=True)
        self._picked: dict[Slots, Tensor | None] = {}
        self._gathered: dict[Any, Tensor] = {}

    def of(self, slots: Slots, like: Tensor) -> Tensor | None:
        """(1 or batch, slots) on the device and in the dtype of an output (batch, ...); None where all are 0.

        One row where all rows say the same. The tensor stays the very same until the weights change.
        """
        if slots not in self._picked:
            self._picked[slots] = self._pick(slots)
        picked = self._picked[slots]
        if picked is None:
            return None
        times = 1 if len(picked) == 1 else _multiple(like.shape[0], len(picked))
        key = (slots, times, like.dtype, like.device)
        if key not in self._gathered:
            self._gathered[key] = _sent(picked, times, like)
        return self._gathered[key]

    def _pick(self, slots: Slots) -> Tensor | None:
        """(rows, slots), one row where they are all the same, None where all are 0."""
        missing = 1 + max(slots) - self._host.shape[1]
        picked = functional.pad(self._host, (0, max(missing, 0)))[:, list(slots)]
        if not picked.any():
            return None
        return picked[:1] if (picked == picked[:1]).all() else picked


@torch.inference_mode(False)
@torch.no_grad()
def _sent(picked: Tensor, times: int, like: Tensor) -> Tensor:
    """The rows so many times, on the device and in the dtype of `like`, without waiting for what the device does."""
    values = picked.repeat(times, 1).to(like.dtype)
    return values.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else values.to(like.device)


def _multiple(batch: int, rows: int) -> int:
    if batch % rows:
        raise SdloraError(
            f"{rows} pictures have weights of their own and a batch of {batch} came, which is no multiple of that;"
            " denoise all of them together"
        )
    return batch // rows


@dataclass(frozen=True, eq=False)
class _Lookout:
    """The forward pre-hook of the UNet."""

    given: Given
    weights: _Weights

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found = self.given(args, kwargs)
        if found is not None:
            self.weights.put(found)


class _Part(Protocol):
    """Changes of one kind to one module."""

    @property
    def slots(self) -> Slots:
        """Of the weights that `add` wants, in order."""

    def add(self, module: Any, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add to the output y, in place, what the changes make of x. weights: (1 or batch, slots)."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """The forward hook of a module."""

    parts: Sequence[_Part]
    weights: _Weights

    def __call__(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Linear layers add to rows that must lie in order. Autograd does not need again what any of these kinds gives.
        y = output.contiguous() if isinstance(module, nn.Linear) else output
        for part in self.parts:
            weights = self.weights.of(part.slots, y)
            if weights is not None:
                part.add(module, args[0].to(y.device, y.dtype), y, weights)
        return y


class _Made:
    """Tensors made in float32 at once, cast once to what the module computes with, and made anew if that changes."""

    def __init__(self, make: Callable[[], tuple[Tensor, ...]]) -> None:
        self._make, self._tensors = make, make()

    def like(self, y: Tensor) -> tuple[Tensor, ...]:
        first = self._tensors[0]
        if first.dtype != y.dtype or first.device != y.device:
            self._cast(y)
        return self._tensors

    @torch.inference_mode(False)
    @torch.no_grad()
    def _cast(self, y: Tensor) -> None:
        rounded = self._tensors[0].dtype not in (torch.float32, y.dtype)
        self._tensors = tuple(tensor.to(y.device, y.dtype) for tensor in (self._make() if rounded else self._tensors))


class _Ranks:
    """Low-rank changes side by side: down (ranks, in[, kh, kw]), up (out, ranks) with the scales in it."""

    def __init__(self, deltas: Sequence[LowRank], slots: Slots, shape: Sequence[int]) -> None:
        self.slots = tuple(slot for delta, slot in zip(deltas, slots, strict=True) for _ in range(delta.rank))
        self._factors = _Made(partial(_side_by_side, deltas, shape))
        self._many = len(self.slots) * (shape[0] + prod(shape[1:])) > prod(shape)  # numbers, than one whole change has
        self._folded: tuple[Tensor, Tensor] | None = None  # weights, and what has them in it

    def add(self, module: Any, x: Tensor, y: Tensor, weights: Tensor) -> None:
        down, up = self._factors.like(y)
        one = len(weights) == 1
        if one and self._many:
            _add_change(module, x, y, self._with(weights, down, up))
            return
        h = _applied(module, x, down)
        if one:
            up = self._with(weights, down, up)
        else:
            h.mul_(_along(module, weights, h))
        if isinstance(module, nn.Linear):
            _add_product(y, h, up)
        elif y.is_contiguous():
            y.flatten(2).baddbmm_(up.expand(len(y), -1, -1), h.flatten(2))
        else:
            y.add_(functional.conv2d(h, up[..., None, None]))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _with(self, weights: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """One weight a rank goes into up, once for as long as the weights stay, and then costs a step nothing.

        Where the ranks are many, it is the whole change, which is smaller than its factors and quicker to apply.
        """
        if self._folded is None or self._folded[0] is not weights:
            folded = up * weights
            self._folded = weights, (folded @ down.flatten(1)).view(-1, *down.shape[1:]) if self._many else folded
        return self._folded[1]


@dataclass(frozen=True, eq=False)
class _Whole:
    """Changes written out, (changes, out, in[, kh, kw])."""

    changes: _Made
    slots: Slots

    def add(self, module: Any, x: Tensor, y: Tensor, weights: Tensor) -> None:
        (changes,) = self.changes.like(y)
        if isinstance(module, nn.Conv2d) and len(weights) > 1:
            each = _applied(module, x, changes.flatten(0, 1)).unflatten(1, (len(changes), -1))
            y.add_((each * weights[..., None, None, None]).sum(1))
            return
        mixed = (weights @ changes.flatten(1)).view(-1, *changes.shape[1:])  # (1 or batch, out, in[, kh, kw])
        if len(mixed) == 1:
            _add_change(module, x, y, mixed[0])
        else:
            y.view(len(y), -1, y.shape[-1]).baddbmm_(x.reshape(len(x), -1, x.shape[-1]), mixed.mT)


@dataclass(frozen=True, eq=False)
class _Norms:
    """Changes to the weight of a norm, (changes, width): each scales the normalised input."""

    changes: _Made
    slots: Slots

    def add(self, module: Any, x: Tensor, y: Tensor, weights: Tensor) -> None:
        (changes,) = self.changes.like(y)
        if isinstance(module, nn.LayerNorm):
            normed = functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
        else:
            normed = functional.group_norm(x, module.num_groups, None, None, module.eps)
        y.addcmul_(normed, _along(module, weights @ changes, y))


@dataclass(frozen=True, eq=False)
class _Biases:
    """Changes to a bias, (changes, width)."""

    changes: _Made
    slots: Slots

    def add(self, module: Any, x: Tensor, y: Tensor, weights: Tensor) -> None:
        (changes,) = self.changes.like(y)
        y.add_(_along(module, weights @ changes, y))


def _applied(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    """What the module would make of x with another weight, of any number of outputs, and without a bias."""
    if isinstance(module, nn.Linear):
        return functional.linear(x, weight)
    # _conv_forward is conv2d with the module's own stride, padding, dilation and padding mode.
    return module._conv_forward(x, weight, None)


def _add_change(module: Any, x: Tensor, y: Tensor, change: Tensor) -> None:
    """Add to y what a change of the module's weight, in its shape, makes of x."""
    if isinstance(module, nn.Linear):
        _add_product(y, x, change)
    else:
        y.add_(_applied(module, x, change))


def _add_product(y: Tensor, x: Tensor, weight: Tensor) -> None:
    """y (..., out) += x (..., in) @ weight (out, in)^T, in one pass."""
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())


def _along(module: Any, values: Tensor, y: Tensor) -> Tensor:
    """values (1 or batch, width) shaped so as to go along with y's channels."""
    channel = 1 if isinstance(module, nn.Conv2d | nn.GroupNorm) else y.dim() - 1
    shape = [1] * y.dim()
    shape[0], shape[channel] = values.shape
    return values.view(shape)


def _parts(module: Any, path: str, terms: Mapping[str, Slotted], base: Original) -> Iterator[_Part]:
    """The parts of a module's layer. SdloraError: a delta does not fit, or the base that it needs cannot be had."""
    weight = _flat(terms.get(path, ()))
    ranks = [(delta, slot) for delta, slot in weight if isinstance(delta, LowRank)]
    others = [(delta, slot) for delta, slot in weight if not isinstance(delta, LowRank)]
    shape = shape_of(module, "weight")
    if getattr(module, "groups", 1) != 1 and weight:
        raise SdloraError(f"{path}: a convolution in groups cannot carry live adapters; merge them")
    if ranks:
        deltas, slots = zip(*ranks, strict=True)
        yield _Ranks(deltas, slots, shape)
    if others:
        deltas, slots = zip(*others, strict=True)
        kind = _Whole if len(shape) > 1 else _Norms
        yield kind(_Made(partial(_stacked, deltas, path, shape, base)), slots)
    biases = _flat(terms.get(f"{path}.bias", ()))
    if biases:
        deltas, slots = zip(*biases, strict=True)
        yield _Biases(_Made(partial(_stacked, deltas, f"{path}.bias", shape[:1], base)), slots)


def _flat(terms: Slotted) -> Slotted:
    """Sums taken apart, so that what is low-rank in them is kept as that."""
    for i, (delta, slot) in enumerate(terms):
        if isinstance(delta, Sum):
            return _flat((*terms[:i], (delta.first, slot), (delta.rest, slot), *terms[i + 1 :]))
    return terms


def _side_by_side(deltas: Sequence[LowRank], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """down (ranks, in[, kh, kw]) and up (out, ranks) of all deltas, in float32."""
    for delta in deltas:
        check_fit(delta, shape)
    pairs = [balanced(*factor_pair(delta)) for delta in deltas]
    down = torch.cat([down.float() for _, down in pairs])
    return down.reshape(-1, *shape[1:]), torch.cat([up.float() for up, _ in pairs], 1)


def _stacked(deltas: Sequence[Delta], path: str, shape: Sequence[int], base: Original) -> tuple[Tensor]:
    """The changes that the deltas make to the untouched parameter, (deltas, *shape) in float32."""
    untouched = torch.zeros(()).expand(*shape)
    if not all(delta.linear for delta in deltas):
        found = base(path)
        untouched = untouched if found is None else found.detach()
    return (torch.stack([delta.weight(untouched) for delta in deltas]),)
