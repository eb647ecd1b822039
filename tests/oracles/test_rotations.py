"""The orthogonal laws: LyCORIS and peft where they can be asked, formulas in float64 where they cannot.

kohya and OneTrainer are no libraries, and peft builds butterflies of one stage only without a CUDA compiler: their
arithmetic is written out here in whole matrices.
"""

import lycoris.functional.boft as boft
import lycoris.functional.diag_oft as diag_oft
import pytest
import torch
from peft import BOFTConfig, OFTConfig
from torch import Tensor

from sdlora.lowrank.laws import BOFT, OFT, InputBOFT, OFTv2, Rotation
from tests.oracles.layers import IN, OUT, SHAPES, assert_agree, draw, factors_in, in_peft, layer_of, merged_change

every_layer = pytest.mark.parametrize("kind", SHAPES)
every_constraint = pytest.mark.parametrize("constraint", [0.0, 0.1, 100.0], ids=["none", "tight", "loose"])
with_and_without_rescale = pytest.mark.parametrize("rescaled", [False, True], ids=["plain", "rescaled"])


def _rescale(kind: str, rescaled: bool) -> Tensor | None:
    return draw(OUT, *[1] * (len(SHAPES[kind]) - 1)) if rescaled else None


@every_layer
@every_constraint
@with_and_without_rescale
def test_oft_is_lycoris_diag_oft(kind: str, constraint: float, rescaled: bool) -> None:
    base, blocks, rescale = draw(*SHAPES[kind]), draw(6, 4, 4), _rescale(kind, rescaled)
    wanted = diag_oft.diff_weight(base, blocks, rescale, constraint=constraint * OUT)
    assert_agree(OFT(blocks, constraint, rescale).weight(base), wanted)


@every_layer
@pytest.mark.parametrize("constraint", [0.1, 100.0], ids=["tight", "loose"])
def test_oft_is_kohya_oft(kind: str, constraint: float) -> None:
    """networks/oft.py: Q = (B - B^T) * clip(|Q|) / |Q|, R = (I + Q) (I - Q)^-1, W' = R^T W for each block."""
    base, blocks = draw(*SHAPES[kind]), draw(6, 4, 4)
    skew = (blocks - blocks.transpose(1, 2)).double()
    skew = skew * min(constraint * OUT / skew.norm().item(), 1.0)
    identity = torch.eye(4, dtype=torch.float64)
    rotation = torch.block_diag(*[(identity + q) @ torch.linalg.inv(identity - q) for q in skew])
    wanted = rotation.T @ base.double().flatten(1) - base.double().flatten(1)
    assert_agree(OFT(blocks, constraint).weight(base), wanted.reshape(base.shape))


@every_layer
@with_and_without_rescale
def test_old_blocks_are_the_rotation_itself(kind: str, rescaled: bool) -> None:
    """LyCORIS 2 saved R as `oft_diag`; W' = R^T W. float64, because newer ones cannot be given R."""
    base, blocks, rescale = draw(*SHAPES[kind]), torch.linalg.qr(draw(6, 4, 4)).Q, _rescale(kind, rescaled)
    whole = torch.block_diag(*blocks.double()).T @ base.double().flatten(1)
    wanted = (whole if rescale is None else whole * rescale.double().flatten(1)) - base.double().flatten(1)
    assert_agree(Rotation(blocks, rescale).weight(base), wanted.reshape(base.shape))


@every_layer
@every_constraint
@with_and_without_rescale
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_boft_is_lycoris_boft(kind: str, constraint: float, rescaled: bool, stages: int) -> None:
    base, blocks, rescale = draw(*SHAPES[kind]), draw(stages, 4, 6, 6), _rescale(kind, rescaled)
    wanted = boft.diff_weight(base, blocks, rescale, constraint=constraint * OUT)
    assert_agree(BOFT(blocks, constraint, rescale).weight(base), wanted)


