"""Blends: held against float64 sums of whole products, peft's merging functions, and what the methods promise."""

from collections.abc import Mapping

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.blend import METHODS, Blend, Weights, blend, blended
from sdlora.lowrank.laws import IA3, Delta, DoRA, Full, Hadamard, Kronecker, LowRank
from sdlora.lowrank.truncation import Keep

A, B = "unet.down_blocks.0.attentions.0.attn1.to_q", "unet.down_blocks.1.resnets.0.conv1"
T = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
SHAPES = {A: (24, 32), B: (20, 6, 3, 3), T: (16, 12)}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(shape: tuple[int, ...], rank: int, seed: int, alpha: float = 2.0) -> LowRank:
    ones = (1,) * len(shape[2:])
    return LowRank(random(rank, *shape[1:], seed=seed), random(shape[0], rank, *ones, seed=seed + 100), alpha)


def adapter(seed: int, rank: int = 3, paths: Mapping[str, tuple[int, ...]] = SHAPES) -> Adapter:
    return Adapter({path: lora(shape, rank, seed + n) for n, (path, shape) in enumerate(paths.items())})


def whole(delta: Delta, shape: tuple[int, ...]) -> Tensor:
    """The delta multiplied out; in float64 for LoRA."""
    if not isinstance(delta, LowRank) or delta.mid is not None:
        return delta.weight(torch.zeros(shape)).double()
    return (delta.alpha / delta.rank * delta.up.double().flatten(1) @ delta.down.double().flatten(1)).reshape(shape)


def assert_near(found: Delta, wanted: Tensor, within: float = 1e-6) -> None:
    wanted = wanted.double()
    assert float((whole(found, tuple(wanted.shape)) - wanted).norm() / wanted.norm()) < within


