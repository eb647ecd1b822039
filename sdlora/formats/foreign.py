"""What a .safetensors file is when it is no LoRA for Stable Diffusion 1, 2 or XL, told from the names that it holds.

Names are compared without their numbers, and with "_" for every separator, so that one row of the table stands for a
model's module in every spelling: "double_blocks__img_attn" is Flux's, be it written as
lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight or diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight.
A file of thousands of names has a few dozen of these forms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sdlora.formats.header import Spec

ADVICE = "sdlora mixes LoRAs for SD 1.x, SD 2.x and SDXL; choose one of those"
AS_BASE = "choose it as the base model, and a LoRA to go with it"
SHARE = 0.05  # of the names that speak for other models, for one to count
ACCIDENT = 0.02  # of all names; if fewer speak for other models, something went wrong when the file was made
MOST_FORMS = 2000  # a model with all its parts has some 500


@dataclass(frozen=True)
class Foreign:
    """what: as in "x.safetensors is ..."; advice: what to do about it."""

    what: str
    advice: str = ADVICE


@dataclass(frozen=True)
class Kind:
    """A kind of model by its modules.

    model: its name, as in "a LoRA for ..."; whole: what a file is that has its weights and not changes to them.
    heads: how names of its modules begin; inside: what they have somewhere. A form that has any of these is its own.
    """

    model: str
    heads: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    whole: str = ""

    def has(self, form: str) -> bool:
        return form.startswith(self.heads) or any(part in form for part in self.inside)

    def described(self, adapter: bool) -> str:
        return f"a LoRA for {self.model}" if adapter else self.whole or f"a whole model ({self.model})"


# The more special a row, the higher: of those that a file speaks for, the first counts.
# In forms of transformers attn1 and attn2 are attnA and attnB, because the number tells models apart.
KINDS = (
    Kind("a ControlNet", ("lllite_",), whole="a ControlNet-LLLite"),
    Kind(
        "a ControlNet",
        ("control_model_", "input_hint_block_", "zero_convs_", "controlnet_", "control_layers_"),
        whole="a ControlNet",
    ),
    Kind("an IP-Adapter", ("image_proj_", "ip_adapter_"), ("to_k_ip_", "to_v_ip_"), "an IP-Adapter"),
    Kind("a T2I-Adapter", ("adapter_body_", "body__resnets_", "body__block_"), whole="a T2I-Adapter"),
    Kind("Custom Diffusion", inside=("_custom_diffusion_",), whole="a set of Custom Diffusion attention weights"),
    Kind("AnimateDiff's motion", inside=("motion_modules_",), whole="an AnimateDiff motion module"),
    Kind(
        "a video model (SVD, ModelScope or Zeroscope)",
        inside=(
            "temporal_transformer_blocks_",
            "temporal_res_block_",
            "temp_attentions_",
            "temp_convs_",
            "time_stack_",
        ),
    ),
    Kind(
        "Kandinsky 2 or DeepFloyd IF",
        inside=("blocks__attentions__to_", "blocks__attentions__add_", "blocks__attentions__processor_"),
    ),
    Kind("Stable Cascade", ("lora_prior_", "prior_", "clip_txt_mapper"), ("_channelwise_",)),
    Kind("Qwen-Image", tuple(f"transformer_blocks__{part}" for part in ("img_m", "txt_m"))),
    Kind(
        "HunyuanVideo",
        tuple(f"double_blocks__{side}_{part}" for side in ("img", "txt") for part in ("mlp_fc", "mod_linear"))
        + ("single_blocks__modulation_linear", "single_blocks__mlp_fc", "txt_in_individual_token_refiner")
        + ("context_embedder_token_refiner",),
    ),
    Kind("Flux.2", ("double_stream_mod", "single_stream_mod", "single_transformer_blocks__attn_to_qkv_mlp_proj")),
    Kind("Chroma", ("distilled_guidance_layer",)),
    Kind("HiDream", ("double_stream_blocks_", "single_stream_blocks_")),
    Kind("AuraFlow", ("joint_transformer_blocks_", "double_layers_", "single_layers_")),
    Kind("Flux", ("double_blocks_", "single_blocks_", "single_transformer_blocks_")),
    Kind("SD3", ("joint_blocks_",)),
    Kind("SD3", tuple(f"transformer_blocks__{part}" for part in ("attn_", "ff_context", "norm_context"))),
    Kind("Mochi", ("blocks__attn_qkv_x", "blocks__attn_qkv_y", "transformer_blocks__attnA_add_")),
    Kind("LTX-2", ("transformer_blocks__audio_", "transformer_blocks__video_", "audio_")),
    Kind("ACE-Step", ("transformer_blocks__cross_attn_", "lyric_")),
    Kind("a diffusion transformer such as PixArt, Sana, LTX-Video or CogVideoX", ("transformer_blocks_", "patchify_")),
    Kind("PixArt or Sana", ("blocks__cross_attn_q_linear", "blocks__cross_attn_kv_linear", "blocks__attn_qkv")),
    Kind(
        "Anima or Cosmos",
        tuple(f"blocks__{side}_attn_{part}_proj" for side in ("self", "cross") for part in ("q", "k", "v", "output"))
        + ("blocks__mlp_layer", "llm_adapter_"),
    ),
    Kind("Krea 2", ("blocks__attn_w", "txtfusion_", "txtmlp_", "text_fusion_")),
    Kind(
        "HunyuanDiT",
        tuple(f"blocks__attn{which}_{part}" for which in "AB" for part in ("Wqkv", "q_proj", "kv_proj", "out_proj"))
        + ("blocks__ff_net", "blocks__skip_linear"),
    ),
    Kind("Wan", ("blocks__self_attn_", "blocks__cross_attn_", "blocks__ffn_", "blocks__attnA_", "blocks__attnB_")),
    Kind("Z-Image", tuple(f"{part}__attention_to_" for part in ("layers", "noise_refiner", "context_refiner"))),
    Kind(
        "Lumina 2 or Z-Image",
        ("noise_refiner_", "context_refiner_", "cap_embedder_", "layers__attn_to_")
        + ("layers__attention_", "layers__feed_forward_", "layers__adaLN_modulation"),
    ),
    Kind(
        "a VAE",
        ("encoder_down_", "encoder_mid_", "encoder_conv_", "decoder_up_", "decoder_mid_", "decoder_conv_")
        + ("quant_conv", "post_quant_conv"),
        whole="a VAE",
    ),
    Kind("an upscaler", ("RRDB_trunk_", "conv_first_", "body__rdb", "model__sub__RDB"), whole="an upscaler"),
    Kind(
        "a T5 text encoder, as of SD3 or Flux",
        tuple(f"{prefix}encoder_block_" for prefix in ("lora_te_", "text_encoder_", "t_", "")) + ("text_encoders_t",),
        whole="a T5 text encoder",
    ),
    Kind(
        "the language model that encodes text for another kind of model",
        ("lora_te_layers_", "lora_te_model_layers_", "text_encoder_model_layers_", "text_encoder_layers_")
        + ("text_encoders_qwen", "text_encoders_gemma", "text_encoders_llama"),
    ),
    Kind(
        "a language model",
        ("model_layers_", "h__", "gpt_neox_", "bert_", "roberta_", "encoder_layer__", "language_model_")
        + (
            "model_language_model_",
            "model_decoder_layers_",
            "model_encoder_layers_",
            "layers__self_attn_",
            "layers__mlp_",
        )
        + ("model_embed_tokens", "lm_head"),
        whole="a language model",
    ),
    Kind("an image encoder", ("vision_model_", "visual_", "vit_"), whole="an image encoder"),
)
UNET = ("down_blocks_", "mid_block_", "up_blocks_", "input_blocks_", "middle_block_", "output_blocks_") + (
    "conv_in",
    "conv_out",
    "time_emb",
    "add_embedding",
    "label_emb",
    "out__",
)
CLIP = ("lora_te", "text_encoder", "text_model_", "clip_", "encoder_layers_", "cond_stage_model_", "conditioner_")
# By what their metadata begins with: other models that have the CLIP text encoders of SD 1.x and SDXL.
SHARING_CLIP = {
    "flux": "Flux",
    "chroma": "Chroma",
    "stable-diffusion-3": "SD3",
    "sd3": "SD3",
    "stable-cascade": "Stable Cascade",
}
CHECKPOINTS = {
    "conditioner_embedders__transformer_": "SDXL",
    "conditioner_embedders__model_": "the SDXL refiner",
    "cond_stage_model_transformer_": "SD 1.x",
    "cond_stage_model_model_": "SD 2.x",
}
EMBEDDINGS = {"emb_params", "clip_l", "clip_g", "t5xxl", "string_to_param", "text_encoders_0", "text_encoders_1"}
EMBEDDING_WIDTHS = {768, 1024, 1280}

# What may stand before the name of a module and says nothing about the model.
_CONTAINER = re.compile(
    "(?:base_model_model_|model_diffusion_model_|diffusion_model_|lora_unet_+|lora_transformer_+|oft_unet_|lycoris_|unet_"
    "|transformer_(?!blocks)|model_(?=transformer|unet|base_model|diffusion_model|text_model|down_blocks|single_|double_)"
    "|net_(?=blocks)|module_)*"
)
_CHANGE = re.compile(
    "lora|lycoris|lokr_|hada_|oft_|_alpha$|_diff(?:_b)?$|scale$|magnitude|[wb]_norm$|_ia_l|on_input|_W_|_[ab]_weight$"
    "|set_weight|set_bias|scalar$|__up$|__down$|bundle_emb|bias_(?:indices|values|size)$"
)
_SEPARATORS = bytes.maketrans(b".:", b"__")
_DIGITS = b"0123456789"
_NARROW = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "hada_w1_b", "hada_w2_b", "diff")


def foreign_kind(tensors: Mapping[str, Spec], metadata: Mapping[str, str]) -> Foreign | None:
    """What the file is, if it is not a LoRA for Stable Diffusion 1, 2 or XL; None if it may be one.

    tensors: shapes by name, as the header tells them. It costs well under a millisecond for thousands of names.
    """
    found = _small(tensors)
    if found:
        return found
    forms = _forms(tensors)
    others, unet, clip = _shared_out(forms)
    speaking = sum(forms[form] for form in set().union(*others.values()))
    # A ControlNet has most of a UNet's weights; changes to a UNet are another matter.
    if speaking > max(ACCIDENT * len(tensors), sum(forms[form] for form in unet if _CHANGE.search(form))):
        for kind, own in others.items():
            if sum(forms[form] for form in own) >= SHARE * speaking:
                return Foreign(kind.described(_changes(forms, own)))
    if (unet or clip) and not _changes(forms, unet | clip):
        return _whole(forms, unet)
    if unet and _is_refiner(tensors):
        return Foreign("a LoRA for the SDXL refiner")
    return None if unet or not clip else _shared_encoder(metadata)


def _small(tensors: Mapping[str, Spec]) -> Foreign | None:
    """Files that have few tensors or names of their own kind, and no modules."""
    if "lora_controlnet" in tensors:
        return Foreign("a Control-LoRA, which is a ControlNet")
    if not tensors:
        return None
    first = next(iter(tensors))
    if len(tensors) <= 8 and (tensors.keys() <= EMBEDDINGS or first.startswith("string_to_param")):
        return Foreign("a textual inversion", "sdlora takes those that a LoRA brings along; choose a LoRA")
    bare = len(tensors) <= 8 and not any(mark in name for name in tensors for mark in ".:")
    if bare and all(len(shape) in (1, 2) and shape[-1] in EMBEDDING_WIDTHS for shape, _ in tensors.values()):
        return Foreign("a textual inversion", "sdlora takes those that a LoRA brings along; choose a LoRA")
    if first[:1].isdigit() and all(name.partition(".")[0].isdigit() for name in tensors):
        widths = {name.partition(".")[0] for name in tensors}
        if widths <= {"320", "640", "768", "1024", "1280", "2048"}:
            return Foreign("a hypernetwork")
    return None


def _forms(names: Mapping[str, Spec]) -> Counter[str]:
    """How many names there are of each form; of files that are made to be slow, the most frequent forms."""
    text = "\n".join(names)
    if not any(block in text for block in ("down_blocks", "up_blocks", "input_blocks", "output_blocks")):
        # Transformers: which attention it is tells them apart, and "transformer.blocks" is not "transformer_blocks".
        text = text.replace("attn1", "attnA").replace("attn2", "attnB").replace("transformer.blocks", "blocks")
    forms = Counter(text.encode().translate(_SEPARATORS, _DIGITS).decode().split("\n"))
    return forms if len(forms) <= MOST_FORMS else Counter(dict(forms.most_common(MOST_FORMS)))


def _shared_out(forms: Mapping[str, int]) -> tuple[dict[Kind, set[str]], set[str], set[str]]:
    """The forms that speak for each other kind, in the table's order, for Stable Diffusion's UNet, and for CLIP."""
    others: dict[Kind, set[str]] = {}
    unet, clip = set(), set()
    text = "\n".join(forms)
    plain = not any(part in text for kind in KINDS for part in kind.inside)
    for form in forms:
        begin = _CONTAINER.match(form)
        head = form[begin.end() :] if begin else form
        if plain and head.startswith(UNET):
            unet.add(form)
            continue
        own = [kind for kind in KINDS if kind.has(head)] if "text_model_encoder" not in head else []
        for kind in own:
            others.setdefault(kind, set()).add(form)
        if not own and head.startswith(UNET):
            unet.add(form)
        elif not own and head.startswith(CLIP):
            clip.add(form)
    return {kind: others[kind] for kind in KINDS if kind in others}, unet, clip


def _changes(forms: Mapping[str, int], own: set[str]) -> bool:
    """Whether most names of these forms are of changes to weights, not of weights."""
    changes = sum(forms[form] for form in own if _CHANGE.search(form))
    return 2 * changes >= sum(forms[form] for form in own)


def _whole(forms: Mapping[str, int], unet: set[str]) -> Foreign:
    for begin, model in CHECKPOINTS.items():
        if any(form.startswith(begin) for form in forms):
            return Foreign(f"a whole model ({model})", AS_BASE)
    return Foreign("a whole UNet", AS_BASE) if unet else Foreign("a CLIP text encoder")


def _is_refiner(tensors: Mapping[str, Spec]) -> bool:
    """The refiner's UNet sees text 1280 wide, and is 384, 768 and 1536 wide itself; no other has these."""
    text = _widths(tensors, [name for name in tensors if "attn2" in name and "to_k" in name])
    if text:
        return text.most_common(1)[0][0] == 1280
    inner = _widths(tensors, [name for name in tensors if "attn1" in name and "to_q" in name])
    return 1536 in inner and inner.keys() <= {384, 768, 1536}


def _widths(tensors: Mapping[str, Spec], names: list[str]) -> Counter[int]:
    """How often modules take in how much, by those of the named factors that tell."""
    specs = (tensors[name] for name in names if name.endswith(_NARROW))
    return Counter(spec.shape[1] for spec in specs if len(spec.shape) > 1)


def _shared_encoder(metadata: Mapping[str, str]) -> Foreign | None:
    """A file with nothing but a CLIP text encoder, which other models have too: only its metadata tells for which."""
    for key in ("modelspec.architecture", "ss_base_model_version"):
        told = metadata.get(key, "").lower()
        model = next((model for begin, model in SHARING_CLIP.items() if told.startswith(begin)), None)
        if model:
            return Foreign(f"a LoRA for the text encoder of {model}, as its metadata says")
    return None
