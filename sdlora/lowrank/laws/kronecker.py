"""LoKr: the Kronecker product of two factors, each of which may be a low-rank product itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sdlora.errors import SdloraError
from sdlora.lowrank.laws.delta import Shape, check_fit, matches, wide
from sdlora.lowrank.laws.product import pair_product, pair_shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Kronecker:
    """delta = scale * kron(w1, w2) (LyCORIS, arXiv:2309.14859, section 3.2).

    w1: (out1, in1), or w1_a (out1, rank) @ w1_b (rank, in1). w2: (out2, in2[, kh, kw]), or w2_a (out2, rank) @ w2_b
    (rank, in2[, kh, kw]), which may also be flat, (rank, in2 * kh * kw). t2: (rank, rank, kh, kw), the core of a Tucker
    decomposition; w2_a is (rank, out2) and w2_b (rank, in2) then. The delta is (out1 * out2, in1 * in2[, kh, kw]).

    The scale is alpha / rank where a factor is a product, of the rank of w2_b or else of w1_b. Where both are whole it
    is 1 and alpha counts for nothing, as in LyCORIS. (PEFT scales there too: who reads its files scales w1 before.)
    Factors that do not belong together raise SdloraError.
    """

    name: ClassVar[str] = "lokr"
    linear: ClassVar[bool] = True

    alpha: float
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None

    def __post_init__(self) -> None:
        first, second = self._shapes()
        if first is None or len(first) != 2 or second is None or len(second) not in (2, 4):
            named = {name: getattr(self, name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
            found = ", ".join(f"{name} {tuple(part.shape)}" for name, part in named.items() if part is not None)
            raise SdloraError(
                f"{found or 'nothing'} is no LoKr; w1 or w1_a (out, rank) and w1_b (rank, in) is wanted, and the same"
                " for w2, whose pair may be (rank, out) and (rank, in) with t2 (rank, rank, kh, kw)"
            )

    def _shapes(self) -> tuple[Shape | None, Shape | None]:
        """Of w1 and of w2, None for what is incomplete, twofold or does not multiply."""
        first = _shape(self.w1, self.w1_a, self.w1_b, None)
        return first, _shape(self.w2, self.w2_a, self.w2_b, self.t2)

    @property
    def rank(self) -> int | None:
        factor = self.w1_b if self.w2_b is None else self.w2_b
        return None if factor is None else factor.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.rank is None else self.alpha / self.rank

    @property
    def shape(self) -> Shape:
        """Shape of the delta: (out, in), (out, in * kh * kw) or (out, in, kh, kw)."""
        first, second = self._shapes()
        assert first is not None and second is not None
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    def fits(self, shape: Sequence[int]) -> bool:
        return matches(self.shape, shape)

    def weight(self, base: Tensor) -> Tensor:
        """The delta in float32, in the shape of `base` and on its device."""
        import torch

        check_fit(self, base.shape)
        first = _value(self.w1, self.w1_a, self.w1_b, None, base) * self.scale
        second = _value(self.w2, self.w2_a, self.w2_b, self.t2, base)
        first = first[(...,) + (None,) * (second.dim() - 2)]  # kron would add the missing dimensions in front
        return torch.kron(first, second).reshape(base.shape)


def _shape(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> Shape | None:
    if whole is not None:
        return tuple(whole.shape) if a is None and b is None and core is None else None
    return None if a is None or b is None else pair_shape(a, b, core)


def _value(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None, base: Tensor) -> Tensor:
    if whole is not None:
        return wide(whole, base)
    assert a is not None and b is not None
    return pair_product(a, b, core, base)
