"""DoRA on both axes and over several laws, against peft, LyCORIS' modules, and the formula in float64.

LyCORIS is asked at multiplier 1 only: below it, it goes towards W + delta, not W. Its modules of LoHa and LoKr scale
their delta twice, so they are asked with alpha = rank; at other alphas its `weight_decompose` is, and the formula.
"""

import lycoris.functional.loha as loha
import pytest
import torch
from lycoris.functional import weight_decompose
from lycoris.modules import LoConModule, LohaModule, LokrModule
from peft import LoraConfig
from torch import Tensor

from sdlora.lowrank.laws import DoRA, Hadamard, Kronecker, LowRank
from sdlora.lowrank.laws.delta import Delta
from tests.oracles.layers import IN, OUT, SHAPES, assert_agree, draw, factors_in, in_peft, layer_of, merged_change

RANK = 2
every_layer = pytest.mark.parametrize("kind", SHAPES)
both_axes = pytest.mark.parametrize("by_output", [True, False], ids=["outputs", "inputs"])


def _inner(law: str, kind: str, alpha: float = RANK) -> Delta:
    out, inputs, *kernel = SHAPES[kind]
    flat = torch.Size((inputs, *kernel)).numel()
    if law == "lora":
        return LowRank(draw(RANK, inputs, *kernel), draw(out, RANK, *[1] * len(kernel)), alpha)
    if law == "loha":
        return Hadamard(draw(out, RANK), draw(RANK, flat), draw(out, RANK, seed=1), draw(RANK, flat, seed=1), alpha)
    return Kronecker(alpha, w1=draw(4, 4), w2_a=draw(out // 4, RANK), w2_b=draw(RANK, flat // 4))


def _magnitude(kind: str, by_output: bool) -> Tensor:
    """As LyCORIS lays it out."""
    ones = [1] * (len(SHAPES[kind]) - 2)
    return 4 * draw(*((OUT, 1) if by_output else (1, IN)), *ones).abs() + 1


def _formula(base: Tensor, delta: Tensor, magnitude: Tensor, by_output: bool) -> Tensor:
    """m * (W + delta) / |W + delta| - W in float64, row by row or column by column."""
    turned = (base.double() + delta.double()).movedim(0 if by_output else 1, 0)
    rows = [m * row / row.square().sum().sqrt() for m, row in zip(magnitude.double().flatten(), turned, strict=True)]
    return torch.stack(rows).movedim(0, 0 if by_output else 1) - base.double()


@every_layer
@both_axes
@pytest.mark.parametrize("law", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("alpha", [RANK, 1.0, 5.0])
def test_the_changed_weight_gets_its_magnitude(kind: str, by_output: bool, law: str, alpha: float) -> None:
    base, magnitude, inner = draw(*SHAPES[kind]), _magnitude(kind, by_output), _inner(law, kind, alpha)
    delta = DoRA(inner, magnitude)
    assert (delta.name, delta.rank) == (f"{law} + dora", RANK)
    assert_agree(delta.weight(base), _formula(base, inner.weight(base), magnitude, by_output))


@every_layer
@both_axes
def test_dora_is_lycoris_locon_with_weight_decompose(kind: str, by_output: bool) -> None:
    layer, inner, magnitude = layer_of(draw(*SHAPES[kind])), _inner("lora", kind, 5.0), _magnitude(kind, by_output)
    assert isinstance(inner, LowRank)
    module = LoConModule("l", layer, lora_dim=RANK, alpha=5.0, weight_decompose=True, wd_on_out=by_output)
    module.lora_down.weight.data, module.lora_up.weight.data = inner.down, inner.up
    assert module.dora_scale.shape == magnitude.shape
    module.dora_scale.data = magnitude
    wanted = module.get_merged_weight()[0].detach() - layer.weight.detach()
    assert_agree(DoRA(inner, magnitude).weight(layer.weight), wanted)


@every_layer
@both_axes
def test_dora_over_loha_is_lycoris_doha(kind: str, by_output: bool) -> None:
    layer, inner, magnitude = layer_of(draw(*SHAPES[kind])), _inner("loha", kind), _magnitude(kind, by_output)
    assert isinstance(inner, Hadamard)
    module = LohaModule("l", layer, lora_dim=RANK, alpha=RANK, weight_decompose=True, wd_on_out=by_output)
    for name in ("w1_a", "w1_b", "w2_a", "w2_b"):
        getattr(module, f"hada_{name}").data = getattr(inner, name)
    module.dora_scale.data = magnitude
    wanted = module.get_merged_weight(shape=layer.weight.shape)[0].detach() - layer.weight.detach()
    assert_agree(DoRA(inner, magnitude).weight(layer.weight), wanted)


@every_layer
@both_axes
def test_dora_over_lokr_is_lycoris_dokr(kind: str, by_output: bool) -> None:
    layer, inner, magnitude = layer_of(draw(*SHAPES[kind])), _inner("lokr", kind), _magnitude(kind, by_output)
    assert isinstance(inner, Kronecker)
    module = LokrModule("l", layer, lora_dim=RANK, alpha=RANK, weight_decompose=True, wd_on_out=by_output)
    for name in ("w1", "w2_a", "w2_b"):
        parameter = getattr(module, f"lokr_{name}")
        assert parameter.shape == getattr(inner, name).shape
        parameter.data = getattr(inner, name)
    module.dora_scale.data = magnitude
    wanted = module.get_merged_weight(shape=layer.weight.shape)[0].detach() - layer.weight.detach()
    assert_agree(DoRA(inner, magnitude).weight(layer.weight), wanted)


@every_layer
@both_axes
def test_dora_over_a_scaled_loha_is_lycoris_weight_decompose(kind: str, by_output: bool) -> None:
    base, inner, magnitude = draw(*SHAPES[kind]), _inner("loha", kind, 5.0), _magnitude(kind, by_output)
    assert isinstance(inner, Hadamard)
    weights = (inner.w1_b, inner.w1_a, inner.w2_b, inner.w2_a, None, None)
    changed = base + loha.diff_weight(*weights, gamma=torch.tensor(5.0 / RANK)).reshape(base.shape)
    wanted = weight_decompose(changed, magnitude, wd_on_out=by_output) - base
    assert_agree(DoRA(inner, magnitude).weight(base), wanted)


@every_layer
@pytest.mark.parametrize("out", [OUT, IN], ids=["oblong", "square"])
def test_dora_is_peft_dora(kind: str, out: int) -> None:
    base = draw(out, *SHAPES[kind][1:])
    wrapped = in_peft(LoraConfig(r=RANK, lora_alpha=5, use_dora=True), layer_of(base))
    parts = factors_in(wrapped)
    magnitude = parts["lora_magnitude_vector"]
    assert magnitude.shape == ((out,) if kind == "linear" else (1, out, 1, 1))
    delta = DoRA(LowRank(parts["lora_A"], parts["lora_B"], 5.0), magnitude, by_output=True)
    assert_agree(delta.weight(base), merged_change(wrapped))


def test_on_a_square_convolution_the_same_shape_is_either_axis_and_the_key_tells() -> None:
    base, magnitude = draw(IN, IN, 3, 3), 4 * draw(1, IN, 1, 1).abs() + 1
    inner = LowRank(draw(RANK, IN, 3, 3), draw(IN, RANK, 1, 1), 1.0)
    for by_output in (False, True):
        wanted = _formula(base, inner.weight(base), magnitude, by_output)
        assert_agree(DoRA(inner, magnitude, by_output).weight(base), wanted)


def test_a_vector_is_of_the_outputs_and_never_an_outer_product() -> None:
    base, magnitude = draw(IN, IN), 4 * draw(IN).abs() + 1
    inner = LowRank(draw(RANK, IN), draw(IN, RANK), 1.0)
    assert_agree(DoRA(inner, magnitude).weight(base), _formula(base, inner.weight(base), magnitude, True))


def test_a_row_of_zeros_stays_zero() -> None:
    base, up = draw(OUT, IN), draw(OUT, RANK)
    base[3], up[3] = 0, 0
    change = DoRA(LowRank(draw(RANK, IN), up, 1.0), torch.ones(OUT)).weight(base)
    assert change.isfinite().all() and not change[3].any()
