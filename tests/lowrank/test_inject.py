"""Wrapping a real UNet and text encoder: what is wrapped, what is learned, and that nothing of it stays behind."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora.errors import SdloraError
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.inject import inject
from sdlora.lowrank.laws import LowRank
from sdlora.lowrank.layers import LoRAConv2d, LoRALinear

WIDTHS = (8, 16, 24, 24)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """SD 1.5's block structure, thin."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=WIDTHS, norm_num_groups=4, attention_head_dim=4, cross_attention_dim=12, sample_size=8
    )
    return model.eval()


@pytest.fixture
def components(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return {"unet": unet, "text_encoder": CLIPTextModel(config).eval()}


def predict(unet: nn.Module) -> Tensor:
    return unet(torch.ones(1, 4, 8, 8), torch.tensor([3]), torch.ones(1, 5, 12)).sample


def state_of(components: Mapping[str, nn.Module]) -> list[object]:
    """Everything that wrapping could leave behind, in order."""
    return [
        entry
        for root in components.values()
        for name, module in root.named_modules(remove_duplicate=False)
        for entry in (
            (name, id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks)),
            [(key, id(p), p.requires_grad, p.data_ptr(), p._version) for key, p in module.named_parameters()],
            list(module.state_dict()),
        )
    ]


def test_remove_leaves_the_model_as_it_was(components: dict[str, nn.Module]) -> None:
    unet = components["unet"]
    unet.get_submodule("mid_block").train()
    unet.get_submodule("conv_in").requires_grad_(False)
    unet.get_submodule("conv_out").register_forward_hook(lambda *_: None)
    before, picture = state_of(components), predict(unet)
    injection = inject(components, "all", 4, 4.0, generator=generator())
    assert not any(p.requires_grad for root in components.values() for n, p in root.named_parameters() if ".base." in n)
    predict(unet).sum().backward()
    assert state_of(components) != before
    injection.remove()
    assert state_of(components) == before
    assert torch.equal(predict(unet), picture)
    injection.remove()
    assert state_of(components) == before


def test_as_a_context_it_removes_itself_even_after_an_error(components: dict[str, nn.Module]) -> None:
    before = state_of(components)
    with pytest.raises(ZeroDivisionError), inject(components, "linear", 2, 2.0, generator=generator()):
        _ = 1 / 0
    assert state_of(components) == before


def test_the_whole_model_is_frozen_and_only_factors_train(components: dict[str, nn.Module]) -> None:
    with inject(components, "unet.*.attn2.to_k", 2, 2.0, generator=generator()) as injection:
        trainable = {id(p) for root in components.values() for p in root.parameters() if p.requires_grad}
        assert trainable == {id(p) for p in injection.parameters()}
        assert len(injection.parameters("unet")) == 32 and injection.parameters("text_encoder") == []


def test_no_effect_at_first_then_merged_equals_unmerged(components: dict[str, nn.Module]) -> None:
    unet = components["unet"]
    plain = predict(unet)
    with inject(components, "all", 4, 2.0, generator=generator()) as injection:
        assert torch.equal(predict(unet), plain)
        for number, layer in enumerate(injection.layers.values()):
            nn.init.normal_(layer.up.weight, std=0.05, generator=generator(number))
        unmerged, adapter = predict(unet), injection.adapter()
    for path, delta in adapter.component("unet").items():
        weight = unet.get_parameter(f"{path.removeprefix('unet.')}.weight")
        weight.data += delta.weight(weight)
    assert (unmerged - plain).abs().max() > 1e-2
    torch.testing.assert_close(predict(unet), unmerged, rtol=1e-4, atol=1e-4)


def test_a_module_in_two_places_is_wrapped_in_both() -> None:
    shared = nn.Linear(3, 3)
    root = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    before = state_of({"unet": root})
    with inject({"unet": root}, "all", 1, 1.0, generator=generator()) as injection:
        assert root["a"] is root.get_submodule("b.0") is injection.layers["unet.a"]
        assert len(injection.layers) == 1
    assert state_of({"unet": root}) == before


def test_ranks_and_alphas_per_module(components: dict[str, nn.Module]) -> None:
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    ranks, alphas = {"attn2.to_v": 2, path: 6}, {"unet.mid_block.*": 3.0}
    with inject(components, "attention", 4, 8.0, generator=generator(), ranks=ranks, alphas=alphas) as injection:
        deltas = injection.adapter().deltas
    assert (deltas[path].rank, deltas[path].scale) == (6, 0.5)
    ranks_found = [delta.rank for delta in deltas.values()]
    assert (ranks_found.count(2), ranks_found.count(6)) == (16, 1)
    assert deltas["text_encoder.text_model.encoder.layers.0.self_attn.q_proj"].alpha == 8.0


def test_adapter_and_load_are_a_round_trip(components: dict[str, nn.Module]) -> None:
    with inject(components, "all", 4, 2.0, generator=generator(0)) as injection:
        for parameter in injection.parameters():
            parameter.data += 0.1
        adapter = injection.adapter()
        injection.parameters()[0].data.zero_()
        assert next(iter(adapter.deltas.values())).down.abs().max() > 0, "a copy, not a view"
    with inject(components, "all", 4, 7.0, generator=generator(1)) as injection:
        injection.load(adapter)
        again = injection.adapter()
    assert list(again.deltas) == list(adapter.deltas)
    for path, delta in adapter.deltas.items():
        other = again.deltas[path]
        assert torch.equal(delta.down, other.down) and torch.equal(delta.up, other.up) and delta.alpha == other.alpha


