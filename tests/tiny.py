"""Small pipelines with random weights and the real block structure of SD 1.x, SD 2.x and SDXL."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIZE = 64  # pixels; the VAE shrinks by 8


@cache
def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE without merges: every byte is a token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    characters = [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        merges.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocab), str(merges), model_max_length=77)


def _unet(kind: str) -> UNet2DConditionModel:
    common: dict[str, Any] = {"sample_size": SIZE // 8, "norm_num_groups": 8, "layers_per_block": 2}
    if kind == "sdxl":
        return UNet2DConditionModel(
            **common,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32, 32),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(2, 4, 4),
            cross_attention_dim=64,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
        )
    return UNet2DConditionModel(
        **common,
        block_out_channels=(16, 32, 32, 32),
        attention_head_dim=(2, 4, 4, 4) if kind == "sd2" else 4,
        cross_attention_dim=32,
        use_linear_projection=kind == "sd2",
    )


def _text_encoder(projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=32,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().eos_token_id,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def tiny_pipeline(kind: str = "sd1", seed: int = 0, prediction_type: str = "epsilon") -> Any:
    """kind: "sd1", "sd2" or "sdxl". Two pipelines of one kind and seed have the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=SIZE,
        )
        parts: dict[str, Any] = {
            "vae": vae,
            "unet": _unet(kind),
            "text_encoder": _text_encoder(),
            "tokenizer": tokenizer(),
            "scheduler": DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type=prediction_type,
            ),
        }
        if kind == "sdxl":
            parts |= {"text_encoder_2": _text_encoder(projected=True), "tokenizer_2": tokenizer()}
            pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
        else:
            pipeline = StableDiffusionPipeline(
                **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
            )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
        if part is not None:
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_folder(folder: Path, kind: str = "sd1", seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """The pipeline saved as a diffusers folder in float32 safetensors."""
    tiny_pipeline(kind, seed, prediction_type).save_pretrained(folder)
    return folder
