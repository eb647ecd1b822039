"""Resizing: the best delta of each module at its new rank, and everything else as it was."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Delta, DoRA, Full, Hadamard, Kronecker, LowRank
from sdlora.lowrank.resize import resized
from sdlora.lowrank.truncation import Keep, Kept, Outcome


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = {
    "unet.lora": (24, 32),
    "unet.conv": (20, 6, 3, 3),
    "unet.tucker": (20, 6, 3, 3),
    "unet.loha": (24, 32),
    "unet.lokr": (24, 30),
}
DELTAS: dict[str, Delta] = {
    "unet.lora": LowRank(random(8, 32), random(24, 8, seed=1), 2.0),
    "unet.conv": LowRank(random(8, 6, 3, 3), random(20, 8, 1, 1, seed=1), 2.0),
    "unet.tucker": LowRank(random(6, 6, 1, 1), random(20, 6, 1, 1, seed=1), 2.0, random(6, 6, 3, 3)),
    "unet.loha": Hadamard(random(24, 3), random(3, 32), random(24, 3, seed=1), random(3, 32, seed=1), 2.0),
    "unet.lokr": Kronecker(2.0, w1=random(4, 3), w2=random(6, 10)),
    "unet.small": LowRank(random(2, 32), random(24, 2, seed=1), 2.0),
    "unet.full": Full(random(24, 32)),
    "unet.norm": Full(random(24)),
    "unet.lora.bias": Full(random(24)),
}


def by_path(adapter: Adapter, keep: Keep, bases: Callable[[str], Tensor] | None = None) -> dict[str, Outcome]:
    return {outcome.path: outcome for outcome in resized(adapter, keep, bases)}


@pytest.mark.parametrize("keep", [Keep(rank=4), Keep(frobenius=0.9), Keep(cumulative=0.7, rank=3), Keep(ratio=3.0)])
def test_each_module_gets_the_best_delta_of_its_rank(keep: Keep) -> None:
    outcomes = by_path(Adapter(DELTAS), keep)
    assert list(outcomes) == list(DELTAS)
    for path, shape in SHAPES.items():
        whole = DELTAS[path].weight(torch.zeros(shape)).double()
        values = torch.linalg.svdvals(whole.flatten(1))
        told, delta = outcomes[path].kept, outcomes[path].delta
        assert told is not None and told.rank == delta.rank == keep.count(values) and delta.shape == shape
        error = float((delta.weight(torch.zeros(shape)).double() - whole).norm() / whole.norm())
        best = float(values[told.rank :].norm() / values.norm())
        assert error == pytest.approx(best, abs=1e-6) and told.error == pytest.approx(best, abs=1e-6)
        assert told.rank_before == DELTAS[path].rank


def test_what_has_no_ranks_is_passed_on_and_told_so() -> None:
    outcomes = by_path(Adapter(DELTAS), Keep(rank=4))
    unchanged = [path for path, outcome in outcomes.items() if outcome.kept is None]
    assert unchanged == ["unet.full", "unet.norm", "unet.lora.bias"]
    assert all(outcomes[path].delta is DELTAS[path] for path in unchanged)


def test_lora_of_no_more_ranks_than_wanted_is_passed_on() -> None:
    small = by_path(Adapter(DELTAS), Keep(rank=4))["unet.small"]
    assert small.delta is DELTAS["unet.small"] and small.kept == Kept(2, 2, 1.0, 0.0)


def test_laws_that_depend_on_the_base_ask_for_it_before_any_work() -> None:
    base = random(24, 32, seed=4)
    dora = DoRA(LowRank(random(2, 32), random(24, 2), 2.0), random(24, 1).abs())
    adapter = Adapter({**DELTAS, "unet.dora": dora})
    with pytest.raises(SdloraError, match=r"^unet.dora: lora \+ dora depends.*give that model"):
        next(resized(adapter, Keep(rank=4)))
    delta = by_path(adapter, Keep(), {"unet.dora": base}.__getitem__)["unet.dora"].delta
    torch.testing.assert_close(delta.weight(base), dora.weight(base), rtol=1e-5, atol=1e-5)


def test_damage_is_named_with_its_path() -> None:
    damaged = Adapter({"unet.broken": LowRank(random(4, 5) * float("nan"), random(6, 4), 4.0)})
    with pytest.raises(SdloraError, match=r"^unet.broken: .*not finite"):
        list(resized(damaged, Keep(rank=1)))
