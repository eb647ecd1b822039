"""Fewer ranks: held against float64 products and their full singular value decompositions."""

import pytest
import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.laws import IA3, Delta, DoRA, Full, Hadamard, Kronecker, LowRank
from sdlora.lowrank.truncation import Keep, Kept, as_low_rank, decompose, singular, truncate


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(out: int, inside: tuple[int, ...], rank: int, alpha: float = 3.0) -> LowRank:
    ones = (1,) * (len(inside) - 1)
    return LowRank(random(rank, *inside), random(out, rank, *ones, seed=1), alpha)


def tucker(out: int, inside: int, rank: int, kernel: int, alpha: float = 2.0) -> LowRank:
    mid = random(rank, rank, kernel, kernel, seed=2)
    return LowRank(random(rank, inside, 1, 1), random(out, rank, 1, 1, seed=1), alpha, mid)


def product(delta: LowRank) -> Tensor:
    """The whole delta in float64, from its definition."""
    up, down = delta.up.double().flatten(1), delta.down.double()
    if delta.mid is not None:
        whole = torch.einsum("mnhw,om,ni->oihw", delta.mid.double(), up, down.flatten(1))
    else:
        whole = torch.einsum("om,m...->o...", up, down)
    return delta.alpha / delta.rank * whole


def distance(found: LowRank, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((product(found) - wanted.double()).norm() / wanted.double().norm())


def best_error(wanted: Tensor, rank: int) -> float:
    """The error of the best approximation of this rank: the norm of the singular values that are left out."""
    values = torch.linalg.svdvals(wanted.double().flatten(1))
    return float(values[rank:].norm() / values.norm())


def with_values(values: list[float], out: int = 9, inside: int = 12) -> Tensor:
    """A float64 matrix with these singular values."""
    left = torch.linalg.qr(random(out, len(values)).double()).Q
    right = torch.linalg.qr(random(inside, len(values), seed=1).double()).Q
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


DELTAS = {
    "linear": lora(30, (40,), 8),
    "tall": lora(50, (20,), 8, alpha=-1.5),
    "conv": lora(20, (6, 3, 3), 8),
    "pointwise": lora(20, (24, 1, 1), 8),
    "tucker": tucker(20, 12, 6, 3),
    "wider than the matrix": lora(5, (7,), 16),
    "half": LowRank(random(8, 40).half(), random(30, 8).half(), 8.0),
}


@pytest.mark.parametrize("name", DELTAS)
def test_truncation_of_factors_is_the_best_there_is(name: str) -> None:
    delta = DELTAS[name]
    whole = product(delta)
    for rank in (1, 3, 5):
        small, kept = truncate(delta, Keep(rank=rank))
        assert (small.rank, small.alpha, small.shape) == (rank, rank, delta.shape)
        assert small.down.dtype == small.up.dtype == torch.float32
        assert distance(small, whole) == pytest.approx(best_error(whole, rank), abs=1e-6)
        assert kept.error == pytest.approx(best_error(whole, rank), abs=1e-7)
        assert kept.energy == pytest.approx(1 - best_error(whole, rank) ** 2, abs=1e-7)
        assert (kept.rank_before, kept.rank) == (delta.rank, rank)


@pytest.mark.parametrize("name", DELTAS)
def test_keeping_everything_changes_nothing(name: str) -> None:
    delta = DELTAS[name]
    small, kept = truncate(delta, Keep())
    assert distance(small, product(delta)) < 1e-6 and kept.error < 1e-6
    assert small.mid is None and small.rank <= min(delta.rank, *delta.shape[:1])


def test_ranks_that_hold_nothing_are_left_out() -> None:
    once = lora(30, (40,), 4)
    twice = LowRank(torch.cat([once.down, once.down]), torch.cat([once.up, once.up], 1), 2 * once.alpha)
    small, kept = truncate(twice, Keep(rank=8))
    assert (kept.rank_before, kept.rank, small.rank) == (8, 4, 4)
    assert distance(small, 2 * product(once)) < 1e-6


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (20, 6, 3, 3), (200, 6, 3, 3), (12, 10, 1, 1)])
def test_decomposition_of_a_change_is_the_best_there_is(shape: tuple[int, ...]) -> None:
    whole = random(*shape)
    for rank in (1, 4, 10):
        small, kept = decompose(whole, Keep(rank=rank))
        assert (small.rank, small.alpha, small.shape) == (rank, rank, shape)
        assert distance(small, whole) == pytest.approx(best_error(whole, rank), abs=1e-6)
        assert kept.error == pytest.approx(distance(small, whole), abs=1e-7)
        assert kept.energy == pytest.approx(1 - best_error(whole, rank) ** 2, abs=1e-7)
        assert kept.rank_before is None
    small, kept = decompose(whole, Keep())
    assert small.rank == min(shape[0], whole[0].numel()) and distance(small, whole) < 1e-6 and kept.error < 1e-6


