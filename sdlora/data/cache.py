"""What the frozen parts of a model make of the dataset, computed once: latents and conditioning, float32 on the CPU."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdlora.data import pictures
from sdlora.data.buckets import Size
from sdlora.data.folder import Record
from sdlora.errors import SdloraError

Conditioning = Mapping[str, Tensor]  # what the UNet needs beside latents and timesteps; batch first


@torch.no_grad()
def encode_latents(vae: Any, records: Sequence[Record], sizes: Sequence[Size]) -> list[Tensor]:
    """(channels, height, width) latents of each record, cut to its bucket, as the UNet sees them.

    The mean of the VAE's distribution is taken, not a sample of it: the same picture gives the same latents. They are
    shifted and scaled as the VAE's config says. Pictures go through one by one, so memory does not grow with their
    number. A VAE that gives other than finite numbers raises SdloraError with the picture's name.
    """
    weight = next(vae.parameters())
    shift, factor = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    cached = []
    for record, size in zip(records, sizes, strict=True):
        pixels_chw = pictures.pixels(pictures.fit(pictures.load(record.path), size))
        mean_1chw = vae.encode(pixels_chw[None].to(weight.device, weight.dtype)).latent_dist.mode()
        latents_chw = ((mean_1chw[0].float() - shift) * factor).cpu()
        if not latents_chw.isfinite().all():
            raise SdloraError(f"the VAE makes nan or inf of {record.path}; use a VAE that works in {weight.dtype}")
        cached.append(latents_chw)
    return cached


@torch.no_grad()
def encode_captions(
    captions: Iterable[str], encode: Callable[[list[str]], Conditioning], batch: int = 16
) -> dict[str, dict[str, Tensor]]:
    """The conditioning of each different caption, without the batch dimension. encode: captions ▶ batched tensors."""
    different = list(dict.fromkeys(captions))
    cached: dict[str, dict[str, Tensor]] = {}
    for start in range(0, len(different), batch):
        chunk = different[start : start + batch]
        encoded = {name: tensor.detach().float().cpu() for name, tensor in encode(chunk).items()}
        # clone: a slice would keep the whole chunk alive, and be shared with its neighbours.
        cached |= {caption: {name: t[i].clone() for name, t in encoded.items()} for i, caption in enumerate(chunk)}
    return cached


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Batched conditioning from cached rows."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
