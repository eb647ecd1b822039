"""HCP-Diffusion's keys: each is told as diffusers would name the module, with the scale instead of alpha."""

import pytest
import torch

from sdlora.formats.architectures import sd1, sdxl
from sdlora.formats.hcp import translated
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank
from tests.formats.hcp_files import hcp_tensors

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def everywhere(architecture, alpha: float) -> Adapter:
    """A delta of rank 2 on every module, all of the same small factors."""
    delta = LowRank(torch.ones(2, 3), torch.ones(3, 2), alpha)
    return Adapter(dict.fromkeys(architecture.shapes, delta))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("architecture", [sd1(), sdxl()], ids=["sd1", "sdxl"])
def test_every_module_of_a_pair_of_files_is_told_by_its_path(architecture, old):
    adapter = everywhere(architecture, alpha=6.0)
    files = [hcp_tensors(adapter, components, old) for components in ({"unet"}, {"text_encoder", "text_encoder_2"})]
    tensors = {translated(key): value for file in files for key, value in file.items()}
    parts = ("lora_down.weight", "lora_up.weight", "scale")
    assert tensors.keys() == {f"{path}.{part}" for path in architecture.shapes for part in parts}
    assert all(value == 3.0 for key, value in tensors.items() if key.endswith(".scale"))  # 6 / 2


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (f"lora:{BLOCK}.attn1.to_out.0.___.layer.bias", f"unet.{BLOCK}.attn1.to_out.0.lora_B.bias"),
        (f"lora:{BLOCK}.ff.net.2.___.layer.lora_up.bias", f"unet.{BLOCK}.ff.net.2.lora_B.bias"),
        (f"lora:{BLOCK}.ff.net.2.___.scale", f"unet.{BLOCK}.ff.net.2.scale"),
        (f"{BLOCK}.ff.net.2.___.layer.W_up", f"unet.{BLOCK}.ff.net.2.lora_up.weight"),
        (f"plugin:{BLOCK}.attn1.to_q.___.hada_w1_a", f"unet.{BLOCK}.attn1.to_q.hada_w1_a"),
        (f"plugin:{BLOCK}.attn1.to_q.___.alpha", f"unet.{BLOCK}.attn1.to_q.alpha"),
    ],
)
def test_a_key_is_told_as_others_would_spell_it(key, told):
    assert translated(key) == told


@pytest.mark.parametrize(
    "key",
    [
        f"lora_ema:{BLOCK}.attn1.to_q.___.layer.W_up",
        f"base:{BLOCK}.attn1.to_q.weight",
        f"lora:{BLOCK}.attn1.to_q.___.layer.rank_groups",
        f"lora:{BLOCK}.attn1.to_q",
        f"unet.{BLOCK}.attn1.to_q.lora.up.weight",
        "unet:0:up",
    ],
)
def test_other_keys_stay_as_they_are(key):
    assert translated(key) == key
