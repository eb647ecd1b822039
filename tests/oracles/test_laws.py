"""Each linear law, and (IA)^3, against LyCORIS' functional API and peft.

LyCORIS' modules of LoHa and LoKr scale twice in `get_diff_weight`, so its functional API is asked instead.
A missing alpha is the rank; the readers say so.
"""

from itertools import product

import lycoris.functional.locon as locon
import lycoris.functional.loha as loha
import lycoris.functional.lokr as lokr
import pytest
import torch
from lycoris.modules import FullModule, IA3Module, NormModule
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig
from torch import Tensor, nn

from sdlora.lowrank.laws import IA3, Full, Hadamard, Kronecker, LowRank, Replacement
from tests.oracles.layers import IN, OUT, SHAPES, assert_agree, draw, factors_in, in_peft, layer_of, merged_change

RANK = 3
ALPHAS = [RANK, 1.0, 8.0]  # as where it is missing; below the rank; above it

every_layer = pytest.mark.parametrize("kind", SHAPES)
KERNELS = [kind for kind in SHAPES if kind != "linear"]  # where a core can be
every_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def _flat(kind: str) -> tuple[int, int]:
    return OUT, torch.Size(SHAPES[kind][1:]).numel()


@every_layer
@every_alpha
def test_lora_is_lycoris_locon(kind: str, alpha: float) -> None:
    _, inputs, *kernel = SHAPES[kind]
    down, up = draw(RANK, inputs, *kernel), draw(OUT, RANK, *[1] * len(kernel))
    wanted = locon.diff_weight(down, up, None, gamma=alpha / RANK)
    assert_agree(LowRank(down, up, alpha).weight(draw(*SHAPES[kind])), wanted)


@every_layer
@every_alpha
def test_lora_is_peft_lora(kind: str, alpha: float) -> None:
    wrapped = in_peft(LoraConfig(r=RANK, lora_alpha=alpha), layer_of(draw(*SHAPES[kind])))
    factors = factors_in(wrapped)
    delta = LowRank(factors["lora_A"], factors["lora_B"], alpha)
    assert_agree(delta.weight(draw(*SHAPES[kind])), wrapped.get_delta_weight("default").detach())


def _hadamard(kind: str, alpha: float, *, cores: bool) -> Hadamard:
    out, flat = _flat(kind)
    if not cores:
        pairs = (draw(out, RANK), draw(RANK, flat), draw(out, RANK, seed=1), draw(RANK, flat, seed=1))
        return Hadamard(*pairs, alpha)
    pairs = (draw(RANK, out), draw(RANK, IN), draw(RANK, out, seed=1), draw(RANK, IN, seed=1))
    kernel = SHAPES[kind][2:]
    return Hadamard(*pairs, alpha, t1=draw(RANK, RANK, *kernel), t2=draw(RANK, RANK, *kernel, seed=1))


@every_alpha
@pytest.mark.parametrize(("kind", "cores"), [*((kind, False) for kind in SHAPES), *((kind, True) for kind in KERNELS)])
def test_loha_is_lycoris_loha(kind: str, alpha: float, cores: bool) -> None:
    delta = _hadamard(kind, alpha, cores=cores)
    weights = (delta.w1_b, delta.w1_a, delta.w2_b, delta.w2_a, delta.t1, delta.t2)
    wanted = loha.diff_weight(*weights, gamma=torch.tensor(alpha / RANK))
    assert_agree(delta.weight(draw(*SHAPES[kind])), wanted.reshape(SHAPES[kind]))


@every_layer
@every_alpha
@pytest.mark.parametrize("cores", [False, True], ids=["plain", "tucker"])
def test_loha_is_peft_loha(kind: str, alpha: float, cores: bool) -> None:
    config = LoHaConfig(r=RANK, alpha=alpha, use_effective_conv2d=cores)  # type: ignore[arg-type]
    wrapped = in_peft(config, layer_of(draw(*SHAPES[kind])))
    parts = {name.removeprefix("hada_"): factor for name, factor in factors_in(wrapped).items()}
    assert ("t1" in parts) == (cores and kind == "conv3x3")
    delta = Hadamard(**parts, alpha=alpha)
    assert_agree(delta.weight(draw(*SHAPES[kind])), wrapped.get_delta_weight("default").detach())


def _first(layout: str) -> dict[str, Tensor]:
    return {"w1": draw(4, 2)} if layout == "whole" else {"w1_a": draw(4, RANK), "w1_b": draw(RANK, 2)}


def _second(layout: str, kernel: tuple[int, ...]) -> dict[str, Tensor]:
    out, inputs = OUT // 4, IN // 2
    if layout == "whole":
        return {"w2": draw(out, inputs, *kernel)}
    if layout == "tucker":
        return {"w2_a": draw(RANK, out), "w2_b": draw(RANK, inputs), "t2": draw(RANK, RANK, *kernel)}
    flat = torch.Size((inputs, *kernel)).numel()
    shape = (RANK, flat) if layout == "flat pair" else (RANK, inputs, *kernel)
    return {"w2_a": draw(out, RANK), "w2_b": draw(*shape)}


