"""The listed architectures hold exactly what diffusers' and transformers' own modules hold."""

import time

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.formats.architectures import architecture_of, has_bias, known, sd1, sd2, sdxl
from sdlora.formats.names import kohya, readable
from sdlora.lowrank.targets import modules_of
from sdlora.models.families import components_of
from sdlora.models.load import load_pipeline
from tests.tiny import tiny_pipeline

# unet/config.json of the released models, where it differs from diffusers' defaults.
UNETS = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPENCLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
OPENCLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def real_components(name: str) -> dict[str, torch.nn.Module]:
    """The model's modules at full size, without memory for their weights."""
    if name == "toybox":
        return components_of(load_pipeline("toybox"))
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **UNETS[name])
        first = CLIPTextModel(CLIPTextConfig(**(OPENCLIP_H if name == "sd2" else CLIP_L)))
        if name != "sdxl":
            return {"unet": unet, "text_encoder": first}
        second = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=1280, **OPENCLIP_G))
        return {"unet": unet, "text_encoder": first, "text_encoder_2": second}


@pytest.mark.parametrize("architecture", known(), ids=lambda one: one.name)
def test_paths_and_shapes_are_those_of_the_real_modules(architecture):
    components = real_components(architecture.name)
    real = architecture_of(components)
    assert real.name == architecture.name
    assert real.shapes == architecture.shapes
    assert real.norms == architecture.norms
    biased = {path for path, module in modules_of(components).items() if module.bias is not None}
    assert biased == {path for path in architecture.shapes if has_bias(path)}


def test_counts_are_those_that_kohya_files_have():
    attention = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    count = {
        one.name: sum(path.startswith("unet.") and path.endswith(attention) for path in one.shapes)
        for one in (sd1(), sd2(), sdxl())
    }
    assert count == {"sd1": 192, "sd2": 192, "sdxl": 722}
    assert sum(path.startswith("text_encoder.") for path in sd1().shapes) == 72


def test_tiny_models_are_custom():
    assert architecture_of(components_of(tiny_pipeline())).name == "custom"


def test_listing_an_architecture_takes_milliseconds():
    began = time.perf_counter()
    for _ in range(10):
        sdxl.__wrapped__()
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("architecture", known(), ids=lambda one: one.name)
def test_no_two_modules_share_a_name(architecture):
    assert len(set(kohya(architecture.shapes).values())) == len(architecture.shapes)
    names = readable(architecture.shapes)
    assert {path for paths in names.values() for path in paths} == set(architecture.shapes)
    assert all(names[name] == (path,) for path, name in kohya(architecture.shapes).items())
    assert all(names[path] == (path,) for path in architecture.shapes)
    # Only names without a component can mean several, and those only in the two text encoders of SDXL.
    unclear = {name: paths for name, paths in names.items() if len(paths) > 1}
    assert bool(unclear) == (architecture.name == "sdxl")
    assert all(
        {path.partition(".")[0] for path in paths} <= {"text_encoder", "text_encoder_2"} for paths in unclear.values()
    )


def test_names_of_the_original_code():
    """Rows of the table in the original repositories' conversion scripts (input, middle and output blocks)."""
    names = readable(sdxl().shapes)
    assert {name: names[f"lora_unet_{name}"] for name in ORIGINAL_XL} == {
        name: (f"unet.{path}",) for name, path in ORIGINAL_XL.items()
    }
    names = readable(sd1().shapes)
    assert names["lora_unet_output_blocks_2_1_conv"] == ("unet.up_blocks.0.upsamplers.0.conv",)
    assert names["lora_unet_input_blocks_11_0_in_layers_2"] == ("unet.down_blocks.3.resnets.1.conv1",)
    assert names["lora_unet_input_blocks_8_1_proj_in"] == ("unet.down_blocks.2.attentions.1.proj_in",)
    assert names["lora_unet_output_blocks_5_2_conv"] == ("unet.up_blocks.1.upsamplers.0.conv",)


ORIGINAL_XL = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_4_1_transformer_blocks_1_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
    "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
    "middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
    "middle_block_1_transformer_blocks_9_ff_net_2": "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_1_proj_out": "up_blocks.1.attentions.2.proj_out",
    "output_blocks_8_0_emb_layers_1": "up_blocks.2.resnets.2.time_emb_proj",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "out_2": "conv_out",
}
