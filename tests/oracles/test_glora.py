"""GLoRA against LyCORIS' module; its old layout and its core, which LyCORIS no longer builds, in float64."""

import pytest
import torch
from lycoris.modules import GLoRAModule
from torch import Tensor

from sdlora.lowrank.laws import GLoRA
from tests.oracles.layers import IN, OUT, SHAPES, assert_agree, draw, layer_of

RANK = 3
every_layer = pytest.mark.parametrize("kind", SHAPES)
every_alpha = pytest.mark.parametrize("alpha", [RANK, 1.0, 8.0])


def _factors(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a1, a2, b1, b2 as LyCORIS 4 lays them out."""
    kernel, ones = SHAPES[kind][2:], [1] * (len(SHAPES[kind]) - 2)
    return draw(IN, RANK, *ones), draw(RANK, IN, *ones), draw(OUT, RANK, *ones), draw(RANK, IN, *kernel)


@every_layer
@every_alpha
def test_glora_is_lycoris_glora(kind: str, alpha: float) -> None:
    layer, factors = layer_of(draw(*SHAPES[kind])), _factors(kind)
    module = GLoRAModule("g", layer, lora_dim=RANK, alpha=alpha)
    for name, factor in zip(("a1", "a2", "b1", "b2"), factors, strict=True):
        parameter = getattr(module, name).weight
        assert parameter.shape == factor.shape
        parameter.data = factor
    delta = GLoRA(*factors, alpha)
    assert delta.rank == RANK
    assert_agree(delta.weight(layer.weight), module.get_diff_weight()[0].detach())


@pytest.mark.parametrize("kind", ["linear", "conv1x1"])
@every_alpha
def test_the_old_layout_is_told_by_its_shapes(kind: str, alpha: float) -> None:
    """LyCORIS before 3: scale * (b2 @ b1 + W @ a2 @ a1), on linear layers and pointwise convolutions only."""
    ones = [1] * (len(SHAPES[kind]) - 2)
    a1, a2, b1, b2 = draw(RANK, IN, *ones), draw(IN, RANK, *ones), draw(RANK, IN, *ones, seed=1), draw(OUT, RANK, *ones)
    base = draw(*SHAPES[kind])
    down_a, up_a, down_b, up_b, flat = (x.double().flatten(1) for x in (a1, a2, b1, b2, base))
    wanted = alpha / RANK * (up_b @ down_b + flat @ up_a @ down_a)
    delta = GLoRA(a1, a2, b1, b2, alpha)
    assert delta.rank == RANK
    assert_agree(delta.weight(base), wanted.reshape(base.shape))


@pytest.mark.parametrize("rank", [1, 7, 8])
def test_on_a_square_layer_the_order_is_the_one_whose_rank_is_not_above_the_width(rank: int) -> None:
    a1, a2, b1, b2 = (draw(*((8, rank), (rank, 8))[seed % 2], seed=seed) for seed in range(4))
    new, base = GLoRA(a1, a2, b1, b2, 1.0), draw(8, 8)
    double = [x.double() for x in (a1, a2, b1, b2, base)]
    wanted = (double[2] @ double[3] + double[4] @ double[0] @ double[1]) / rank
    assert (new.rank, new.shape) == (rank, (8, 8))
    assert_agree(new.weight(base), wanted)
    old = GLoRA(a2, a1, b2, b1, 1.0)
    assert (old.rank, old.shape) == (rank, (8, 8))
    if rank < 8:  # as many as the width look the same in either order, and are read in the new one
        assert torch.equal(old.weight(base), new.weight(base))


@every_alpha
def test_a_core_stands_between_b1_and_b2(alpha: float) -> None:
    a1, a2, b1, _ = _factors("conv3x3")
    b2, bm, base = draw(RANK, IN, 1, 1), draw(RANK, RANK, 3, 3), draw(*SHAPES["conv3x3"])
    before, behind, up, down, core, whole = (x.double().squeeze() for x in (a1, a2, b1, b2, bm, base))
    change = torch.einsum("mnhw,om,ni->oihw", core, up, down)
    of_itself = torch.einsum("oihw,ir,rj->ojhw", whole, before, behind)
    assert_agree(GLoRA(a1, a2, b1, b2, alpha, bm).weight(base), alpha / RANK * (change + of_itself))
