"""Other things in a folder of LoRAs are called by their name; a LoRA for Stable Diffusion never is."""

from itertools import product
from pathlib import Path

import pytest

from sdlora.formats.architectures import sd1, sd2, sdxl
from sdlora.formats.foreign import AS_BASE, foreign_kind
from sdlora.formats.header import Spec, read_header
from sdlora.formats.names import kohya, readable
from sdlora.formats.parts import SUFFIXES

WILD = Path(__file__).parents[3] / "shared/data/loras"
PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
CLIP = [f"text_model.encoder.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.fc1")]
SDXL_UNET = [path.removeprefix("unet.") for path in sdxl().shapes if path.startswith("unet.")]


def blocks(pattern: str, parts: str, count: int = 4) -> list[str]:
    """Modules by a pattern with "{}" for the number of the block; parts: what comes behind it."""
    return [f"{pattern.format(i)}{part}" for i, part in product(range(count), parts.split())]


def lora(modules: list[str], prefix: str = "", endings: tuple[str, ...] = PEFT) -> list[str]:
    """The keys of a LoRA, dotted, or flat as kohya has it."""
    flat = endings is KOHYA
    return [f"{prefix}{name.replace('.', '_') if flat else name}.{end}" for name, end in product(modules, endings)]


def specs(keys: list[str], shape: tuple[int, ...] = (8, 8)) -> dict[str, Spec]:
    return dict.fromkeys(keys, Spec(shape, "F16"))


FLUX = blocks("double_blocks.{}.", "img_attn.qkv img_attn.proj img_mlp.0 txt_attn.qkv txt_mlp.2 img_mod.lin", 19)
FLUX += blocks("single_blocks.{}.", "linear1 linear2 modulation.lin", 38)
FLUX_DIFFUSERS = blocks("single_transformer_blocks.{}.", "attn.to_q attn.to_k attn.to_v proj_mlp proj_out", 38)
FLUX_DIFFUSERS += blocks("transformer_blocks.{}.", "attn.to_q attn.add_q_proj ff.net.0.proj ff_context.net.2", 19)
HUNYUAN = blocks("double_blocks.{}.", "img_attn_qkv img_attn_proj img_mlp.fc1 txt_mlp.fc2 img_mod.linear", 20)
HUNYUAN += blocks("single_blocks.{}.", "linear1 linear2 modulation.linear", 40)
SD3 = blocks("joint_blocks.{}.", "x_block.attn.qkv x_block.attn.proj context_block.attn.qkv x_block.mlp.fc1", 24)
SD3_DIFFUSERS = blocks("transformer_blocks.{}.", "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj", 24)
SD3_DREAMBOOTH = blocks("transformer_blocks.{}.", "attn.to_q attn.to_k attn.to_v attn.to_out.0", 24)
QWEN = blocks("transformer_blocks.{}.", "attn.to_q attn.add_k_proj img_mlp.net.0.proj txt_mlp.net.2 img_mod.1", 60)
WAN = blocks("blocks.{}.", "self_attn.q self_attn.o cross_attn.k cross_attn.v_img ffn.0 ffn.2", 30)
WAN_DIFFUSERS = blocks("blocks.{}.", "attn1.to_q attn1.to_out.0 attn2.to_k attn2.add_k_proj ffn.net.0.proj", 30)
ANIMA = blocks("blocks.{}.", "self_attn.q_proj self_attn.output_proj cross_attn.k_proj mlp.layer1", 28)
KREA = blocks("blocks.{}.", "attn.wq attn.wo mlp.gate mlp.up mlp.down", 4) + ["txtmlp.1", "tmlp.0"]
LTX = blocks("transformer_blocks.{}.", "attn1.to_q attn1.to_k attn2.to_v attn2.to_out.0 ff.net.0.proj", 28)
LUMINA = blocks("layers.{}.", "attention.qkv attention.out feed_forward.w1 feed_forward.w3", 26)
LUMINA += blocks("noise_refiner.{}.", "attention.qkv feed_forward.w2", 2)
ZIMAGE = blocks("layers.{}.", "attention.to_q attention.to_out.0 feed_forward.w1 adaLN_modulation.0", 30)
AURA = blocks("joint_transformer_blocks.{}.", "attn.to_q attn.add_k_proj ff.linear_1") + blocks(
    "single_transformer_blocks.{}.", "attn.to_q ff.linear_1", 8
)
HIDREAM = blocks("double_stream_blocks.{}.block.", "attn1.to_q ff_i.shared_experts.w1", 16)
FLUX2 = blocks("single_transformer_blocks.{}.", "attn.to_qkv_mlp_proj attn.to_out", 48)
FLUX2 += blocks("transformer_blocks.{}.", "attn.to_q attn.add_q_proj ff.linear_in", 8)
T5 = blocks("encoder.block.{}.layer.", "0.SelfAttention.q 1.DenseReluDense.wi_0", 24)
LLAMA = blocks("model.layers.{}.", "self_attn.q_proj self_attn.v_proj mlp.gate_proj", 32)
MOTION = "down_blocks.{}.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0."
CASCADE = blocks("down_blocks.1.{}.", "attention.attn.in_proj kv_mapper.1", 8)
QWEN_TE = blocks("layers.{}.", "self_attn.q_proj mlp.gate_proj", 28)

