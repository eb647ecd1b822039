"""How two changes meet, held against explicit products in float64 and against subspaces at known angles."""

from itertools import combinations_with_replacement
from math import cos, radians, sin, sqrt

import pytest
import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.laws import IA3, Delta, DoRA, Full, Hadamard, Kronecker, LowRank, Replacement, Sum
from sdlora.lowrank.overlap import Change, change_of, overlap, principal_cosines

SHAPE = (40, 6, 3, 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laws(seed: int) -> dict[str, Delta]:
    """Changes of a weight of SHAPE, which are given by few factors, by many, or whole."""

    def some(*shape: int) -> Tensor:
        return normal(*shape, seed=seed + sum(shape))

    low_rank = LowRank(some(3, 6, 3, 3), some(40, 3, 1, 1), 2.0)
    return {
        "lora": low_rank,
        "lora, flat": LowRank(some(5, 54), some(40, 5), 1.0),
        "lora in 16 bits": LowRank(some(4, 6, 3, 3).half(), some(40, 4, 1, 1).half(), -3.0),
        "lora with a core": LowRank(some(2, 6), some(40, 2), 1.0, some(2, 2, 3, 3)),
        "loha": Hadamard(some(40, 2), some(2, 54), some(40, 2), some(2, 54), 1.0),
        "loha of high rank": Hadamard(some(40, 9), some(9, 54), some(40, 8), some(8, 54), 1.0),
        "lokr": Kronecker(1.0, w1_a=some(4, 1), w1_b=some(1, 2), w2_a=some(10, 2), w2_b=some(2, 3, 3, 3)),
        "lokr, whole": Kronecker(1.0, w1=some(4, 2), w2=some(10, 3, 3, 3)),
        "full": Full(some(*SHAPE)),
        "sum": Sum(low_rank, Full(some(*SHAPE))),
        "dora": DoRA(low_rank, some(40).abs()),
        "ia3": IA3(some(40), False),
        "replacement": Replacement(some(*SHAPE)),
    }


def expected(one: Tensor, other: Tensor) -> tuple[float, ...]:
    """inner, cosine, columns and rows, by their definitions."""
    one, other = one.double().flatten(1), other.double().flatten(1)
    inner = float((one * other).sum())
    return (
        inner,
        inner / float(one.norm() * other.norm()),
        correlation(one @ one.T, other @ other.T),
        correlation(one.T @ one, other.T @ other),
    )


def correlation(one: Tensor, other: Tensor) -> float:
    one, other = (both - both.trace() / len(both) * torch.eye(len(both)) for both in (one, other))
    return float((one * other).sum() / (one.norm() * other.norm()))


@pytest.mark.parametrize(("name", "other_name"), list(combinations_with_replacement(laws(0), 2)))
def test_any_two_laws_meet_as_their_products_in_float64(name: str, other_name: str) -> None:
    base = normal(*SHAPE, seed=9)
    one, other = laws(0)[name], laws(1)[other_name]
    first, second = change_of(one, base), change_of(other, base)
    found = overlap(first, second)
    wanted = expected(one.weight(base), other.weight(base))
    scale = first.norm * second.norm
    assert found.inner / scale == pytest.approx(wanted[0] / scale, abs=2e-6)
    assert (found.cosine, found.columns, found.rows) == pytest.approx(wanted[1:], abs=5e-6)
    assert first.norm == pytest.approx(float(one.weight(base).double().norm()), rel=1e-5)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_whole_changes_meet_whether_they_are_tall_or_wide(shape: tuple[int, int]) -> None:
    one, other = normal(*shape), normal(*shape, seed=1)
    low_rank = LowRank(normal(2, shape[1], seed=2), normal(shape[0], 2, seed=3), 2.0)
    for delta, weight in ((Full(other), other), (low_rank, low_rank.up @ low_rank.down)):
        found = overlap(change_of(Full(one)), change_of(delta))
        assert (found.inner, found.cosine, found.columns, found.rows) == pytest.approx(expected(one, weight), abs=1e-4)


def flat(columns: Tensor, rows: Tensor) -> Change:
    """A change of equal singular values, from orthonormal columns (out, n) and rows (in, n)."""
    return change_of(LowRank(rows.T.contiguous(), columns, float(columns.shape[1])))


def basis(width: int, count: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(width, count, seed=seed).double()).Q


def test_the_same_directions_overlap_wholly_whatever_the_sign() -> None:
    columns, rows = basis(20, 3, 0), basis(30, 3, 1)
    one, other = flat(columns, rows), flat(-columns, rows)
    assert overlap(one, other).cosine == pytest.approx(-1)
    assert overlap(one, other).columns == pytest.approx(1) and overlap(one, other).rows == pytest.approx(1)
    for cosines in principal_cosines(one, other):
        assert cosines.tolist() == pytest.approx([1, 1, 1])


def test_directions_that_stand_upright_do_not_overlap() -> None:
    columns, rows = basis(400, 6, 0), basis(400, 6, 1)
    one, other = flat(columns[:, :3], rows[:, :3]), flat(columns[:, 3:], rows[:, 3:])
    found = overlap(one, other)
    assert found.cosine == pytest.approx(0, abs=1e-12)
    assert found.columns == found.rows == pytest.approx(-3 / 397)  # by chance it would be 0
    for cosines in principal_cosines(one, other):
        assert cosines.tolist() == pytest.approx([0, 0, 0], abs=1e-12)


def test_directions_at_thirty_degrees() -> None:
    columns, rows = basis(200, 4, 0), basis(50, 2, 1)
    turned = cos(radians(30)) * columns[:, :2] + sin(radians(30)) * columns[:, 2:]
    one, other = flat(columns[:, :2], rows), flat(turned, rows)
    found = overlap(one, other)
    assert found.cosine == pytest.approx(cos(radians(30)))
    assert found.columns == pytest.approx((2 * 0.75 - 4 / 200) / (2 * (1 - 2 / 200)))
    assert found.rows == pytest.approx(1)
    assert principal_cosines(one, other)[0].tolist() == pytest.approx([cos(radians(30))] * 2)


def test_the_overlap_of_equal_singular_values_is_told_by_the_principal_angles() -> None:
    one, other = flat(basis(20, 5, 0), basis(30, 5, 1)), flat(basis(20, 8, 2), basis(30, 8, 3))
    found, (columns, rows) = overlap(one, other), principal_cosines(one, other)
    for told, cosines, width in ((found.columns, columns, 20), (found.rows, rows, 30)):
        squares = float(cosines.square().sum())
        assert told == pytest.approx((squares - 40 / width) / sqrt(5 * (1 - 5 / width) * 8 * (1 - 8 / width)))


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_unrelated_changes_do_not_overlap_whatever_their_rank(rank: int) -> None:
    found = [
        overlap(
            flat(basis(128, rank, 4 * seed), basis(128, rank, 4 * seed + 1)),
            flat(basis(128, rank, 4 * seed + 2), basis(128, rank, 4 * seed + 3)),
        )
        for seed in range(20)
    ]
    assert abs(sum(one.columns or 0 for one in found) / 20) < 0.02
    assert abs(sum(one.rows or 0 for one in found) / 20) < 0.02


def test_directions_without_energy_count_for_nothing() -> None:
    up, down = normal(64, 2), normal(2, 48, seed=1)
    other = change_of(LowRank(normal(2, 48, seed=3), up + normal(64, 2, seed=2), 2.0))
    plain = change_of(LowRank(down, up, 2.0))
    noise = 1e-4 * normal(64, 30, seed=4), normal(30, 48, seed=5)
    noisy = change_of(LowRank(torch.cat([down, noise[1]]), torch.cat([up, noise[0]], 1), 32.0))
    before, after = overlap(plain, other), overlap(noisy, other)
    assert (after.columns, after.rows) == pytest.approx((before.columns, before.rows), abs=1e-3)
    assert [len(cosines) for cosines in principal_cosines(noisy, other)] == [2, 2]


def test_principal_angles_of_whole_changes_are_those_of_their_factors() -> None:
    one, other = (LowRank(normal(3, 30, seed=s), normal(20, 3, seed=s + 1), 3.0) for s in (0, 2))
    whole = [change_of(Full(delta.up @ delta.down)) for delta in (one, other)]
    tall = [change_of(Full((delta.up @ delta.down).T.contiguous())) for delta in (one, other)]
    columns, rows = principal_cosines(change_of(one), change_of(other))
    assert principal_cosines(*whole)[0].tolist() == pytest.approx(columns.tolist(), abs=1e-5)
    assert principal_cosines(*whole)[1].tolist() == pytest.approx(rows.tolist(), abs=1e-5)
    assert principal_cosines(*tall)[0].tolist() == pytest.approx(rows.tolist(), abs=1e-5)


def test_the_product_of_low_rank_factors_is_never_formed() -> None:
    width = 300_000  # the product would take 360 GB
    one, other = (LowRank(normal(2, width, seed=s), normal(width, 2, seed=s + 1), 2.0) for s in (0, 2))
    found = overlap(change_of(one), change_of(other))
    assert abs(found.cosine) < 0.01 and abs(found.columns or 0) < 0.01
    assert overlap(change_of(one), change_of(one)).cosine == pytest.approx(1)


def test_vectors_have_a_cosine_and_no_spaces() -> None:
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([4.0, -3.0])
    found = overlap(change_of(Full(one)), change_of(Full(one + other)))
    assert found.cosine == pytest.approx(sqrt(0.5)) and found.inner == pytest.approx(25)
    assert found.columns is None and found.rows is None


def test_what_changes_nothing_meets_nothing() -> None:
    nothing, some = LowRank(torch.zeros(2, 8), torch.zeros(6, 2), 2.0), LowRank(normal(2, 8), normal(6, 2), 2.0)
    found = overlap(change_of(nothing), change_of(some))
    assert (found.inner, found.cosine, found.columns, found.rows) == (0, 0, 0, 0)


def test_a_change_that_prefers_no_direction_overlaps_with_none() -> None:
    turn = Full(basis(16, 16, 0).float())
    assert overlap(change_of(turn), change_of(LowRank(normal(2, 16), normal(16, 2), 2.0))).columns == 0


def test_a_law_of_the_base_needs_the_base() -> None:
    with pytest.raises(SdloraError, match="depends on the weights of the base"):
        change_of(IA3(torch.ones(4), False))
