"""Every spelling of a module's name that LoRA files in the wild have, for SD 1.x, SD 2.x and SDXL."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdlora.formats.architectures import Architecture, architecture_of, sd1, sd2, sdxl
from sdlora.formats.read import describe, read
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.tiny import tiny_pipeline

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def original(inner: str, kind: str) -> str:
    """The original code's name, by the arithmetic of the reference table: three numbers to a block."""
    if inner in ENDS:
        return ENDS[inner]
    side, *parts = inner.split(".")
    if side == "mid_block":
        sort, j, *leaf = parts
        number = {"resnets0": 0, "attentions0": 1, "resnets1": 2}[sort + j]
        return f"middle_block.{number}." + RESNET.get(".".join(leaf), ".".join(leaf))
    i, sort, j, *leaf = parts
    rest = RESNET.get(".".join(leaf), ".".join(leaf))
    if sort == "downsamplers":
        return f"input_blocks.{3 + 3 * int(i)}.0.op"
    if sort == "upsamplers":
        after = 1 if kind != "sdxl" and i == "0" else 2
        return f"output_blocks.{3 * int(i) + 2}.{after}.conv"
    place = int(sort == "attentions")
    first = 1 + 3 * int(i) if side == "down_blocks" else 3 * int(i)
    blocks = "input_blocks" if side == "down_blocks" else "output_blocks"
    return f"{blocks}.{first + int(j)}.{place}.{rest}"


def flat(name: str) -> str:
    return name.replace(".", "_")


def by_component(unet: Callable[[str, str], str], encoders: dict[str, str], dotted: bool) -> Callable[[str, str], str]:
    def spell(path: str, kind: str) -> str:
        component, _, inner = path.partition(".")
        name = unet(inner, kind) if component == "unet" else encoders[component] + inner
        return name if dotted else flat(name)

    return spell