def test_a_change_of_low_rank_that_float32_rounded_is_found_to_be_of_low_rank() -> None:
    whole = random(200, 7) @ random(7, 300, seed=1)
    small, kept = decompose(whole, Keep())
    assert small.rank == 7 and distance(small, whole) < 1e-6 and kept.energy == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
def test_up_and_down_share_the_singular_values(shape: tuple[int, int]) -> None:
    whole = random(*shape)
    values = torch.linalg.svdvals(whole.double())[:5].sqrt().float()
    for small, _ in (decompose(whole, Keep(rank=5)), truncate(lora(*shape[:1], shape[1:], 6), Keep(rank=5))):
        torch.testing.assert_close(small.up.norm(dim=0), small.down.norm(dim=1))
    small, _ = decompose(whole, Keep(rank=5))
    torch.testing.assert_close(small.up.norm(dim=0), values, rtol=1e-5, atol=0)


def test_nothing_becomes_one_rank_of_nothing() -> None:
    untrained = LowRank(random(4, 6), torch.zeros(5, 4), 4.0)
    for small, kept in (
        truncate(untrained, Keep(rank=2)),
        truncate(lora(5, (6,), 4, alpha=0.0), Keep(frobenius=0.9)),
        decompose(torch.zeros(5, 6), Keep(rank=2)),
        decompose(torch.zeros(6, 5), Keep(cumulative=0.5), clamp=0.9),
    ):
        assert small.rank == 1 and not small.up.any() and not small.down.any()
        assert (kept.rank, kept.energy, kept.error) == (1, 1.0, 0.0)


SPECTRUM = [10.0, 6.0, 5.0, 1.0, 0.5]  # squares: 100, 36, 25, 1, 0.25 of 162.25; sums: 10, 16, 21, 22 of 22.5


@pytest.mark.parametrize(
    ("keep", "rank"),
    [
        (Keep(), 5),
        (Keep(rank=2), 2),
        (Keep(rank=99), 5),
        (Keep(ratio=1), 1),
        (Keep(ratio=1.9), 2),  # above 5.26
        (Keep(ratio=2.1), 3),  # above 4.76
        (Keep(ratio=9.9), 3),  # above 1.01
        (Keep(ratio=10.1), 4),  # above 0.99
        (Keep(ratio=1000), 5),
        (Keep(ratio=1000, rank=3), 3),
        (Keep(frobenius=0.78), 1),  # sqrt(100 / 162.25) = 0.785
        (Keep(frobenius=0.79), 2),
        (Keep(frobenius=0.91), 2),  # sqrt(136 / 162.25) = 0.916
        (Keep(frobenius=0.92), 3),
        (Keep(frobenius=1.0), 5),
        (Keep(frobenius=0.92, rank=2), 2),
        (Keep(cumulative=0.44), 1),  # 10 / 22.5 = 0.444
        (Keep(cumulative=0.45), 2),
        (Keep(cumulative=0.93), 3),  # 21 / 22.5 = 0.933
        (Keep(cumulative=0.94), 4),
        (Keep(cumulative=1), 5),
        (Keep(cumulative=0.94, rank=1), 1),
    ],
)
def test_each_rule_keeps_as_many_as_it_says(keep: Keep, rank: int) -> None:
    whole = with_values(SPECTRUM)
    small, kept = decompose(whole, keep)
    assert small.rank == kept.rank == rank
    factors = LowRank(torch.eye(12, dtype=torch.float64), whole, 12.0)
    assert truncate(factors, keep)[0].rank == rank


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 1.5}, "rank 1.5"),
        ({"rank": True}, "rank True"),
        ({"ratio": 0.5}, "ratio 0.5"),
        ({"ratio": float("inf")}, "ratio inf"),
        ({"frobenius": 0.0}, "frobenius 0.0"),
        ({"frobenius": 1.01}, "frobenius 1.01"),
        ({"cumulative": float("nan")}, "cumulative nan"),
        ({"cumulative": -1}, "cumulative -1"),
        ({"cumulative": 0.5, "ratio": 3.0}, "ratio and cumulative"),
    ],
)
def test_what_cannot_be_kept_is_named(fields: dict[str, float], named: str) -> None:
    with pytest.raises(SdloraError, match=named):
        Keep(**fields)  # type: ignore[arg-type]