@every_layer
@pytest.mark.parametrize(
    ("options", "series"),
    [
        ({}, (2, 2, 2, 1)),
        ({"num_cayley_neumann_terms": 7}, (2, 2, 2, 2, 2, 1)),
        ({"use_cayley_neumann": False}, None),
        ({"block_share": True}, (2, 2, 2, 1)),
    ],
    ids=["default", "7 terms", "exact", "shared"],
)
def test_oftv2_is_peft_oft(kind: str, options: dict[str, int], series: tuple[float, ...] | None) -> None:
    base = draw(*SHAPES[kind])
    wrapped = in_peft(OFTConfig(oft_block_size=4, **options), layer_of(base))  # type: ignore[arg-type]
    vectors = factors_in(wrapped)["oft_R"]
    delta = OFTv2(vectors, series=series, peft=True)
    assert (vectors.shape[0] == 1) == ("block_share" in options) and delta.rank == 4
    assert_agree(delta.weight(base), merged_change(wrapped))


@every_layer
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_oftv2_is_onetrainer_oft(kind: str, scaled: bool) -> None:
    """LoRAModule.py: Linear rotates its input, y = W (x R); Conv2d its weight, W' = W R. Cayley-Neumann of 5 terms."""
    base = draw(*SHAPES[kind])
    flat = base.double().flatten(1)
    vectors = draw(flat.shape[1] // 4, 6, scale=0.5)
    rotations = []
    for vector in vectors.double() / (2 * 3**0.5 if scaled else 1):
        upper = torch.zeros(4, 4, dtype=torch.float64)
        upper[0, 1:], upper[1, 2:], upper[2, 3:] = vector[:3], vector[3:5], vector[5:]
        q = upper - upper.T
        rotations.append(torch.eye(4) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    rotation = torch.block_diag(*rotations)
    if kind == "linear":
        x = torch.eye(IN, dtype=torch.float64)
        wanted = ((x @ rotation) @ flat.T).T - flat  # the layer's output for each unit vector is a column of W'
    else:
        wanted = flat @ rotation - flat
    assert_agree(OFTv2(vectors, scaled=scaled).weight(base), wanted.reshape(base.shape))


@every_layer
def test_boft_of_the_inputs_is_peft_boft(kind: str) -> None:
    base = draw(*SHAPES[kind])
    wrapped = in_peft(BOFTConfig(boft_block_size=4), layer_of(base))
    parts = factors_in(wrapped)
    assert_agree(InputBOFT(parts["boft_R"], parts["boft_s"]).weight(base), merged_change(wrapped))


@every_layer
@pytest.mark.parametrize("stages", [2, 3])
def test_boft_of_the_inputs_has_peft_s_stages(kind: str, stages: int) -> None:
    """As peft multiplies with a compiler at hand: B_i = P_i blockdiag(R) P_i^T by its own permutations, in float64."""
    base = draw(*SHAPES[kind])
    flat = base.double().flatten(1)
    inputs = flat.shape[1]
    layer = in_peft(BOFTConfig(boft_block_size=4), layer_of(draw(OUT, IN)))  # for its permutations
    blocks, scale = draw(stages, inputs // 4, 4, 4), draw(OUT, 1)
    whole, identity = torch.eye(inputs, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    for stage in range(stages):
        order = layer.block_butterfly_perm(inputs, inputs // 4 // 2**stage, 2, stages - 1)
        permutation = layer.perm2mat(order).double()
        skew = 0.5 * (blocks[stage] - blocks[stage].transpose(1, 2)).double()
        rotation = torch.block_diag(*[(identity - q) @ torch.linalg.inv(identity + q) for q in skew])
        whole = permutation @ rotation @ permutation.T @ whole
    wanted = (whole @ flat.T).T * scale.double() - flat
    assert_agree(InputBOFT(blocks, scale).weight(base), wanted.reshape(base.shape))
