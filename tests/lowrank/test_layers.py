"""The trainable layers against peft, against their own merged form, and under every dtype that training uses."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdlora.errors import SdloraError
from sdlora.lowrank.layers import LoRALayer, delta_of, wrap

Base = nn.Linear | nn.Conv2d
BASES = {
    "linear": lambda: nn.Linear(10, 7),
    "linear without bias": lambda: nn.Linear(10, 7, bias=False),
    "conv 1x1": lambda: nn.Conv2d(10, 7, 1),
    "conv 3x3": lambda: nn.Conv2d(10, 7, 3, padding=1),
    "conv 3x3 strided": lambda: nn.Conv2d(10, 7, 3, stride=2, padding=1),
    "conv dilated": lambda: nn.Conv2d(10, 7, (3, 1), dilation=2, padding=(2, 0)),
    "conv circular": lambda: nn.Conv2d(10, 7, 3, padding=1, padding_mode="circular"),
}
# peft builds its down convolution without dilation and padding mode, so it is no oracle for the last two.
PEERED = [name for name in BASES if name not in ("conv dilated", "conv circular")]


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Base:
    torch.manual_seed(0)
    return BASES[request.param]().requires_grad_(False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained(base: Base, rank: int = 4, alpha: float = 3.0, dropout: float = 0.0) -> LoRALayer:
    """A layer whose up is not zero."""
    layer = wrap(base, rank, alpha, dropout, generator())
    nn.init.normal_(layer.up.weight, std=0.1, generator=generator(1))
    return layer


def inputs(base: Base, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (2, 5, 10) if isinstance(base, nn.Linear) else (2, 10, 8, 9)
    return torch.randn(shape, generator=generator(2)).to(dtype).requires_grad_()


@pytest.mark.parametrize("name", PEERED)
def test_forward_and_gradients_equal_pefts(name: str) -> None:
    torch.manual_seed(0)
    base = BASES[name]().double().requires_grad_(False)
    ours = trained(base).double()
    model = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=3, target_modules=["0"]), nn.Sequential(copy.deepcopy(base))
    )
    theirs: Any = model.get_submodule("0")
    theirs.lora_A["default"].weight.data = ours.down.weight.data.clone()
    theirs.lora_B["default"].weight.data = ours.up.weight.data.clone()
    x, x_peft = inputs(base, torch.float64), inputs(base, torch.float64)
    y, y_peft = ours(x), theirs(x_peft)
    torch.testing.assert_close(y, y_peft, rtol=0, atol=1e-12)
    y.square().sum().backward()
    y_peft.square().sum().backward()
    for mine, other in (
        (x.grad, x_peft.grad),
        (ours.down.weight.grad, theirs.lora_A["default"].weight.grad),
        (ours.up.weight.grad, theirs.lora_B["default"].weight.grad),
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_no_effect_before_training(base: Base) -> None:
    layer = wrap(base, 4, 8.0, 0.0, generator())
    x = inputs(base)
    assert torch.equal(layer(x), base(x))
    assert layer.down.weight.abs().max() > 0 and layer.up.weight.abs().max() == 0


def test_down_is_kaiming_uniform_and_drawn_from_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    base = nn.Linear(400, 3)
    torch.random.set_rng_state(before)
    first, again, other = (wrap(base, 64, 1.0, 0.0, generator(seed)).down.weight for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert 0.99 / 20 < first.abs().max() <= 1 / 20  # uniform within 1 / sqrt(in)


def test_merged_equals_unmerged(base: Base) -> None:
    layer = trained(base)
    x = inputs(base)
    unmerged = layer(x)
    merged = copy.deepcopy(base)
    merged.weight.data += delta_of(layer).weight(base.weight)
    torch.testing.assert_close(merged(x), unmerged, rtol=1e-5, atol=1e-5)


def test_the_base_gets_no_gradient_and_keeps_its_bits(base: Base) -> None:
    before = copy.deepcopy(base.state_dict())
    storage = base.weight.data_ptr()
    layer = trained(base)
    layer(inputs(base)).square().sum().backward()
    assert base.weight.grad is None and base.weight.data_ptr() == storage
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_hooks_of_the_base_still_run(base: Base) -> None:
    seen = []
    base.register_forward_hook(lambda *_: seen.append(1))
    trained(base)(inputs(base))
    assert seen == [1]


def test_dropout_only_in_training_mode_and_only_on_the_low_rank_way(base: Base) -> None:
    x = inputs(base)
    plain, dropping = trained(base), trained(base, dropout=0.5)
    assert torch.equal(dropping.eval()(x), plain(x))
    torch.manual_seed(0)
    first = dropping.train()(x)
    second = dropping(x)
    torch.manual_seed(0)
    assert torch.equal(dropping(x), first) and not torch.equal(first, second)
    nn.init.zeros_(dropping.up.weight)
    assert torch.equal(dropping(x), base(x))


def test_the_layer_takes_over_the_mode_of_its_base() -> None:
    assert not wrap(nn.Linear(3, 3).eval(), 1, 1.0, 0.5, generator()).training
    assert wrap(nn.Linear(3, 3).train(), 1, 1.0, 0.5, generator()).training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_keeps_its_dtype_and_the_factors_float32(base: Base, dtype: torch.dtype) -> None:
    exact = trained(base)(inputs(base))
    base.to(dtype)
    layer = trained(base)
    x = inputs(base, dtype)
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None and x.grad.dtype == dtype
    for factor in (layer.down.weight, layer.up.weight):
        assert factor.dtype == torch.float32
        assert factor.grad is not None and factor.grad.dtype == torch.float32
    assert next(layer.parameters()).dtype == dtype  # how diffusers tells a model's dtype
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_under_autocast_the_product_is_bf16_and_the_gradients_float32(base: Base) -> None:
    layer = trained(base)
    x = inputs(base)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    for gradient in (layer.down.weight.grad, layer.up.weight.grad):
        assert gradient is not None and gradient.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(base: Base, reentrant: bool) -> None:
    layer = trained(base, dropout=0.3).train()
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        torch.manual_seed(0)
        x = inputs(base)
        run(x).square().sum().backward()
        gradients.append((x.grad, layer.down.weight.grad, layer.up.weight.grad))
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))


def test_views_and_single_vectors_pass(base: Base) -> None:
    layer = trained(base)
    x = inputs(base)
    torch.testing.assert_close(layer(x.detach().mT.contiguous().mT), layer(x))
    if isinstance(base, nn.Linear):
        torch.testing.assert_close(layer(x[0, 0]), layer(x)[0, 0])
        assert layer(x[:, :0]).shape == (2, 0, 7)


def test_what_cannot_carry_a_lora_is_refused() -> None:
    with pytest.raises(SdloraError, match="groups=2"):
        wrap(nn.Conv2d(4, 4, 3, groups=2), 2, 1.0, 0.0, generator())
    with pytest.raises(SdloraError, match="LayerNorm"):
        wrap(nn.LayerNorm(4), 2, 1.0, 0.0, generator())
