"""Ordered lists of 2022: real files, and the walk that wrote them, done again on a model of its time."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from sdlora.errors import SdloraError
from sdlora.formats.architectures import sd1, sd2, sdxl
from sdlora.formats.ordered import is_ordered, ordered_names

WILD = Path(__file__).parents[3] / "shared/data/loras"
DEFAULT = ["CrossAttention", "Attention", "GEGLU"]
EXTENDED = ["ResnetBlock2D", *DEFAULT]
WIDTHS = (320, 640, 1280, 1280)
BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"

needs_wild = pytest.mark.skipif(not WILD.exists(), reason="the real files are not here")


# A UNet with diffusers' children of 2022 in the order in which its constructors registered them.


class CrossAttention(nn.Module):
    def __init__(self, width: int, seen: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(seen, width, bias=False)
        self.to_v = nn.Linear(seen, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout()])


class Attention(CrossAttention):
    """CrossAttention, as diffusers has called it since 0.15."""


class GEGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width), nn.Dropout(), nn.Linear(4 * width, width)])


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int, seen: int, year: int) -> None:
        super().__init__()
        if year == 2022:
            self.attn1 = CrossAttention(width, width)
            self.ff = FeedForward(width)
            self.attn2 = CrossAttention(width, seen)
        else:
            self.attn1 = Attention(width, width)
            self.attn2 = Attention(width, seen)
            self.ff = FeedForward(width)


class Transformer2DModel(nn.Module):
    def __init__(self, width: int, seen: int, year: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(width, seen, year)])
        self.proj_out = nn.Conv2d(width, width, 1)


class ResnetBlock2D(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3)
        self.time_emb_proj = nn.Linear(1280, out)
        self.conv2 = nn.Conv2d(out, out, 3)
        self.conv_shortcut = None
        if into != out:
            self.conv_shortcut = nn.Conv2d(into, out, 1)


class Resample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3)


def block(resnets: list[tuple[int, int]], seen: int, year: int, attentions: int, resample: str = "") -> nn.Module:
    made, width = nn.Module(), resnets[-1][1]
    made.attentions = nn.ModuleList([Transformer2DModel(width, seen, year) for _ in range(attentions)])
    made.resnets = nn.ModuleList([ResnetBlock2D(into, out) for into, out in resnets])
    if resample:
        setattr(made, resample, nn.ModuleList([Resample(width)]))
    return made


class UNet2DConditionModel(nn.Module):
    def __init__(self, seen: int, year: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 320, 3)
        self.down_blocks = nn.ModuleList([])
        self.mid_block = None
        self.up_blocks = nn.ModuleList([])
        for i, width in enumerate(WIDTHS):
            resnets = [(WIDTHS[max(i - 1, 0)], width), (width, width)]
            self.down_blocks.append(block(resnets, seen, year, 2 if i < 3 else 0, "downsamplers" if i < 3 else ""))
        self.mid_block = block([(1280, 1280), (1280, 1280)], seen, year, 1)
        for i, width in enumerate(WIDTHS[::-1]):
            before, skipped = WIDTHS[::-1][max(i - 1, 0)], WIDTHS[::-1][min(i + 1, 3)]
            resnets = [(before + width, width), (2 * width, width), (width + skipped, width)]
            self.up_blocks.append(block(resnets, seen, year, 3 if i else 0, "upsamplers" if i < 3 else ""))
        self.conv_out = nn.Conv2d(320, 4, 3)


class CLIPAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("k", "v", "q", "out"):
            setattr(self, f"{name}_proj", nn.Linear(width, width))


class CLIPTextModel(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.text_model = nn.Module()
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList([nn.Module() for _ in range(layers)])
        for layer in self.text_model.encoder.layers:
            layer.self_attn = CLIPAttention(width)


def walk(model: nn.Module, classes: list[str], kinds: tuple[type, ...]) -> list[tuple[str, nn.Module]]:
    """The layers inside modules of these classes as lora_diffusion comes upon them."""
    paths = {module: path for path, module in model.named_modules()}
    ancestors = [module for module in model.modules() if type(module).__name__ in classes]
    return [(paths[layer], layer) for found in ancestors for layer in found.modules() if isinstance(layer, kinds)]


def listed(component: str, layers: list[tuple[str, nn.Module]]) -> dict[str, tuple[int, ...]]:
    """The shapes of an ordered list of rank 2 for these layers."""
    shapes = {}
    for number, (_, layer) in enumerate(layers):
        out, *into = layer.weight.shape
        shapes[f"{component}:{number}:up"] = (out, 2, *[1] * len(into[1:]))
        shapes[f"{component}:{number}:down"] = (2, *into)
    return shapes


@pytest.mark.parametrize("year", [2022, 2023])
@pytest.mark.parametrize("kinds", [(nn.Linear,), (nn.Linear, nn.Conv2d)], ids=["linear", "conv"])
@pytest.mark.parametrize("classes", [DEFAULT, EXTENDED, ["CrossAttention", "Attention"]], ids=len)
@pytest.mark.parametrize(("architecture", "seen"), [(sd1(), 768), (sd2(), 1024)], ids=["sd1", "sd2"])
def test_pairs_are_placed_as_the_walk_through_a_unet_of_the_time_meets_its_layers(
    architecture, seen, classes, kinds, year
):
    with torch.device("meta"):
        layers = walk(UNet2DConditionModel(seen, year), classes, kinds)
    found = ordered_names(listed("unet", layers), {"unet": json.dumps(classes)}, architecture.shapes)
    assert found.pairs == {
        f"unet.{path}": (f"unet:{number}:up", f"unet:{number}:down") for number, (path, _) in enumerate(layers)
    }


def test_pairs_are_placed_as_the_walk_through_a_text_encoder_meets_its_layers():
    with torch.device("meta"):
        layers = walk(CLIPTextModel(1024, 23), ["CLIPAttention"], (nn.Linear,))
    found = ordered_names(listed("text_encoder", layers), {"text_encoder": '["CLIPAttention"]'}, sd2().shapes)
    assert [path.removeprefix("text_encoder.") for path in found.pairs] == [path for path, _ in layers]


def wild(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    with safe_open(WILD / f"{name}.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}, file.metadata()


@needs_wild
@pytest.mark.parametrize("name", ["lora_disney", "analog_svd_rank4"])
def test_every_pair_of_a_real_file_fits_sd1_at_its_place(name):
    shapes, metadata = wild(name)
    found = ordered_names(shapes, metadata, sd1().shapes)
    assert is_ordered(shapes)
    assert {key for pair in found.pairs.values() for key in pair} | set(found.tokens) == set(shapes)
    attention = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj")
    assert set(found.pairs) == {
        path for path in sd1().shapes if path.endswith(attention) or ".self_attn." in path
    }  # 16 transformer blocks of 9, 12 layers of 4
    for path, (up, down) in found.pairs.items():
        assert (shapes[up][0], *shapes[down][1:]) == sd1().shapes[path], path
    assert found.pairs[f"{BLOCK}.ff.net.0.proj"] == ("unet:4:up", "unet:4:down")
    assert found.pairs[f"{BLOCK}.attn2.to_k"] == ("unet:6:up", "unet:6:down")
    assert found.pairs["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"][0] == "unet:143:up"


@needs_wild
def test_learned_tokens_are_found_by_the_metadata():
    assert ordered_names(*wild("lora_disney"), sd1().shapes).tokens == {"<s1>": "<s1>", "<s2>": "<s2>"}


@needs_wild
@pytest.mark.parametrize("architecture", [sd2(), sdxl()], ids=["sd2", "sdxl"])
def test_a_file_of_another_architecture_is_refused(architecture):
    with pytest.raises(SdloraError):
        ordered_names(*wild("lora_disney"), architecture.shapes)


def ordered_list(classes: list[str] = DEFAULT) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    with torch.device("meta"):
        layers = walk(UNet2DConditionModel(768, 2022), classes, (nn.Linear,))
    return listed("unet", layers), {"unet": json.dumps(classes)}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"unet:6:down": (2, 320)}, r"unet:6 \(up 320x2, down 2x320\) .*attn2.to_k \(320x768\)"),
        ({"unet:6:down": (3, 768)}, "unet:6 .* does not fit"),
        ({"unet:6:up": ()}, "unet:6 .* does not fit"),
        ({"unet:0:up": None}, "unet:0:up is missing"),
        ({"unet:70:up": None, "unet:70:down": None}, "unet:70:up is missing"),
        ({"unet:143:up": None, "unet:143:down": None}, "143 pairs, where .* 144 places"),
        ({"unet:99999:up": (320, 2), "unet:99999:down": (2, 320)}, "unet:144:up is missing"),
    ],
)
def test_a_list_that_does_not_fit_the_order_is_refused_by_what_is_wrong(changed, said):
    shapes, metadata = ordered_list()
    shapes = {key: shape for key, shape in (shapes | changed).items() if shape is not None}
    with pytest.raises(SdloraError, match=said) as error:
        ordered_names(shapes, metadata, sd1().shapes)
    assert "\n" not in str(error.value)


def test_two_pairs_that_changed_places_are_refused():
    shapes, metadata = ordered_list()
    for half in ("up", "down"):
        shapes[f"unet:4:{half}"], shapes[f"unet:5:{half}"] = shapes[f"unet:5:{half}"], shapes[f"unet:4:{half}"]
    with pytest.raises(SdloraError, match="unet:5 .*does not fit"):
        ordered_names(shapes, metadata, sd1().shapes)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "does not say for which classes"),
        ({"unet": '["CrossAttention", "SpatialTransformer"]'}, "SpatialTransformer is not known"),
        ({"unet": "CrossAttention"}, "JSON list"),
        ({"unet": "[]"}, "JSON list"),
        ({"unet": "[1]"}, "JSON list"),
        ({"unet": "[" * 900}, "JSON list"),
        ({"unet": "[" * 100_000}, "JSON list"),
    ],
)
def test_classes_that_are_not_known_are_refused(metadata, said):
    with pytest.raises(SdloraError, match=said) as error:
        ordered_names(ordered_list()[0], metadata, sd1().shapes)
    assert "\n" not in str(error.value)


def test_a_file_is_known_by_its_numbered_keys():
    assert is_ordered(["<s1>", "text_encoder:3:down"])
    assert not is_ordered(["unet.mid_block.attentions.0.proj_in.lora.up.weight", "unet:x:up", "unet:1:up:2", "<s1>"])
    assert not is_ordered(["lora:down_blocks.0.attentions.0.proj_in.___.layer.W_up"])
