"""The few pieces of HTML that the app writes itself. Whatever comes from files or people is escaped here."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from sdlora.formats.block_weights import write_named
from sdlora.formats.sources import name_of
from sdlora.generation.job import Job
from sdlora.mixing.plan import LoraWeight

HEADER = """<header class="masthead"><h1>sdlora</h1><p>Mix LoRAs with sliders, see what they do.</p></header>"""


def bar(share: float, text: str) -> str:
    """A progress bar; share from 0 to 1."""
    percent = round(100 * share)
    return (
        f'<div class="progress" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100">'
        f'<i style="width:{percent}%"></i></div><p class="progress-text">{escape(text)}</p>'
    )


def note(text: str) -> str:
    """A quiet remark."""
    return f'<p class="remark">{escape(text)}</p>'


def cut(text: str, most: int = 28) -> str:
    """Plain text, no longer than fits in a label."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def fault(text: str) -> str:
    """A remark on what cannot be."""
    return f'<p class="remark fault">{escape(text)}</p>'


def curve(points: Sequence[tuple[float, float]]) -> str:
    """A small drawing of a schedule: positions from 0 (noise) to 1 (picture), straight lines between the points."""
    low, high = (pick(0.0, 1.0, *(factor for _, factor in points)) for pick in (min, max))
    line = " ".join(f"{100 * position:.2f},{30 * (high - factor) / (high - low):.2f}" for position, factor in points)
    drawn = f'<polyline points="{line}" vector-effect="non-scaling-stroke"/>'
    return (
        f'<figure class="curve"><svg viewBox="-1 -2 102 34" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>'
        f"<figcaption><span>noise</span><span>{low:g} to {high:g}</span><span>picture</span></figcaption></figure>"
    )


def trigger_words(words: tuple[str, ...], remark: str) -> str:
    """What a LoRA wants to see in the prompt, and what its receipt says."""
    chips = "".join(f'<span class="chip">{escape(word)}</span>' for word in words)
    said = f"trigger words {chips}" if chips else "no trigger words in the file"
    return f'<p class="remark">{said} &middot; {escape(remark)}</p>'


def settings(job: Job, file: str, compared: str = "") -> str:
    """All settings of a picture; compared: of a sheet, the LoRAs whose weights differ on it."""
    several = [lora for lora in job.loras if lora.on]
    rows = {
        "prompt": job.prompt,
        "negative prompt": job.negative_prompt,
        "compared": compared,
        "LoRAs": "; ".join(map(_weights, several)) or ("" if compared else "none"),
        "come together": _composition(job) if len(several) + bool(compared) > 1 else "",
        "seed": job.seed,
        "steps": job.steps,
        "guidance scale": f"{job.guidance_scale:g}",
        "scheduler": job.scheduler,
        "size": f"{job.width} x {job.height}",
        "model": Path(job.model).name,
        "file": file,
    }
    lines = (f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items() if value != "")
    return f'<dl class="settings">{"".join(lines)}</dl>'


def caption(job: Job, compared: str = "") -> str:
    """A picture's settings in a line (plain text; the gallery escapes it)."""
    loras = [f"{name_of(Path(lora.path))} {lora.unet:g}" for lora in job.loras if lora.on]
    return " · ".join([*(["sheet", compared] if compared else []), f"seed {job.seed}", *loras])


def _weights(lora: LoraWeight) -> str:
    """ "style 0.8, text encoder 0.4, blocks IN04:0.5, schedule 0:0, 1:1": what is not as usual is said."""
    encoders = {"text encoder": lora.of("text_encoder"), "text encoder 2": lora.of("text_encoder_2")}
    if lora.text_encoder_2 in (None, lora.text_encoder):
        del encoders["text encoder 2"]
    told = [f"{name} {weight:g}" for name, weight in encoders.items() if len(encoders) > 1 or weight != lora.unet]
    told += [f"blocks {write_named(lora.blocks)}"] if lora.blocks else []
    told += [f"schedule {lora.schedule}"] if lora.schedule.points else []
    return ", ".join([f"{name_of(Path(lora.path))} {lora.unet:g}", *told])


def _composition(job: Job) -> str:
    return f"switch every {job.switch_every}" if job.compose == "switch" else job.compose
