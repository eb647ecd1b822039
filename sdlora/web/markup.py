"""The few pieces of HTML that the app writes itself. Whatever comes from files or people is escaped here."""

from html import escape
from pathlib import Path

from sdlora.generation.job import Job

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


def trigger_words(words: tuple[str, ...], remark: str) -> str:
    """What a LoRA wants to see in the prompt, and what its receipt says."""
    chips = "".join(f'<span class="chip">{escape(word)}</span>' for word in words)
    said = f"trigger words {chips}" if chips else "no trigger words in the file"
    return f'<p class="remark">{said} &middot; {escape(remark)}</p>'


def settings(job: Job, file: str) -> str:
    """All settings of a picture."""
    loras = ", ".join(f"{Path(lora.path).stem} {lora.unet:g}" for lora in job.loras)
    rows = {
        "prompt": job.prompt,
        "negative prompt": job.negative_prompt,
        "LoRAs": loras or "none",
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


def caption(job: Job) -> str:
    """A picture's settings in a line (plain text; the gallery escapes it)."""
    loras = [f"{Path(lora.path).stem} {lora.unet:g}" for lora in job.loras]
    return " · ".join([f"seed {job.seed}", *loras])