def test_clamping_cuts_what_is_beyond_the_quantile_and_owns_up_to_the_error() -> None:
    whole = random(30, 40)
    whole[3, 5] = 300.0
    free, before = decompose(whole, Keep(rank=4))
    cut, kept = decompose(whole, Keep(rank=4), clamp=0.9)
    sizes = torch.cat([free.up.flatten(), free.down.flatten()]).abs().sort().values
    bound = sizes[int(0.9 * sizes.numel()) - 1]
    assert torch.equal(cut.up, free.up.clamp(-bound, bound)) and torch.equal(cut.down, free.down.clamp(-bound, bound))
    assert kept.error == pytest.approx(distance(cut, whole), abs=1e-7) and kept.error > before.error
    assert kept.energy == before.energy
    assert torch.equal(decompose(whole, Keep(rank=4), clamp=1)[0].up, free.up)


@pytest.mark.parametrize("clamp", [0.0, 1.5, float("nan")])
def test_a_clamp_out_of_range_is_named(clamp: float) -> None:
    with pytest.raises(SdloraError, match=f"clamp {clamp}"):
        decompose(random(3, 4), Keep(), clamp=clamp)


def test_the_error_counts_the_rounding_to_fewer_bits() -> None:
    whole = random(30, 40)
    small, kept = decompose(whole, Keep(), dtype=torch.bfloat16)
    assert small.up.dtype == small.down.dtype == torch.bfloat16
    assert kept.error == pytest.approx(distance(small, whole), rel=1e-4) and kept.error > 1e-3


def test_values_that_are_not_finite_are_refused() -> None:
    broken = random(4, 5)
    broken[1, 1] = float("nan")
    with pytest.raises(SdloraError, match="not finite"):
        decompose(broken, Keep())
    with pytest.raises(SdloraError, match="not finite"):
        truncate(LowRank(broken, random(6, 4), 4.0), Keep())
    with pytest.raises(SdloraError, match="not finite"):
        truncate(LowRank(random(4, 5), random(6, 4), float("inf")), Keep())


def test_a_vector_has_no_low_rank_form() -> None:
    with pytest.raises(SdloraError, match="no matrix"):
        decompose(random(4), Keep())
    with pytest.raises(SdloraError, match="full.*no matrix"):
        as_low_rank(Full(random(4)), (4,), Keep())