def test_load_takes_pointwise_factors_in_linear_shape(unet: UNet2DConditionModel) -> None:
    with inject({"unet": unet}, "unet.mid_block.attentions.0.proj_in", 2, 2.0, generator=generator()) as injection:
        (path,) = injection.layers
        injection.load(Adapter({path: LowRank(torch.ones(2, 24), torch.ones(24, 2), 1.0)}))
        assert injection.adapter().deltas[path].down.shape == (2, 24, 1, 1)
        assert injection.layers[path].down.weight.eq(1).all()


def test_load_refuses_what_does_not_match_and_changes_nothing(components: dict[str, nn.Module]) -> None:
    with inject(components, ["attn1.to_q", "attn1.to_k"], 2, 2.0, generator=generator()) as injection:
        good = injection.adapter()
        first, *_, last = good.deltas
        rank_4 = LowRank(good.deltas[last].down.repeat(2, 1), good.deltas[last].up.repeat(1, 2), 2.0)
        misfit = LowRank(torch.ones(2, 5), torch.ones(5, 2), 2.0)
        changed = {first: LowRank(good.deltas[first].down + 1, good.deltas[first].up, 2.0)}
        refused = {
            f"{last}: .*rank 4.*rank 2": {**good.deltas, **changed, last: rank_4},
            f"{last}: .*shape": {**good.deltas, **changed, last: misfit},
            f"lacks .* {last}": {path: delta for path, delta in good.deltas.items() if path != last},
            "not wrapped: unet.x": {**good.deltas, "unet.x": good.deltas[last]},
        }
        for message, deltas in refused.items():
            with pytest.raises(SdloraError, match=message):
                injection.load(Adapter(deltas))
        assert torch.equal(injection.adapter().deltas[first].down, good.deltas[first].down)


def test_the_report_counts_what_is_there(components: dict[str, nn.Module]) -> None:
    base = {name: sum(p.numel() for p in root.parameters()) for name, root in components.items()}
    with inject(components, "attention", 4, 4.0, generator=generator()) as injection:
        report = injection.report()
        added = {name: sum(p.numel() for p in root.parameters()) - base[name] for name, root in components.items()}
    assert (report.components["unet"].modules, report.components["text_encoder"].modules) == (128, 8)
    assert {name: part.parameters for name, part in report.components.items()} == added
    assert (report.modules, report.parameters, report.base_parameters) == (136, sum(added.values()), sum(base.values()))
    assert f"unet: 128 modules, {added['unet']:,} parameters" in report.summary()


def test_initialisation_follows_the_generator(unet: UNet2DConditionModel) -> None:
    state = torch.random.get_rng_state()
    drawn = []
    for seed in (0, 0, 1):
        with inject({"unet": unet}, "all", 4, 4.0, generator=generator(seed)) as injection:
            drawn.append(torch.cat([delta.down.flatten() for delta in injection.adapter().deltas.values()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_linear_and_convolution_get_their_layers(unet: UNet2DConditionModel) -> None:
    with inject({"unet": unet}, ["conv_in", "time_embedding.linear_1"], 2, 2.0, generator=generator()) as injection:
        kinds = {path: type(layer) for path, layer in injection.layers.items()}
    assert kinds == {"unet.conv_in": LoRAConv2d, "unet.time_embedding.linear_1": LoRALinear}


def test_gradient_checkpointing_of_the_model_gives_the_same_gradients(unet: UNet2DConditionModel) -> None:
    gradients = []
    with inject({"unet": unet}, "attention", 2, 2.0, generator=generator()) as injection:
        for layer in injection.layers.values():
            nn.init.normal_(layer.up.weight, std=0.1, generator=generator())
        unet.train()
        for switch in (unet.disable_gradient_checkpointing, unet.enable_gradient_checkpointing):
            switch()
            predict(unet).square().sum().backward()
            gradients.append([p.grad.clone() for p in injection.parameters() if p.grad is not None])
            for parameter in injection.parameters():
                parameter.grad = None
    assert len(gradients[0]) == 256
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"ranks": {"to_x": 2}}, "'to_x' matches no .*nearest: to_"),
        ({"ranks": {"unet.conv_in": 2}}, "'unet.conv_in' matches no"),
        ({"alphas": {"to_q": -1.0}}, "attn1.to_q: alpha is -1.0"),
        ({"targets": "to_x"}, "'to_x' matches no .*nearest: to_"),
    ],
)
def test_bad_values_are_refused_and_nothing_is_wrapped(
    components: dict[str, nn.Module], changes: dict[str, Any], message: str
) -> None:
    before = state_of(components)
    arguments: dict[str, Any] = {"targets": "attention", "rank": 2, "alpha": 2.0, "generator": generator()} | changes
    with pytest.raises(SdloraError, match=message):
        inject(components, **arguments)
    assert state_of(components) == before


def test_wrapping_twice_and_grouped_convolutions_are_refused(unet: UNet2DConditionModel) -> None:
    with inject({"unet": unet}, "attention", 2, 2.0, generator=generator()):
        with pytest.raises(SdloraError, match="unet carries LoRA layers already"):
            inject({"unet": unet}, "attention", 2, 2.0, generator=generator())
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(SdloraError, match="unet.1: a convolution with groups=2"):
        inject({"unet": model}, "all", 2, 2.0, generator=generator())
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.Conv2d]