LORAS = {
    "Flux": [
        lora(FLUX, "lora_unet_", KOHYA),
        lora(FLUX, "lora_unet_", KOHYA) + lora(CLIP, "lora_te1_", KOHYA),
        lora(FLUX, "diffusion_model."),
        lora(FLUX),
        lora(FLUX[-9:], "lora_unet_", KOHYA) + lora(CLIP, "lora_te1_", KOHYA),
        lora(FLUX_DIFFUSERS, "transformer."),
        lora(FLUX_DIFFUSERS, "base_model.model."),
        lora(FLUX_DIFFUSERS, "lora_transformer_", KOHYA)
        + lora(T5, "lora_te2_", KOHYA)
        + lora(CLIP, "lora_te1_", KOHYA),
        lora(FLUX_DIFFUSERS, "lycoris_", ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha")),
        lora(blocks("double_blocks.{}.processor.", "qkv_lora1 proj_lora2", 19), "", ("down.weight", "up.weight")),
    ],
    "HunyuanVideo": [lora(HUNYUAN, "lora_unet_", KOHYA), lora(HUNYUAN, "diffusion_model.")],
    "Flux.2": [lora(FLUX2, "transformer."), lora(FLUX2, "base_model.model.")],
    "SD3": [
        lora(SD3, "lora_unet_", KOHYA) + lora(CLIP, "lora_te1_", KOHYA) + lora(T5, "lora_te3_", KOHYA),
        lora(SD3, "diffusion_model."),
        lora(SD3_DIFFUSERS, "transformer.") + lora(CLIP, "text_encoder."),
        lora(SD3_DREAMBOOTH, "transformer."),
        lora(SD3_DREAMBOOTH, "base_model.model."),
        lora(SD3_DIFFUSERS, "lora_transformer_", KOHYA),
    ],
    "Qwen-Image": [
        lora(QWEN, "transformer."),
        lora(QWEN, "", KOHYA[:2]),
        lora(QWEN, "lora_unet_", KOHYA),
        lora(QWEN, "diffusion_model."),
    ],
    "Wan": [lora(WAN, "diffusion_model."), lora(WAN, "lora_unet_", KOHYA), lora(WAN_DIFFUSERS, "transformer.")],
    "Anima or Cosmos": [
        lora(ANIMA, "lora_unet_", KOHYA) + lora(QWEN_TE, "lora_te_", KOHYA),
        lora(ANIMA, "diffusion_model."),
        lora(ANIMA, "net."),
    ],
    "Krea 2": [lora(KREA, "lora_unet_", KOHYA)],
    "a diffusion transformer such as PixArt, Sana, LTX-Video or CogVideoX": [
        lora(LTX, "transformer."),
        lora(LTX, "diffusion_model."),
        lora(LTX, "base_model.model."),
    ],
    "PixArt or Sana": [
        lora(blocks("blocks.{}.", "attn.qkv cross_attn.q_linear cross_attn.kv_linear"), "diffusion_model.")
    ],
    "Lumina 2 or Z-Image": [lora(LUMINA, "lora_unet_", KOHYA), lora(LUMINA, "diffusion_model.")],
    "Z-Image": [lora(ZIMAGE, "transformer."), lora(ZIMAGE, "lora_unet_", KOHYA)],
    "AuraFlow": [lora(AURA, "transformer.")],
    "HiDream": [lora(HIDREAM, "diffusion_model.")],
    "Stable Cascade": [lora(CASCADE, "lora_prior_unet_", KOHYA) + lora(CLIP, "lora_prior_te_", KOHYA)],
    "AnimateDiff's motion": [
        [
            f"{MOTION.format(i)}processor.to_{part}_lora.{end}.weight"
            for i in range(4)
            for part in "qkv"
            for end in ("up", "down")
        ]
    ],
    "a video model (SVD, ModelScope or Zeroscope)": [
        lora(blocks("down_blocks.{}.attentions.0.", "temporal_transformer_blocks.0.attn1.to_q"), "unet.")
        + lora(blocks("down_blocks.{}.temp_convs.0.", "conv1.2"), "unet.")
    ],
    "Kandinsky 2 or DeepFloyd IF": [lora(blocks("down_blocks.{}.attentions.0.", "add_k_proj to_q"), "unet.")],
    "a T5 text encoder, as of SD3 or Flux": [lora(T5, "lora_te3_", KOHYA), lora(T5, "base_model.model.")],
    "a language model": [
        lora(LLAMA, "base_model.model."),
        lora(blocks("transformer.h.{}.attn.", "c_attn c_proj", 12), "base_model.model."),
        lora(blocks("encoder.layer.{}.attention.", "self.query", 12), "base_model.model.bert."),
    ],
    "an image encoder": [lora(blocks("vision_model.encoder.layers.{}.", "self_attn.q_proj", 24), "base_model.model.")],
}


@pytest.mark.parametrize(("model", "keys"), [(model, keys) for model in LORAS for keys in LORAS[model]])
def test_a_lora_for_another_model_is_called_by_its_name(model, keys):
    found = foreign_kind(specs(keys), {})
    assert found is not None and found.what == f"a LoRA for {model}"
    assert "SD 1.x, SD 2.x and SDXL" in found.advice


UNET = ["conv_in.weight", "time_embedding.linear_1.weight", "mid_block.resnets.0.norm1.weight"]
UNET += [f"{path}.weight" for path in SDXL_UNET]
LDM = [f"model.diffusion_model.input_blocks.{i}.0.in_layers.2.weight" for i in range(12)]
LDM += [
    "model.diffusion_model.out.2.weight",
    "first_stage_model.encoder.conv_in.weight",
    "first_stage_model.quant_conv.bias",
]
VAE = blocks("encoder.down.{}.block.0.", "conv1.weight norm1.bias") + ["decoder.conv_in.weight", "quant_conv.weight"]
VAE_DIFFUSERS = blocks("decoder.up_blocks.{}.resnets.0.", "conv1.weight") + [
    "decoder.conv_in.bias",
    "post_quant_conv.bias",
]
CONTROLNET = ["input_hint_block.0.weight", *blocks("zero_convs.{}.0.", "weight bias", 12)]
LLLITE = blocks(
    "lllite_unet_input_blocks_4_1_transformer_blocks_{}_attn1_to_q.", "down.0.weight mid.0.weight up.0.weight"
)
CONTROL_LORA = blocks("input_blocks.{}.1.transformer_blocks.0.attn1.to_q.", "up down") + ["lora_controlnet"]
IP = ["image_proj.proj.weight", "image_proj.norm.bias", *blocks("ip_adapter.{}.", "to_k_ip.weight to_v_ip.weight", 16)]
CUSTOM = blocks("down_blocks.0.attentions.{}.transformer_blocks.0.attn2.processor.", "to_k_custom_diffusion.weight")

OTHERS = [
    ("a whole model (SD 1.x)", [*LDM, "cond_stage_model.transformer.text_model.embeddings.position_ids"]),
    ("a whole model (SD 2.x)", [*LDM, "cond_stage_model.model.ln_final.weight"]),
    ("a whole model (SDXL)", [*LDM, "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"]),
    ("a whole model (the SDXL refiner)", [*LDM, "conditioner.embedders.0.model.ln_final.weight"]),
    ("a whole UNet", UNET),
    ("a whole UNet", ["model.diffusion_model.out.2.weight"]),
    ("a whole model (Flux)", [f"model.diffusion_model.{name}.weight" for name in FLUX]),
    (
        "a whole model (SD3)",
        [f"model.diffusion_model.{name}.weight" for name in SD3]
        + [f"text_encoders.clip_l.transformer.{name}.weight" for name in CLIP],
    ),
    ("a whole model (Wan)", [f"{name}.weight" for name in WAN]),
    ("a CLIP text encoder", [f"{name}.weight" for name in CLIP]),
    ("a VAE", VAE),
    ("a VAE", VAE_DIFFUSERS + blocks("decoder.mid_block.attentions.0.", "to_q.weight to_k.weight to_out.0.bias", 1)),
    ("a ControlNet", CONTROLNET),
    ("a ControlNet", [f"control_model.{name}" for name in CONTROLNET]),
    ("a ControlNet", [*UNET, *blocks("controlnet_down_blocks.{}.", "weight bias", 12), "controlnet_mid_block.bias"]),
    ("a ControlNet-LLLite", LLLITE),
    ("a Control-LoRA, which is a ControlNet", CONTROL_LORA),
    ("an IP-Adapter", IP),
    ("a T2I-Adapter", blocks("adapter.body.{}.resnets.0.", "block1.weight block2.bias")),
    ("a set of Custom Diffusion attention weights", CUSTOM),
    ("an AnimateDiff motion module", blocks(MOTION, "to_q.weight pos_encoder.pe")),
    ("a language model", [f"{name}.weight" for name in LLAMA]),
    ("a T5 text encoder", [f"{name}.weight" for name in T5]),
    ("an upscaler", blocks("model.1.sub.{}.RDB1.conv1.0.", "weight bias", 23)),
    ("a hypernetwork", blocks("768.{}.", "linear.0.weight linear.0.bias", 2)),
    ("a textual inversion", ["emb_params"]),
    ("a textual inversion", ["clip_l", "clip_g"]),
    ("a textual inversion", ["string_to_param.*"]),
]


@pytest.mark.parametrize(("what", "keys"), OTHERS)
def test_what_is_no_lora_is_called_by_its_name(what, keys):
    found = foreign_kind(specs(keys), {})
    assert found is not None and found.what == what
    assert (found.advice == AS_BASE) == what.startswith(
        ("a whole model (SD 1", "a whole model (SD 2", "a whole model (SDXL", "a whole model (the", "a whole UNet")
    )


def test_a_token_of_diffusers_is_a_textual_inversion_by_its_shape():
    found = foreign_kind({"<zib>": Spec((4, 768), "F32")}, {})
    assert found is not None and found.what == "a textual inversion" and "that a LoRA brings along" in found.advice
    assert foreign_kind({"<zib>": Spec((4, 769), "F32")}, {}) is None


@pytest.mark.parametrize("architecture", [sd1(), sd2(), sdxl()], ids=lambda one: one.name)
def test_no_spelling_of_a_module_of_stable_diffusion_is_foreign(architecture):
    """Not even if it is all that the file holds."""
    for name in readable(architecture.shapes):
        assert foreign_kind(specs([f"{name}.lora_A.weight", f"{name}.lora_B.weight"]), {}) is None, name


@pytest.mark.parametrize("architecture", [sd1(), sd2(), sdxl()], ids=lambda one: one.name)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_law_of_a_lora_for_stable_diffusion_is_foreign(architecture, suffix):
    names = kohya(architecture.shapes).values()
    keys = [f"{name}.{suffix}" for name in names] + [f"{name}.alpha" for name in names]
    assert foreign_kind(specs(keys, (4, 320)), {}) is None
    named = not suffix.endswith(("weight", "bias")) or suffix.startswith(("lora", "oft", "set"))
    if named:  # a weight or bias alone is that of a whole model
        keys = [f"{path.removeprefix('unet.')}.{suffix}" for path in architecture.shapes if path.startswith("unet.")]
        assert foreign_kind(specs(keys, (4, 320)), {}) is None


def test_lists_of_2022_processors_and_two_part_files_are_not_foreign():
    lists = [f"{part}:{i}:{side}" for part in ("unet", "text_encoder") for i in range(32) for side in ("up", "down")]
    processors = blocks(
        "down_blocks.{}.attentions.0.transformer_blocks.0.attn1.processor.",
        "to_q_lora.down.weight to_out_lora.up.weight",
    )
    halves = blocks("down_blocks.{}.attentions.0.transformer_blocks.0.attn1.to_q.___.", "layer.W_down layer.W_up alpha")
    ia3 = blocks("lora_unet_down_blocks_{}_attentions_0_transformer_blocks_0_attn2_to_k.", "weight on_input")
    for keys in (lists, [*lists, "<s1>"], processors, [f"unet.{key}" for key in processors], halves, ia3):
        assert foreign_kind(specs(keys), {}) is None


def test_embeddings_beside_a_lora_and_accidents_leave_it_a_lora():
    keys = lora(SDXL_UNET, "lora_unet_", KOHYA) + ["bundle_emb.zib.clip_l", "bundle_emb.zib.clip_g", "emb_params"]
    assert foreign_kind(specs(keys), {}) is None
    assert foreign_kind(specs(["bundle_emb.zib.clip_l", "bundle_emb.zib.clip_g"]), {}) is None
    accident = lora(["double_blocks.0.img_attn.qkv"], "lora_unet_", KOHYA)
    assert foreign_kind(specs(keys + accident), {}) is None
    few = lora(["single_blocks.0.linear1"], "lora_unet_", KOHYA)[:1]
    found = foreign_kind(specs(lora(QWEN, "lora_unet_", KOHYA) + few), {})
    assert found is not None and found.what == "a LoRA for Qwen-Image"


@pytest.mark.parametrize(
    ("attention", "width", "foreign"),
    [("attn2_to_k", 1280, True), ("attn2_to_k", 2048, False), ("attn1_to_q", 1536, True), ("attn1_to_q", 1280, False)],
)
def test_the_refiner_is_told_by_its_widths(attention, width, foreign):
    stems = [f"lora_unet_input_blocks_{i}_1_transformer_blocks_0_{attention}" for i in (4, 5, 7, 8)]
    tensors = {f"{stem}.lora_down.weight": Spec((8, width), "F16") for stem in stems}
    tensors |= {f"{stem}.lora_up.weight": Spec((768, 8), "F16") for stem in stems}
    found = foreign_kind(tensors, {})
    assert (found is not None and found.what == "a LoRA for the SDXL refiner") == foreign


@pytest.mark.parametrize(
    ("metadata", "model"),
    [
        ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux"),
        ({"modelspec.architecture": "Flux.1-dev/lora"}, "Flux"),
        ({"ss_base_model_version": "sd3m"}, "SD3"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, None),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, None),
        ({}, None),
    ],
)
def test_a_shared_text_encoder_alone_is_told_by_its_metadata(metadata, model):
    found = foreign_kind(specs(lora(CLIP, "lora_te1_", KOHYA)), metadata)
    assert (found and found.what) == (model and f"a LoRA for the text encoder of {model}, as its metadata says")


def test_metadata_cannot_make_a_unet_foreign():
    keys = lora(SDXL_UNET, "lora_unet_", KOHYA)
    assert foreign_kind(specs(keys), {"modelspec.architecture": "flux-1-dev/lora"}) is None


def test_a_file_of_endless_forms_is_looked_at_in_part(monkeypatch):
    """Only the forms are limited: what is in the file most often still counts."""
    monkeypatch.setattr("sdlora.formats.foreign.MOST_FORMS", 20)
    keys = lora(WAN, "diffusion_model.") + [f"x{'y' * i}" for i in range(200)]
    found = foreign_kind(specs(keys), {})
    assert found is not None and found.what == "a LoRA for Wan"


def test_an_empty_file_is_nothing_in_particular():
    assert foreign_kind({}, {}) is None


@pytest.mark.skipif(not WILD.is_dir(), reason="the folder of files from the wild is not here")
@pytest.mark.parametrize("name", ["analog_svd_rank4", "lora_disney"])
def test_real_files_of_2022_are_not_foreign(name):
    told = read_header(WILD / f"{name}.safetensors")
    assert foreign_kind(told.tensors, told.metadata) is None
