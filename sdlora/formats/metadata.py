"""What a LoRA file says about itself: kohya's ss_* keys and the modelspec, which other programs show."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

# By architecture: kohya's ss_base_model_version, and the modelspec's architecture.
_BASES = {
    "sd1": ("sd_v1", "stable-diffusion-v1/lora"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512/lora"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
}
_BASE_NAMES = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
SHOWN_TAGS = 8
MOST_WORDS = 50  # of a trigger phrase
LONGEST = 200  # characters of one tag or name


@dataclass(frozen=True)
class TrainingFacts:
    """What is known of a training when its LoRA is written. settings: further ss_* values, without that prefix."""

    title: str
    model: str
    architecture: str
    dataset: str
    captions: tuple[str, ...]
    resolution: int
    prediction_type: str
    trigger: str | None
    step: int
    settings: Mapping[str, str | int | float | None]


def base_keys(architecture: str) -> dict[str, str]:
    """What the metadata says of the base model's architecture (its name here), {} for one that others do not know."""
    if architecture not in _BASES:
        return {}
    version, spec = _BASES[architecture]
    return {"ss_base_model_version": version, "ss_v2": str(architecture == "sd2"), "modelspec.architecture": spec}


def to_metadata(facts: TrainingFacts) -> dict[str, str]:
    """The metadata of a trained LoRA, all text, as safetensors wants it."""
    version, spec = _BASES.get(facts.architecture, ("", f"{Path(facts.model).name}/lora"))
    side = facts.resolution
    now = datetime.now(timezone.utc)
    shown = {
        "ss_output_name": facts.title,
        "ss_sd_model_name": facts.model,
        "ss_base_model_version": version,
        "ss_v2": str(facts.architecture == "sd2"),
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(len(facts.captions)),
        "ss_steps": str(facts.step),
        "ss_dataset_dirs": json.dumps({facts.dataset: {"n_repeats": 1, "img_count": len(facts.captions)}}),
        "ss_tag_frequency": json.dumps({facts.dataset: tag_frequency(facts.captions)}, ensure_ascii=False),
        **{f"ss_{name}": str(value) for name, value in facts.settings.items() if value is not None},
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.architecture": spec,
        "modelspec.title": facts.title,
        "modelspec.date": now.isoformat(timespec="seconds"),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if facts.prediction_type == "v_prediction" else facts.prediction_type,
        "modelspec.trigger_phrase": facts.trigger or "",
    }
    return {name: value for name, value in shown.items() if value}


def base_model(metadata: Mapping[str, str]) -> str:
    """The model that a LoRA was trained on as its metadata names it, "" where it does not. Shown, never followed."""
    names = (_shown(metadata.get(name, "")) for name in _BASE_NAMES)
    return next((name for name in names if name), "")


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """How often each part of the captions between commas occurs, the most frequent first."""
    tags = (tag.strip() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag).most_common())


def tags(metadata: Mapping[str, str]) -> dict[str, int]:
    """How often each tag stood in the captions of a training, the most frequent first; damaged metadata has none."""
    counts = Counter[str]()
    try:
        for folder in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            for tag, count in folder.items():
                counts[_shown(tag)] += int(count)
    except (ValueError, AttributeError, TypeError, RecursionError, OverflowError):
        return {}
    return {tag: count for tag, count in counts.most_common() if tag and count > 0}


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What to put into a prompt: the trigger phrase; else the tags that at least half of the pictures had.

    Damaged metadata says nothing: it is shown at most, never followed.
    """
    phrase = metadata.get("modelspec.trigger_phrase", "")
    if phrase.strip():
        words = (_shown(word) for word in phrase.split(",", MOST_WORDS)[:MOST_WORDS])
        return tuple(word for word in words if word)
    counts = tags(metadata)
    most = max(counts.values(), default=0)
    return tuple(tag for tag, count in list(counts.items())[:SHOWN_TAGS] if most > 1 and 2 * count >= most)


def _shown(text: str) -> str:
    """On one line, not endless, and without what moves a terminal's cursor or colours what follows."""
    text = text[: 2 * LONGEST]
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text.split())[:LONGEST]
