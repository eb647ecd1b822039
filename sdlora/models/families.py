"""What differs between SD (1.x, 2.x, toybox) and SDXL: components, conditioning, and the call of the UNet."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.errors import SdloraError

# What the UNet is told beside latents and timesteps: encoder_hidden_states (n, tokens, width), and of SDXL text_embeds
# (n, width), the pooled projection.
Conditioning = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A family is data and functions; training and generation go through the same ones.

    states(pipeline, ids): what the text encoders make of token numbers (n, window), one tensor for each encoder: the
    states (n, window, width) of each, which the UNet sees side by side, and what it is told beside them.
    unconditional(pipeline, captions): `encode` for negative prompts, of which empty ones may be special.
    predict(unet, latents, timesteps, conditioning, sizes): what the model predicts, in the shape of the latents
    (n, channels, height / 8, width / 8); timesteps (n,) or one for all;
    sizes: (n, 6) original height and width, crop top and left, target height and width; None: the latents' own.
    """

    name: str
    text_encoders: tuple[str, ...]
    states: Callable[[Any, Sequence[Tensor]], tuple[list[Tensor], dict[str, Tensor]]]
    unconditional: Callable[[Any, Sequence[str]], Conditioning]
    predict: Callable[[nn.Module, Tensor, Tensor, Conditioning, Tensor | None], Tensor]

    @property
    def components(self) -> tuple[str, ...]:
        """What a LoRA can change."""
        return ("unet", *self.text_encoders)

    def encode(self, pipeline: Any, captions: Sequence[str]) -> Conditioning:
        """The conditioning of captions as they stand, differentiable with respect to the text encoders.

        What does not fit into the window is cut off, see `truncated`.
        """
        states, told = self.states(pipeline, [_tokens(pipeline, name, captions) for name in self.text_encoders])
        return {"encoder_hidden_states": side_by_side(states), **told}


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline; SdloraError for one that sdlora does not know."""
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise SdloraError(f"the model is a {name}; sdlora works with {' and '.join(FAMILIES)} models")
    return FAMILIES[name]


def components_of(pipeline: Any) -> dict[str, nn.Module]:
    """The modules that a LoRA can change, by component."""
    parts = {name: getattr(pipeline, name) for name in family_of(pipeline).components}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise SdloraError(f"the pipeline has no {' and no '.join(missing)}; load it with all its parts")
    return parts


def side_by_side(states: Sequence[Tensor]) -> Tensor:
    """The states (n, tokens, width) of the text encoders as the UNet sees them."""
    return states[0] if len(states) == 1 else torch.cat(list(states), dim=-1)


def tokenizer_of(pipeline: Any, text_encoder: str) -> Any:
    """The tokenizer of a text encoder, by the component's name."""
    return getattr(pipeline, tokenizer_name(text_encoder))


def tokenizer_name(text_encoder: str) -> str:
    """The name of the component that is a text encoder's tokenizer."""
    return text_encoder.replace("text_encoder", "tokenizer")


def device_of(pipeline: Any, text_encoder: str) -> torch.device:
    """Where a text encoder computes, which for an offloaded one is not where its weights lie."""
    encoder = getattr(pipeline, text_encoder)
    offloaded = hasattr(encoder, "_hf_hook") or hasattr(encoder, "_diffusers_hook")
    return pipeline._execution_device if offloaded else encoder.device


def truncated(pipeline: Any, caption: str) -> str:
    """The end of the caption that does not fit into the text encoder's window, or ""."""
    tokenizer = pipeline.tokenizer
    room = tokenizer.model_max_length - 2  # start and end token
    (spelled,) = spelled_out(pipeline, tokenizer, [caption])
    tokens = tokenizer(spelled, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return tokenizer.decode(tokens[room:]).strip() if len(tokens) > room else ""


def spelled_out(pipeline: Any, tokenizer: Any, captions: Sequence[str]) -> list[str]:
    """The captions with a word for each vector of the learned tokens in them, as diffusers' own pipelines do it.

    Those look for a token in small letters, as CLIP reads it, and miss one that a caption writes with capitals.
    """
    known = tokenizer.get_added_vocab()
    for token in known:
        if f"{token}_1" in known and token == token.lower():
            found, small = re.compile(re.escape(token), re.IGNORECASE), token.replace("\\", r"\\")
            captions = [found.sub(small, caption) for caption in captions]
    return pipeline.maybe_convert_prompt(list(captions), tokenizer)


def _tokens(pipeline: Any, text_encoder: str, captions: Sequence[str]) -> Tensor:
    """Token numbers (n, window) on the text encoder's device."""
    tokenizer = tokenizer_of(pipeline, text_encoder)
    spelled, window = spelled_out(pipeline, tokenizer, captions), tokenizer.model_max_length
    batch = tokenizer(spelled, padding="max_length", truncation=True, max_length=window, return_tensors="pt")
    return batch.input_ids.to(device_of(pipeline, text_encoder))


def _states_sd(pipeline: Any, ids: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    return [pipeline.text_encoder(ids[0])[0]], {}


def _unconditional_sd(pipeline: Any, captions: Sequence[str]) -> Conditioning:
    return SD.encode(pipeline, captions)


def _predict_sd(
    unet: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: Tensor | None = None
) -> Tensor:
    return unet(latents, timesteps, conditioning["encoder_hidden_states"], return_dict=False)[0]


def _states_sdxl(pipeline: Any, ids: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The last hidden state but one of both encoders, and the second's pooled projection (arXiv:2307.01952, 2.1)."""
    first, second = (
        encoder(numbers, output_hidden_states=True)
        for encoder, numbers in zip((pipeline.text_encoder, pipeline.text_encoder_2), ids, strict=True)
    )
    return [first.hidden_states[-2], second.hidden_states[-2]], {"text_embeds": second[0]}


def _unconditional_sdxl(pipeline: Any, captions: Sequence[str]) -> Conditioning:
    """An empty negative prompt is zeros where the model was trained so, as its config says."""
    conditioning = SDXL.encode(pipeline, captions)
    if not pipeline.config.force_zeros_for_empty_prompt:
        return conditioning
    told = torch.tensor([bool(caption) for caption in captions], device=conditioning["text_embeds"].device)
    return {name: value * told.view(-1, *[1] * (value.ndim - 1)) for name, value in conditioning.items()}


def _predict_sdxl(
    unet: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, sizes: Tensor | None = None
) -> Tensor:
    if sizes is None:
        height, width = latents.shape[-2] * 8, latents.shape[-1] * 8
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(latents), 6)
    states = conditioning["encoder_hidden_states"]
    added = {"text_embeds": conditioning["text_embeds"], "time_ids": sizes.to(states)}
    return unet(latents, timesteps, states, added_cond_kwargs=added, return_dict=False)[0]


SD = Family("sd", ("text_encoder",), _states_sd, _unconditional_sd, _predict_sd)
SDXL = Family("sdxl", ("text_encoder", "text_encoder_2"), _states_sdxl, _unconditional_sdxl, _predict_sdxl)
FAMILIES = {"StableDiffusionPipeline": SD, "StableDiffusionXLPipeline": SDXL}