def best_error(wanted: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(wanted.double().flatten(1))
    return float(values[rank:].norm() / values.norm())


def only(delta: Delta, path: str = A) -> Adapter:
    return Adapter({path: delta})


def test_a_sum_is_exact_and_ranks_add() -> None:
    one, two, three = adapter(1), adapter(5, rank=5), adapter(9, rank=1, paths={A: SHAPES[A]})
    made = blend([(one, Weights(0.8)), (two, Weights(-0.5)), (three, Weights(2))])
    assert list(made.adapter.deltas) == [A, B, T] and made.adapter.metadata == {}
    assert [delta.rank for delta in made.adapter.deltas.values()] == [9, 8, 8]
    for path, shape in SHAPES.items():
        wanted = 0.8 * whole(one.deltas[path], shape) - 0.5 * whole(two.deltas[path], shape)
        if path == A:
            wanted += 2 * whole(three.deltas[path], shape)
        delta = made.adapter.deltas[path]
        assert delta.shape == shape
        assert_near(delta, wanted)
        assert made.kept[path].error == 0 and made.kept[path].energy == 1
        assert made.kept[path].rank == made.kept[path].rank_before == delta.rank


def test_one_adapter_at_its_own_weight_keeps_its_factors() -> None:
    one = adapter(1)
    delta = blend([(one, Weights(0.3))]).adapter.deltas[B]
    before = one.deltas[B]
    assert isinstance(delta, LowRank) and isinstance(before, LowRank)
    assert delta.up is before.up and delta.down is before.down and delta.alpha == before.alpha * 0.3


def test_small_scales_do_not_vanish_in_the_factors_of_a_sum() -> None:
    """A tiny scale goes into both factors, or half precision would lose it."""
    small = LowRank(random(2, 32), random(24, 2) * 1e-4, alpha=2e-3)
    delta = blend([(only(small), Weights()), (only(small), Weights())]).adapter.deltas[A]
    assert isinstance(delta, LowRank)
    halves = LowRank(delta.down.half(), delta.up.half(), delta.alpha)
    assert_near(halves, 2 * whole(small, SHAPES[A]), within=1e-3)


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_a_truncated_sum_is_the_best_of_its_rank(rank: int) -> None:
    one, two = adapter(1), adapter(5, rank=5)
    made = blend([(one, Weights(0.8)), (two, Weights(0.5))], keep=Keep(rank=rank))
    for path, shape in SHAPES.items():
        wanted = 0.8 * whole(one.deltas[path], shape) + 0.5 * whole(two.deltas[path], shape)
        delta, kept = made.adapter.deltas[path], made.kept[path]
        assert (delta.rank, kept.rank, kept.rank_before) == (rank, rank, 8)
        found = float((whole(delta, shape) - wanted).norm() / wanted.norm())
        assert found == pytest.approx(best_error(wanted, rank), abs=1e-6)
        assert kept.error == pytest.approx(found, abs=1e-6)


def test_a_sum_has_no_more_ranks_than_the_matrix() -> None:
    shape = (5, 7)
    one, two = lora(shape, 4, 1), lora(shape, 4, 2)
    made = blend([(only(one), Weights()), (only(two), Weights())])
    assert made.adapter.deltas[A].rank == 5
    assert_near(made.adapter.deltas[A], whole(one, shape) + whole(two, shape))


def test_all_linear_laws_add_up() -> None:
    shape = (20, 45)
    laws: list[Delta] = [
        lora(shape, 2, 1),
        Hadamard(random(20, 2), random(2, 45), random(20, 2, seed=1), random(2, 45, seed=1), 1.0),
        Kronecker(1.0, w1=random(2, 3), w2_a=random(10, 2), w2_b=random(2, 15)),
    ]
    tucker = LowRank(random(3, 5, 1, 1), random(20, 3, 1, 1), 2.0, random(3, 3, 3, 3))
    made = blend([(only(law), Weights(n - 1.5)) for n, law in enumerate([*laws, tucker])])
    conv = (20, 5, 3, 3)
    wanted = sum((n - 1.5) * law.weight(torch.zeros(conv)).double() for n, law in enumerate([*laws, tucker]))
    assert isinstance(wanted, Tensor)
    assert made.adapter.deltas[A].shape == conv and isinstance(made.adapter.deltas[A], LowRank)
    assert_near(made.adapter.deltas[A], wanted)


def test_linear_and_pointwise_factors_add_up() -> None:
    linear, pointwise = lora((8, 6), 2, 1), lora((8, 6, 1, 1), 2, 2)
    made = blend([(only(linear), Weights()), (only(pointwise), Weights())])
    assert made.adapter.deltas[A].shape == (8, 6, 1, 1)
    assert_near(made.adapter.deltas[A], whole(linear, (8, 6, 1, 1)) + whole(pointwise, (8, 6, 1, 1)))


def test_whole_deltas_norms_and_biases_just_add() -> None:
    norm, bias = "unet.norm1", f"{A}.bias"
    one = Adapter({A: Full(random(24, 32)), norm: Full(random(6)), bias: Full(random(24).half())})
    two = Adapter({A: lora((24, 32), 2, 7), norm: Full(random(6, seed=1)), bias: Full(random(24, seed=2))})
    made = blend([(one, Weights(0.5)), (two, Weights(-2))], keep=Keep(rank=1))
    assert made.kept == {} and all(isinstance(delta, Full) for delta in made.adapter.deltas.values())
    for path, delta in made.adapter.deltas.items():
        shape = delta.shape
        assert_near(delta, 0.5 * whole(one.deltas[path], shape) - 2 * whole(two.deltas[path], shape))


def test_laws_that_depend_on_the_base_are_refused_by_name_or_computed_from_it() -> None:
    base = random(24, 32, seed=3)
    dora = DoRA(lora((24, 32), 2, 1), random(24, 1).abs())
    plain = lora((24, 32), 2, 2)
    parents = [(only(plain), Weights(0.5)), (only(dora), Weights(0.25))]
    with pytest.raises(SdloraError, match=rf"^{A}: lora \+ dora in adapter 2 depends.*give that model"):
        blend(parents)
    made = blend(parents, bases={A: base}.__getitem__)
    assert_near(made.adapter.deltas[A], 0.5 * plain.weight(base) + 0.25 * dora.weight(base))
    assert blend([(only(plain), Weights()), (only(dora), Weights(0))]).adapter.deltas[A].rank == 2
    scaled = blend([(only(IA3(random(32), True)), Weights(2))], "ties", density=1.0, bases={A: base}.__getitem__)
    assert_near(scaled.adapter.deltas[A], 2 * base * random(32))


def test_weights_go_by_component_and_block() -> None:
    weights = Weights(
        0.5,
        components={"text_encoder": 0.25},
        blocks={"unet.*": 3.0, "unet.down_blocks.1.*": -2.0, "fc1": 4.0},
    )
    assert weights.of([A, B, T, f"{T}.bias"]) == {A: 1.5, B: -1.0, T: 1.0, f"{T}.bias": 1.0}
    assert Weights(0.5, blocks={"unet.down_blocks.1.*": 2.0, "unet.*": 0.0}).of([A, B]) == {A: 0.0, B: 0.0}
    made = blend([(adapter(1), Weights(blocks={"down_blocks.*": 0}))])
    assert list(made.adapter.deltas) == [T]


def test_what_has_weight_0_is_left_out() -> None:
    one, two = adapter(1), adapter(5)
    made = blend([(one, Weights(0, components={"unet": 1.0})), (two, Weights(0))])
    assert list(made.adapter.deltas) == [A, B] and made.adapter.deltas[A].rank == 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (Weights(components={"txt_encoder": 1.0}), "adapter 2 .*'txt_encoder'.*nearest: text_encoder.*it has unet"),
        (Weights(blocks={"unet.down_block.1.*": 1.0}), r"adapter 2 .*'unet.down_block.1.\*'.*unet.down_blocks.1"),
    ],
)
def test_weights_for_what_is_not_there_are_refused(weights: Weights, message: str) -> None:
    with pytest.raises(SdloraError, match=message):
        blend([(adapter(1), Weights()), (adapter(5), weights)])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True, "1"])
