"""The keys of HCP-Diffusion, told as others would spell them.

`lora:<module>.___.layer.W_down`: in front the kind of what is saved, behind the mark ".___." the names of the plugin's
own parameters. The UNet's file is unet-<step>, the text encoders' is text_encoder-<step>; no key says its component,
but the module's name does. What it saves as alpha, in its first weeks as scale, is alpha / rank already.
Files of kind plugin are LyCORIS', with LyCORIS' names and its alpha.
Read in HCP-Diffusion 0.2.3 to 0.9.1 (models/plugin.py, lora_base.py, lora_base_patch.py, lora_layers_patch.py,
ckpt_manager/ckpt_safetensor.py, tools/lora_convert.py) and in LyCORIS' hcp plugins of 2023.
"""

from __future__ import annotations

MARK = ".___."
# Before December 2023 the factors were Linear and Conv2d modules, since then parameters of the layer.
PARTS = {
    "layer.W_down": "lora_down.weight",
    "layer.W_up": "lora_up.weight",
    "layer.bias": "lora_B.bias",
    "layer.lora_down.weight": "lora_down.weight",
    "layer.lora_up.weight": "lora_up.weight",
    "layer.lora_up.bias": "lora_B.bias",
    "alpha": "scale",
    "scale": "scale",
}
ENCODERS = {
    "text_model.": "text_encoder.text_model.",
    "clip_B.": "text_encoder.",
    "clip_bigG.": "text_encoder_2.",
}


def translated(key: str) -> str:
    """A key in diffusers' names with its component in front; a key that is not HCP-Diffusion's, or unknown, as it is.

    "lora:mid_block.attentions.0.proj_in.___.layer.W_up" is "unet.mid_block.attentions.0.proj_in.lora_up.weight".
    Kinds that are no LoRA (base: whole parameters) or doubles (lora_ema: moving averages) are unknown.
    """
    front, mark, part = key.partition(MARK)
    kind, _, module = front.rpartition(":")
    if not mark or kind not in ("", "lora", "plugin"):
        return key
    suffix = part if kind == "plugin" else PARTS.get(part)
    if suffix is None:
        return key
    for prefix, path in ENCODERS.items():
        if module.startswith(prefix):
            return f"{path}{module.removeprefix(prefix)}.{suffix}"
    return f"unet.{module}.{suffix}"