TE = {"text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
TE1 = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
COMFY = {name: f"text_encoders.{clip}.transformer." for name, clip in zip(TE, ("clip_l", "clip_g"), strict=True)}
OMI = {"text_encoder": "clip_l.", "text_encoder_2": "clip_g."}
OURS = {name: f"{name}." for name in TE}
KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")
PEFT = (".lora_A.weight", ".lora_B.weight", ".alpha")
# Name of the spelling: how it names a module, and what stands behind for down, up and alpha.
SPELLINGS = {
    "F1 kohya": (by_component(lambda inner, _: f"lora_unet_{inner}", TE, False), KOHYA),
    "F1 kohya, te1": (by_component(lambda inner, _: f"lora_unet_{inner}", TE1, False), KOHYA),
    "F2 kohya, original blocks": (by_component(lambda i, kind: f"lora_unet_{original(i, kind)}", TE1, False), KOHYA),
    "F3 diffusers": (
        by_component(lambda inner, _: f"unet.{inner}", OURS, True),
        (".lora.down.weight", ".lora.up.weight", ".alpha"),
    ),
    "F3 diffusers, linear layer": (
        by_component(lambda inner, _: f"unet.{inner}", OURS, True),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", ".alpha"),
    ),
    "F5 peft, one file": (by_component(lambda inner, _: f"base_model.model.{inner}", OURS, True), PEFT),
    "F5 peft, named adapter": (
        by_component(lambda inner, _: f"base_model.model.{inner}", OURS, True),
        (".lora_A.style.weight", ".lora_B.style.weight", ".alpha"),
    ),
    "F6 comfyui": (by_component(lambda i, kind: f"diffusion_model.{original(i, kind)}", COMFY, True), PEFT),
    "F6 comfyui, diffusers blocks": (by_component(lambda inner, _: f"diffusion_model.{inner}", COMFY, True), PEFT),
    "F7 original": (by_component(original, OMI, True), PEFT),
    "F8 omi": (by_component(lambda i, kind: f"unet.{original(i, kind)}", OMI, True), KOHYA),
    "F9 lycoris wrapper": (by_component(lambda inner, _: f"lycoris_{inner}", TE1, False), KOHYA),
}


@cache
def model(kind: str) -> tuple[Architecture, Adapter]:
    components = components_of(tiny_pipeline(kind))
    return architecture_of(components), random_adapter(components, seed=1)


def assert_same(adapter: Adapter, expected: Adapter) -> None:
    assert adapter.deltas.keys() == expected.deltas.keys()
    for path, delta in expected.deltas.items():
        base = torch.zeros(delta.shape)
        assert torch.equal(adapter.deltas[path].weight(base), delta.weight(base)), path


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_to_the_same_numbers(tmp_path: Path, spelling: str, kind: str) -> None:
    architecture, expected = model(kind)
    spell, (down, up, alpha) = SPELLINGS[spelling]
    tensors = {}
    for path, delta in expected.deltas.items():
        assert isinstance(delta, LowRank)
        name = spell(path, kind)
        tensors |= {name + down: delta.down, name + up: delta.up, name + alpha: torch.tensor(delta.alpha)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, receipt = read(tmp_path / "a.safetensors", architecture)
    assert receipt.complete, receipt.summary()
    assert_same(adapter, expected)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_attention_processors_of_old_diffusers(tmp_path: Path, kind: str) -> None:
    """F4: the processor's name in between, to_out without its number, the text encoder's layers as to_q."""
    architecture, everything = model(kind)
    old = re.compile(r"(.*attn[12])\.(to_q|to_k|to_v|to_out)(\.0)?$|(text_encoder\..*self_attn)\.(q|k|v|out)_proj$")
    expected = {path: delta for path, delta in everything.deltas.items() if old.match(path)}
    tensors = {}
    for path, delta in expected.items():
        found = old.match(path)
        assert found and isinstance(delta, LowRank)
        block, leaf, _, encoder, letter = found.groups()
        name = f"{block}.processor.{leaf}" if block else f"{encoder}.to_{letter}"
        tensors |= {
            f"{name}_lora.down.weight": delta.down,
            f"{name}_lora.up.weight": delta.up * (delta.alpha / delta.rank),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, receipt = read(tmp_path / "a.safetensors", architecture)
    assert receipt.complete, receipt.summary()
    assert len(expected) > 40
    for path, delta in expected.items():
        base = torch.zeros(delta.shape)
        torch.testing.assert_close(adapter.deltas[path].weight(base), delta.weight(base), rtol=1e-5, atol=1e-6)


def test_two_sets_of_suffixes_in_one_file_are_decided_key_by_key(tmp_path: Path) -> None:
    """F3m: diffusers' own mapping renames the attention layers only, the rest keeps PEFT's suffixes."""
    architecture, expected = model("sd1")
    tensors = {}
    for path, delta in expected.deltas.items():
        assert isinstance(delta, LowRank)
        attention = ".to_" in path
        down, up = (".lora.down.weight", ".lora.up.weight") if attention else (".lora_A.weight", ".lora_B.weight")
        tensors |= {path + down: delta.down, path + up: delta.up, f"{path}.alpha": torch.tensor(delta.alpha)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, receipt = read(tmp_path / "a.safetensors", architecture)
    assert receipt.complete
    assert_same(adapter, expected)


@pytest.mark.parametrize(
    ("architecture", "evidence"),
    [(sd1(), "attn2.to_k takes 768"), (sd2(), "attn2.to_k takes 1024"), (sdxl(), "attn2.to_k takes 2048")],
)
def test_the_header_tells_the_architecture_and_why(tmp_path: Path, architecture: Architecture, evidence: str) -> None:
    tensors = {}
    for path, (out, into, *_) in architecture.shapes.items():
        if path.endswith(("attn2.to_k", "q_proj")):
            name = flat(path.replace("text_encoder_2.", "lora_te2_").replace("text_encoder.", "lora_te_"))
            name = name.replace("unet_", "lora_unet_", 1)
            tensors |= {f"{name}.lora_down.weight": torch.ones(1, into), f"{name}.lora_up.weight": torch.ones(out, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    receipt = describe(tmp_path / "a.safetensors")
    assert receipt.made_for == (architecture.name,)
    assert any(line.startswith(evidence) for line in receipt.evidence)
    assert len(receipt.applied) == len(tensors) / 2


def test_rotations_in_kohyas_own_naming(tmp_path: Path) -> None:
    """F10: sd-scripts' networks/oft.py has a prefix of its own; its blocks turn the outputs."""
    architecture, _ = model("sdxl")
    path = next(path for path in architecture.shapes if path.endswith("attn2.to_k"))
    out = architecture.shapes[path][0]
    blocks = torch.randn(out // 4, 4, 4)
    name = f"oft_unet_{flat(original(path.removeprefix('unet.'), 'sdxl'))}"
    tensors = {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(1e-3)}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, receipt = read(tmp_path / "a.safetensors", architecture)
    assert receipt.complete and receipt.laws == {"oft": 1}
    base = torch.randn(architecture.shapes[path])
    turned = base + adapter.deltas[path].weight(base)
    assert not torch.allclose(turned, base, atol=1e-3)
    torch.testing.assert_close(turned.norm(dim=0), base.norm(dim=0))  # a rotation keeps lengths