def test_singular_vectors_are_orthonormal_and_give_the_delta_back() -> None:
    delta = DELTAS["tucker"]
    left, values, right = singular(delta)
    torch.testing.assert_close(left.T @ left, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(right @ right.T, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(left * values @ right, product(delta).flatten(1))


def loha(out: int, inside: int, rank: int) -> Hadamard:
    first, second = (random(out, rank), random(rank, inside, seed=1)), (random(out, rank, seed=2), random(rank, inside))
    return Hadamard(*first, *second, 1.5)


LAWS: dict[str, tuple[Delta, tuple[int, ...]]] = {
    "loha from factors": (loha(30, 40, 3), (30, 40)),
    "loha of a convolution": (loha(30, 45, 3), (30, 5, 3, 3)),
    "loha multiplied out": (loha(10, 12, 4), (10, 12)),
    "loha with cores": (
        Hadamard(
            *(random(4, 20), random(4, 12, seed=1), random(4, 20, seed=2), random(4, 12, seed=3)),
            2.0,
            *(random(4, 4, 3, 3, seed=4), random(4, 4, 3, 3, seed=5)),
        ),
        (20, 12, 3, 3),
    ),
    "lokr whole": (Kronecker(4.0, w1=random(4, 3), w2=random(6, 10)), (24, 30)),
    "lokr of pairs": (
        Kronecker(2.0, w1=random(4, 3), w2_a=random(8, 5), w2_b=random(5, 10, seed=2)),
        (32, 30),
    ),
    "lokr of a convolution": (Kronecker(1.0, w1=random(4, 3), w2=random(6, 5, 3, 3)), (24, 15, 3, 3)),
    "lokr with a core": (
        Kronecker(
            2.0,
            w1_a=random(4, 2),
            w1_b=random(2, 3),
            w2_a=random(2, 6),
            w2_b=random(2, 5),
            t2=random(2, 2, 3, 3),
        ),
        (24, 15, 3, 3),
    ),
    "full": (Full(random(20, 25)), (20, 25)),
}


@pytest.mark.parametrize("name", LAWS)
def test_every_linear_law_becomes_the_best_lora(name: str) -> None:
    delta, shape = LAWS[name]
    whole = delta.weight(torch.zeros(shape))
    for rank in (1, 4):
        small, kept = as_low_rank(delta, shape, Keep(rank=rank))
        assert small.shape == shape and small.rank == kept.rank == rank and kept.rank_before == delta.rank
        assert distance(small, whole) == pytest.approx(best_error(whole, rank), abs=1e-6)
        assert kept.error == pytest.approx(best_error(whole, rank), abs=1e-6)
    assert distance(as_low_rank(delta, shape, Keep())[0], whole) < 1e-6


def test_laws_of_low_rank_become_lora_of_no_more_ranks_than_they_have() -> None:
    assert as_low_rank(*LAWS["loha from factors"], Keep())[0].rank == 9
    assert as_low_rank(*LAWS["lokr of pairs"], Keep())[0].rank == 15  # 3 * 5


def test_lora_that_loses_nothing_is_handed_back_as_it_is() -> None:
    delta = lora(30, (40,), 8)
    small, kept = as_low_rank(delta, (30, 40), Keep(rank=8))
    assert small is delta and kept == Kept(8, 8, 1.0, 0.0)
    assert as_low_rank(delta, (30, 40), Keep(rank=7))[0].rank == 7
    assert as_low_rank(delta, (30, 40), Keep(ratio=1.01, rank=8))[0].rank == 1


def test_a_tucker_core_goes_into_down_even_where_no_rank_is_lost() -> None:
    small, _ = as_low_rank(DELTAS["tucker"], (20, 12, 3, 3), Keep(rank=6))
    assert small.mid is None and small.rank == 6
    assert distance(small, product(DELTAS["tucker"])) < 1e-6


def test_the_result_takes_the_shape_of_the_weight() -> None:
    flat = lora(20, (45,), 4)
    for keep in (Keep(), Keep(rank=2)):
        conv, _ = as_low_rank(flat, (20, 5, 3, 3), keep)
        assert conv.shape == (20, 5, 3, 3) and conv.up.shape[2:] == (1, 1)
        pointwise, _ = as_low_rank(flat, (20, 45, 1, 1), keep)
        assert pointwise.shape == (20, 45, 1, 1)
        assert as_low_rank(pointwise, (20, 45), keep)[0].shape == (20, 45)
    whole = product(flat)
    assert distance(as_low_rank(flat, (20, 5, 3, 3), Keep())[0], whole.reshape(20, 5, 3, 3)) == 0
    with pytest.raises(SdloraError, match="20x45 does not fit"):
        as_low_rank(flat, (20, 44), Keep())


def test_laws_that_depend_on_the_base_ask_for_it() -> None:
    base = random(20, 25, seed=5)
    for delta in (IA3(random(25), on_input=True), DoRA(lora(20, (25,), 4), random(20, 1).abs())):
        with pytest.raises(SdloraError, match=r"^(ia3|lora \+ dora) depends.*give that model"):
            as_low_rank(delta, (20, 25), Keep())
        small, _ = as_low_rank(delta, (20, 25), Keep(), base)
        assert distance(small, delta.weight(base)) < 1e-6
