"""Norms from factors are those of the products."""

import pytest
import torch

from sdlora.errors import SdloraError
from sdlora.lowrank.effect import norm, norm_of
from sdlora.lowrank.laws import IA3, Delta, DoRA, Full, Hadamard, Kronecker, LowRank


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LAWS: dict[str, tuple[Delta, tuple[int, ...]]] = {
    "lora": (LowRank(r(4, 30), r(20, 4), -3.0), (20, 30)),
    "lora in half": (LowRank(r(4, 30).half() * 1e-4, r(20, 4).half() * 1e-4, 4.0), (20, 30)),
    "locon": (LowRank(r(4, 6, 3, 3), r(20, 4, 1, 1), 3.0), (20, 6, 3, 3)),
    "tucker": (LowRank(r(4, 6, 1, 1), r(20, 4, 1, 1), 3.0, r(4, 4, 3, 3)), (20, 6, 3, 3)),
    "loha": (Hadamard(r(20, 2), r(2, 30), r(20, 2), r(2, 30), 1.0), (20, 30)),
    "lokr": (Kronecker(1.0, w1=r(4, 3), w2_a=r(5, 2), w2_b=r(2, 10)), (20, 30)),
    "lokr of a convolution": (Kronecker(1.0, w1=r(4, 3), w2=r(5, 2, 3, 3)), (20, 6, 3, 3)),
    "full": (Full(r(20, 30)), (20, 30)),
    "a bias": (Full(r(20)), (20,)),
}


@pytest.mark.parametrize("name", LAWS)
def test_the_norm_of_a_linear_law_is_that_of_its_product(name: str) -> None:
    delta, shape = LAWS[name]
    wanted = float(delta.weight(torch.zeros(shape)).double().norm())
    assert norm_of(delta) == pytest.approx(wanted, rel=1e-6)
    assert norm_of(delta, torch.ones(shape)) == pytest.approx(wanted, rel=1e-6)
    if isinstance(delta, LowRank):
        assert norm(delta) == pytest.approx(wanted, rel=1e-6)


def test_the_norm_of_what_depends_on_the_base_is_unknown_without_it() -> None:
    base = r(20, 30)
    for delta in (IA3(r(30), on_input=True), DoRA(LowRank(r(4, 30), r(20, 4), 4.0), r(20, 1).abs())):
        assert norm_of(delta) is None
        assert norm_of(delta, base) == pytest.approx(float(delta.weight(base).double().norm()), rel=1e-6)
        with pytest.raises(SdloraError, match="does not fit"):
            norm_of(delta, r(7, 8))


def test_the_norm_of_nothing_is_nothing_and_that_of_damage_is_no_number() -> None:
    assert norm(LowRank(r(4, 30), torch.zeros(20, 4), 4.0)) == 0
    damaged = norm(LowRank(r(4, 30) * float("nan"), r(20, 4), 4.0))
    assert damaged != damaged