@every_alpha
@pytest.mark.parametrize("first", ["whole", "pair"])
@pytest.mark.parametrize(
    ("kind", "second"),
    [*product(SHAPES, ["whole", "flat pair", "pair"]), *product(KERNELS, ["tucker"])],
)
def test_lokr_is_lycoris_lokr(kind: str, alpha: float, first: str, second: str) -> None:
    parts = _first(first) | _second(second, SHAPES[kind][2:])
    weights = [parts.get(name) for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
    both_whole = (first, second) == ("whole", "whole")
    # Not diff_weight, which finds the scale itself: round a core it takes the number of outputs for the rank.
    wanted = lokr.kron_weight(*weights, scale=1.0 if both_whole else alpha / RANK)
    delta = Kronecker(alpha, **parts)
    assert delta.rank == (None if both_whole else RANK)
    assert_agree(delta.weight(draw(*SHAPES[kind])), wanted.reshape(SHAPES[kind]))


def test_the_rank_of_lokr_is_that_of_w2_where_both_are_pairs() -> None:
    """Equal in LyCORIS' files; which one counts where they are not is the order of its keys. float64."""
    a, b, c, d = draw(4, 2), draw(2, 2), draw(6, 3), draw(3, 8)
    delta = Kronecker(6.0, w1_a=a, w1_b=b, w2_a=c, w2_b=d)
    wanted = 2 * torch.kron(a.double() @ b.double(), c.double() @ d.double())
    assert delta.rank == 3
    assert_agree(delta.weight(draw(OUT, IN)), wanted)


@every_layer
@every_alpha
@pytest.mark.parametrize("both", [False, True], ids=["w2", "both"])
def test_lokr_is_peft_lokr_where_a_factor_is_a_pair(kind: str, alpha: float, both: bool) -> None:
    config = LoKrConfig(r=1, alpha=alpha, decompose_both=both, use_effective_conv2d=True)  # type: ignore[arg-type]
    wrapped = in_peft(config, layer_of(draw(*SHAPES[kind])))
    parts = {name.removeprefix("lokr_"): factor for name, factor in factors_in(wrapped).items()}
    assert ("w1_a" in parts) == both and ("t2" in parts) == (kind == "conv3x3")
    delta = Kronecker(alpha, **parts)
    assert_agree(delta.weight(draw(*SHAPES[kind])), wrapped.get_delta_weight("default").detach())


def test_peft_scales_whole_lokr_factors_so_w1_brings_the_scale_along() -> None:
    wrapped = in_peft(LoKrConfig(r=8, alpha=4), layer_of(draw(OUT, IN)))
    parts = factors_in(wrapped)
    assert set(parts) == {"lokr_w1", "lokr_w2"}
    delta = Kronecker(1.0, w1=parts["lokr_w1"] * 4 / 8, w2=parts["lokr_w2"])
    assert_agree(delta.weight(draw(OUT, IN)), wrapped.get_delta_weight("default").detach())


@every_layer
def test_a_full_change_is_lycoris_full_with_its_bias(kind: str) -> None:
    diff, diff_b = draw(*SHAPES[kind], seed=1), draw(OUT, seed=1)
    layer = layer_of(draw(*SHAPES[kind]), bias=draw(OUT))
    module = FullModule("full", layer)
    module.weight.data, module.bias.data = diff.clone(), diff_b.clone()
    weight, bias = module.get_diff_weight()
    assert_agree(Full(diff).weight(layer.weight), weight.detach())
    assert_agree(Full(diff_b).weight(layer.bias), bias.detach())


@pytest.mark.parametrize("norm", [nn.LayerNorm(OUT), nn.GroupNorm(4, OUT)], ids=["layer", "group"])
def test_a_full_change_of_a_norm_is_lycoris_norm(norm: nn.LayerNorm | nn.GroupNorm) -> None:
    module = NormModule("norm", norm)
    module.w_norm.data, module.b_norm.data = draw(OUT), draw(OUT, seed=1)
    weight, bias = module.get_diff_weight()
    assert_agree(Full(draw(OUT)).weight(norm.weight), weight.detach())
    assert_agree(Full(draw(OUT, seed=1)).weight(norm.bias), bias.detach())


@pytest.mark.parametrize("shape", [*SHAPES.values(), (OUT,)], ids=[*SHAPES, "bias"])
def test_a_replacement_ends_at_its_value(shape: tuple[int, ...]) -> None:
    """What modules_to_save and set_weight mean needs no oracle: W + (W' - W) = W'. float64."""
    base, value = draw(*shape), draw(*shape, seed=1)
    assert_agree(Replacement(value).weight(base), value.double() - base.double())


@every_layer
@pytest.mark.parametrize("on_input", [False, True], ids=["outputs", "inputs"])
def test_ia3_is_lycoris_ia3(kind: str, on_input: bool) -> None:
    layer = layer_of(draw(*SHAPES[kind]))
    module = IA3Module("ia3", layer, train_on_input=on_input)
    vector = draw(*module.weight.shape)
    assert vector.shape == ((IN if on_input else OUT,) if kind == "linear" else (1, IN if on_input else OUT, 1, 1))
    module.weight.data = vector.clone()
    assert_agree(IA3(vector, on_input).weight(layer.weight), module.get_diff_weight()[0].detach())


@every_layer
@pytest.mark.parametrize("on_input", [False, True], ids=["outputs", "inputs"])
def test_ia3_of_peft_is_its_vector_less_one(kind: str, on_input: bool) -> None:
    base, bias = draw(*SHAPES[kind]), draw(OUT)
    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if on_input else [])
    wrapped = in_peft(config, layer_of(base, bias=bias))
    delta = IA3(factors_in(wrapped)["ia3_l"] - 1, on_input)
    assert_agree(delta.weight(base), merged_change(wrapped))
    bias_change = wrapped.get_base_layer().bias.detach() - bias
    if on_input:
        assert not delta.fits(bias.shape) and not bias_change.any()
    else:
        assert_agree(delta.weight(bias), bias_change)