def test_weights_are_finite_numbers(weight: float) -> None:
    for fields in ({"everywhere": weight}, {"components": {"unet": weight}}, {"blocks": {"*": weight}}):
        with pytest.raises(SdloraError, match="no finite number"):
            Weights(**fields)  # type: ignore[arg-type]


def test_deltas_of_different_models_are_refused() -> None:
    for method in METHODS:
        with pytest.raises(SdloraError, match=rf"^{A}: the delta of adapter 2 has shape 24x33.*24x32"):
            blend([(only(lora((24, 32), 2, 1)), Weights()), (only(lora((24, 33), 2, 1)), Weights())], method)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tie"}, "'tie' is unknown.*nearest: ties"),
        ({"density": 0.0}, "density 0.0"),
        ({"density": 1.5}, "density 1.5"),
        ({"density": float("nan")}, "density nan"),
    ],
)
def test_what_cannot_be_asked_for_is_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(SdloraError, match=message):
        blend([(adapter(1), Weights())], **arguments)  # type: ignore[arg-type]
    with pytest.raises(SdloraError, match="no adapters"):
        blend([])


def test_blending_goes_parameter_by_parameter() -> None:
    steps = blended([(adapter(1), Weights()), (adapter(5), Weights())])
    assert next(steps).path == A
    assert [step.path for step in steps] == [B, T]


def test_orthogonal_keeps_the_first_and_projects_the_next_off_all_before() -> None:
    one, two, three = (lora(SHAPES[A], rank, seed) for rank, seed in ((3, 1), (4, 2), (2, 3)))
    parents = [(only(one), Weights(0.5)), (only(two), Weights(-2)), (only(three), Weights(1))]
    made = blend(parents, "orthogonal").adapter.deltas[A]

    def off(matrix: Tensor, *others: Tensor) -> Tensor:
        """Projected off the row and column spaces of the others, by whole orthogonal projectors."""
        columns, rows = torch.cat(others, 1), torch.cat(others)
        left = torch.eye(len(matrix)).double() - columns @ torch.linalg.pinv(columns, rtol=1e-9)
        right = torch.eye(matrix.shape[1]).double() - torch.linalg.pinv(rows, rtol=1e-9) @ rows
        return left @ matrix @ right

    first, second, third = (whole(delta, SHAPES[A]) for delta in (one, two, three))
    assert_near(made, 0.5 * first - 2 * off(second, first) + off(third, first, second))
    assert made.rank == 9


