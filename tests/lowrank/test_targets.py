"""Choosing targets by preset and by pattern."""

import pytest
from torch import nn

from sdlora.errors import SdloraError
from sdlora.lowrank.targets import TARGETS, modules_of, select


def linears(*names: str) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in names})


@pytest.fixture
def components() -> dict[str, nn.Module]:
    """The names of one block of each component, in the libraries' own spelling."""
    unet = nn.ModuleDict({"conv_in": nn.Conv2d(2, 2, 3), "norm": nn.GroupNorm(1, 2)})
    unet["attn1"] = attn1 = linears("to_q", "to_k", "to_v")
    attn1["to_out"] = nn.ModuleList([nn.Linear(2, 2), nn.Dropout(0.0)])
    gate = nn.ModuleDict({"proj": nn.Linear(2, 4)})
    unet["ff"] = nn.ModuleDict({"net": nn.ModuleList([gate, nn.Dropout(0.0), nn.Linear(2, 2)])})
    unet["proj_in"] = nn.Conv2d(2, 2, 1)
    attention = linears("k_proj", "v_proj", "q_proj", "out_proj")
    text = nn.ModuleDict({"self_attn": attention, "mlp": linears("fc1", "fc2")})
    return {"unet": unet, "text_encoder": text}


UNET = [f"unet.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
TEXT = [f"text_encoder.self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
FF = ["unet.ff.net.0.proj", "unet.ff.net.2"]
MLP = ["text_encoder.mlp.fc1", "text_encoder.mlp.fc2"]


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        ("attention", UNET + TEXT),
        ("attention+ff", UNET + FF + TEXT + MLP),
        ("linear", UNET + FF + TEXT + MLP),
        ("all", ["unet.conv_in", *UNET, *FF, "unet.proj_in", *TEXT, *MLP]),
        ("to_q", UNET[:1]),
        ("attn1.*", UNET),
        ("unet.attn1.to_[kq]", UNET[:2]),
        ("text_encoder.*", TEXT + MLP),
        (["text_encoder.*.q_proj", "unet.conv_in", "to_q", "conv_in"], ["unet.conv_in", UNET[0], TEXT[2]]),
        (["attention", "conv_in"], ["unet.conv_in", *UNET, *TEXT]),
    ],
)
def test_names_and_patterns(components: dict[str, nn.Module], targets: str | list[str], paths: list[str]) -> None:
    assert select(components, targets) == paths


def test_a_preset_takes_what_a_component_has(components: dict[str, nn.Module]) -> None:
    assert select({"text_encoder": components["text_encoder"]}, "attention") == TEXT


@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        ("atention", "'atention' .* in unet, text_encoder .*nearest: attention"),
        (["to_q", "to_qq"], "'to_qq' .*nearest: to_q"),
        ("unet.*.attn1.to_w", "nearest: .*attn1.to_"),
        ("unet.norm", "'unet.norm' matches no Linear or Conv2d"),
        ("q", "'q' matches no"),
        ("xyzzy", r"'xyzzy' matches no Linear or Conv2d in unet, text_encoder; presets: attention, attention\+ff"),
        ([], "no targets given"),
    ],
)
def test_what_matches_nothing_is_named_with_its_neighbours(
    components: dict[str, nn.Module], targets: str | list[str], hint: str
) -> None:
    with pytest.raises(SdloraError, match=hint):
        select(components, targets)


def test_clip_keeps_the_level_that_files_know_it_by() -> None:
    body = {"embeddings": nn.Embedding(2, 2), "encoder": linears("fc"), "final_layer_norm": nn.LayerNorm(2)}
    with_level = nn.ModuleDict({"text_model": nn.ModuleDict(body), "text_projection": nn.Linear(2, 2)})
    without = nn.ModuleDict(body)
    assert list(modules_of({"text_encoder": without})) == ["text_encoder.text_model.encoder.fc"]
    paths = ["text_encoder_2.text_model.encoder.fc", "text_encoder_2.text_projection"]
    assert list(modules_of({"text_encoder_2": with_level})) == paths


@pytest.mark.parametrize("preset", TARGETS)
def test_a_preset_that_finds_nothing_is_an_error(preset: str) -> None:
    with pytest.raises(SdloraError, match="matches no Linear or Conv2d in the model"):
        select({"unet": nn.ModuleDict({"norm": nn.GroupNorm(1, 2)})}, preset)
