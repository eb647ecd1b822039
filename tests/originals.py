"""Models in the names of the original code (ldm, sgm), made of diffusers' by the tables of its conversion scripts.

Nothing of sdlora is used; test_checkpoints holds what comes out against diffusers' own conversion the other way.
"""

from typing import Any

import torch
from torch import Tensor

_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}
_ENDS = {
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def original(parts: dict[str, Any], kind: str) -> dict[str, Tensor]:
    """The tensors of a single file. parts: modules by component; kind: "sd1", "sd2" or "sdxl"."""
    unet = parts["unet"].state_dict()
    tensors = {f"model.diffusion_model.{original_unet_key(key, unet)}": tensor for key, tensor in unet.items()}
    clip = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in parts["text_encoder"].state_dict().items()}
    if kind == "sd2":
        tensors |= _openclip(clip, "cond_stage_model.model.", spare_layer=True)
    else:
        prefix = "conditioner.embedders.0." if kind == "sdxl" else "cond_stage_model."
        tensors |= {f"{prefix}transformer.{key}": tensor for key, tensor in clip.items()}
    if kind == "sdxl":
        tensors |= _openclip(parts["text_encoder_2"].state_dict(), "conditioner.embedders.1.model.")
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def original_unet_key(key: str, keys: Any) -> str:
    """keys: all of the UNet's, which tell whether an attention stands before an upsampler."""
    for name, there in _ENDS.items():
        if key.startswith(name):
            return there + key.removeprefix(name)
    head, *rest = key.split(".")
    if head == "mid_block":
        kind, j, *leaf = rest
        return _block(f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}", kind, leaf)
    i, kind, j, *leaf = rest
    down = head == "down_blocks"
    if kind == "downsamplers":
        return f"input_blocks.{3 * int(i) + 3}.0.op.{leaf[-1]}"
    if kind == "upsamplers":
        after = 2 if any(other.startswith(f"up_blocks.{i}.attentions.") for other in keys) else 1
        return f"output_blocks.{3 * int(i) + 2}.{after}.conv.{leaf[-1]}"
    number = 3 * int(i) + int(j) + (1 if down else 0)
    return _block(f"{'input' if down else 'output'}_blocks.{number}.{int(kind == 'attentions')}", kind, leaf)


def _block(there: str, kind: str, leaf: list[str]) -> str:
    inner = ".".join(leaf)
    if kind == "resnets":
        for name, original_name in _RESNET.items():
            inner = inner.replace(name, original_name)
    return f"{there}.{inner}"


def _openclip(state: dict[str, Tensor], prefix: str, spare_layer: bool = False) -> dict[str, Tensor]:
    """spare_layer: one more layer than transformers' model has, and a projection, as OpenCLIP's ViT-H in SD 2.x."""
    tensors = {
        f"{prefix}token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        f"{prefix}positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        f"{prefix}ln_final.weight": state["text_model.final_layer_norm.weight"],
        f"{prefix}ln_final.bias": state["text_model.final_layer_norm.bias"],
        f"{prefix}logit_scale": torch.tensor(4.6),
    }
    width = state["text_model.final_layer_norm.bias"].shape[0]
    like = state["text_model.final_layer_norm.bias"]
    projection = state.get("text_projection.weight", like.new_zeros(width, width))
    tensors[f"{prefix}text_projection"] = projection.T
    layers = 1 + max(int(key.split(".")[3]) for key in state if ".layers." in key)
    for i in range(layers + spare_layer):
        layer, there = f"text_model.encoder.layers.{min(i, layers - 1)}", f"{prefix}transformer.resblocks.{i}"
        sign = 1 if i < layers else -1  # so that nobody takes the spare layer for another
        for kind in ("weight", "bias"):
            fused = [state[f"{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            tensors[f"{there}.attn.in_proj_{kind}"] = sign * torch.cat(fused)
            for name, original_name in _LAYER.items():
                tensors[f"{there}.{original_name}.{kind}"] = sign * state[f"{layer}.{name}.{kind}"]
    return tensors