def test_orthogonal_leaves_nothing_of_what_was_there_before() -> None:
    one = lora(SHAPES[A], 3, 1)
    made = blend([(only(one), Weights()), (only(one), Weights(5))], "orthogonal", Keep(rank=6))
    assert made.adapter.deltas[A].rank == 3
    assert_near(made.adapter.deltas[A], whole(one, SHAPES[A]))
    untrained = LowRank(random(3, 32), torch.zeros(24, 3), 3.0)
    made = blend([(only(untrained), Weights()), (only(one), Weights(5))], "orthogonal")
    assert_near(made.adapter.deltas[A], 5 * whole(one, SHAPES[A]))


def test_orthogonal_adds_vectors_and_refuses_whole_matrices() -> None:
    bias = f"{A}.bias"
    one = Adapter({A: lora(SHAPES[A], 2, 1), bias: Full(random(24))})
    two = Adapter({A: Full(random(24, 32)), bias: Full(random(24, seed=1))})
    with pytest.raises(SdloraError, match=f"^{A}: orthogonal.*whole"):
        blend([(one, Weights()), (two, Weights())], "orthogonal")
    made = blend([(one, Weights()), (two, Weights(2, blocks={"to_q": 0, "*.bias": 1}))], "orthogonal")
    assert made.adapter.deltas[A] is not two.deltas[A] and made.adapter.deltas[A].rank == 2
    assert_near(made.adapter.deltas[bias], random(24) + 2 * random(24, seed=1))


ENOUGH = Keep(rank=24)  # what SHAPES[A] and B can have at all


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("path", [A, B])
def test_ties_is_that_of_peft(path: str, density: float) -> None:
    shape = SHAPES[path]
    parents, weights = [only(lora(shape, 3, seed), path) for seed in (1, 2, 3)], (0.8, 0.5, -1.2)
    made = blend([(p, Weights(w)) for p, w in zip(parents, weights, strict=True)], "ties", ENOUGH, density)
    # peft elects the sign before it weighs, which for a negative weight is the wrong one: hand it what is weighed.
    changes = [weight * whole(p.deltas[path], shape).float() for p, weight in zip(parents, weights, strict=True)]
    wanted = merge_utils.ties(changes, torch.ones(3), round(density * changes[0].numel()) / changes[0].numel())
    assert_near(made.adapter.deltas[path], wanted)


def test_elements_are_decomposed_to_the_sum_of_the_ranks_unless_told_otherwise() -> None:
    one, two = lora(SHAPES[A], 3, 1), lora(SHAPES[A], 4, 2)
    parents = [(only(one), Weights(0.8)), (only(two), Weights(0.5))]
    for method in ("ties", "dare", "dare_ties"):
        exact = whole(blend(parents, method, ENOUGH).adapter.deltas[A], SHAPES[A])
        for keep, rank in ((None, 7), (Keep(rank=2), 2)):
            made = blend(parents, method, keep)
            assert made.adapter.deltas[A].rank == made.kept[A].rank == rank and made.kept[A].rank_before == 7
            assert made.kept[A].error == pytest.approx(best_error(exact, rank), abs=1e-5)
            found = float((whole(made.adapter.deltas[A], SHAPES[A]) - exact).norm() / exact.norm())
            assert found == pytest.approx(best_error(exact, rank), abs=1e-5)


def test_dare_drops_or_rescales_each_element() -> None:
    shape, density = (40, 60), 0.3
    one = lora(shape, 3, 1)
    made = blend([(only(one), Weights(2))], "dare", Keep(), density).adapter.deltas[A]
    quotient = whole(made, shape) / (2 * whole(one, shape))
    stays = quotient > 0.5 / density
    share = float(stays.double().mean())
    assert abs(share - density) < 4 * (density * (1 - density) / stays.numel()) ** 0.5
    torch.testing.assert_close(quotient[stays], torch.full_like(quotient[stays], 1 / density), rtol=1e-2, atol=0)
    assert float(quotient[~stays].abs().median()) < 1e-4
    two = blend([(only(one), Weights(1)), (only(one), Weights(1))], "dare", Keep(), density).adapter.deltas[A]
    both = float(((whole(two, shape) / whole(one, shape)) > 1.5 / density).double().mean())
    assert abs(both - density**2) < 4 * (density**2 / stays.numel()) ** 0.5  # two draws, independent


def test_dare_ties_votes_on_what_was_drawn() -> None:
    shape = SHAPES[A]
    one, two = lora(shape, 3, 1), lora(shape, 3, 2)

    def made(method: str, first: float, second: float) -> Tensor:
        parents = [(only(one), Weights(first)), (only(two), Weights(second))]
        return whole(blend(parents, method, ENOUGH, 0.4, seed=3).adapter.deltas[A], shape)

    # A weight close to nothing leaves the draws of one adapter alone.
    first, second = made("dare", 1, 1e-12), made("dare", 1e-12, 1)
    wanted = merge_utils.disjoint_merge(
        torch.stack([first.where(first.abs() > 1e-5, 0), second.where(second.abs() > 1e-5, 0)]),
        merge_utils.calculate_majority_sign_mask(
            torch.stack([first.where(first.abs() > 1e-5, 0), second.where(second.abs() > 1e-5, 0)])
        ),
    )
    torch.testing.assert_close(made("dare_ties", 1, 1), wanted, rtol=0, atol=2e-5)


def same(one: Blend, other: Blend) -> bool:
    pairs = [(one.adapter.deltas[path], other.adapter.deltas[path]) for path in one.adapter.deltas]
    return all(torch.equal(whole(a, a.shape), whole(b, b.shape)) for a, b in pairs)


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_paths() -> None:
    one, two = adapter(1), adapter(5)
    backwards = Adapter(dict(reversed(list(one.deltas.items()))))
    torch.manual_seed(1)
    first = blend([(one, Weights()), (two, Weights())], "dare", seed=7)
    torch.manual_seed(2)
    assert same(first, blend([(backwards, Weights()), (two, Weights())], "dare", seed=7))
    assert not same(first, blend([(one, Weights()), (two, Weights())], "dare", seed=8))
    twins = {path: one.deltas[A] for path in (A, f"{A}.twin")}
    drawn = blend([(Adapter(twins), Weights())], "dare").adapter.deltas
    assert not torch.equal(whole(drawn[A], SHAPES[A]), whole(drawn[f"{A}.twin"], SHAPES[A]))


def test_learned_tokens_of_all_parents_are_kept() -> None:
    cat, dog = random(2, 8), random(1, 8, seed=1)
    one = Adapter({A: lora(SHAPES[A], 2, 1)}, embeddings={"<cat>": {"text_encoder": cat}})
    two = Adapter({}, embeddings={"<dog>": {"text_encoder": dog}, "<cat>": {"text_encoder": cat.clone()}})
    made = blend([(one, Weights(-0.5)), (two, Weights())]).adapter
    assert {token: list(by) for token, by in made.embeddings.items()} == {
        "<cat>": ["text_encoder"],
        "<dog>": ["text_encoder"],
    }
    assert torch.equal(made.embeddings["<dog>"]["text_encoder"], dog)
    assert list(blend([(one, Weights(0)), (two, Weights())]).adapter.embeddings) == ["<dog>", "<cat>"]
    for meaning in ({"text_encoder": dog}, {"text_encoder": cat, "text_encoder_2": cat}):
        other = Adapter({}, embeddings={"<cat>": meaning})
        with pytest.raises(SdloraError, match="'<cat>'.*adapter 1.*adapter 3"):
            blend([(one, Weights()), (two, Weights()), (other, Weights())])
