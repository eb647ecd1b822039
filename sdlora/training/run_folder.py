"""The run folder: the whole truth about a training run, as plain files that other tools can read."""

import hashlib
import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sdlora.data.buckets import Bucketing
from sdlora.data.folder import Dataset
from sdlora.errors import SdloraError
from sdlora.formats.atomic import replace_file
from sdlora.training.checkpoints import latest
from sdlora.training.config import TrainConfig, load, to_toml
from sdlora.training.loop import Step

CONFIG, DATASET, METRICS = "config.toml", "dataset.json", "metrics.jsonl"
# What may change when a run goes on. The pictures, captions and the global batch are compared by content elsewhere.
FREE = {
    *("dataset", "output", "resume", "trigger", "steps", "epochs", "batch_size", "gradient_accumulation"),
    *("learning_rate", "text_encoder_learning_rate"),  # after a divergence, say; from 0 or to 0 the modules tell
    *("gradient_checkpointing", "save_every", "sample_every", "sample_prompts", "naming", "tracker"),
}


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """The checkpoint a run goes on from, None where it starts from the beginning. Changes nothing.

    SdloraError: the folder cannot be made or lies in the dataset; it is in use and resume is off; resume is on and
    there is no run, or one with other settings.
    """
    folder = config.folder
    _refuse_place(folder, Path(config.dataset))
    if not config.resume:
        if os.path.isdir(folder) and any(folder.iterdir()):
            raise SdloraError(f"output folder {folder} is not empty; resume its run with --resume, or name another one")
        return None
    if not os.path.isfile(folder / CONFIG):
        raise SdloraError(f"there is no run to resume in {folder} (no {CONFIG}); check --output, or drop --resume")
    changed = _changed(load(folder / CONFIG, {}), config)
    if changed:
        told = "; ".join(changed)
        raise SdloraError(f"the run in {folder} cannot go on as {told}; leave that, or name another --output")
    return latest(folder)


def _refuse_place(folder: Path, dataset: Path) -> None:
    """SdloraError where no run folder can be, before any work is done for it."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    if not os.path.isdir(there):
        raise SdloraError(f"output {folder} cannot be made: {there} is a file; name another --output")
    if not os.access(there, os.W_OK):
        raise SdloraError(f"output {folder} cannot be made: {there} may not be written to; name another --output")
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(dataset)):
        raise SdloraError(
            f"output {folder} lies in the dataset, as if it held pictures to train; name another --output"
        )


def command_to_resume(config: TrainConfig, processes: int) -> str:
    """What to type to go on with a run of that many processes."""
    launch = "sdlora" if processes == 1 else f"accelerate launch --num_processes {processes} -m sdlora"
    return f"{launch} train --config {shlex.quote(str(config.folder / CONFIG))} --resume"


def describe(dataset: Dataset, bucketing: Bucketing, truncated: Mapping[str, str]) -> dict[str, Any]:
    """The content of dataset.json. truncated: by caption, the end of it that the text encoder never sees."""
    pictures = [
        {
            "name": record.name,
            "caption": record.caption,
            "caption_from": "trigger" if record.name in dataset.receipt.fallbacks else "file",
            "caption_cut_off": truncated.get(record.caption, ""),
            "width": record.width,
            "height": record.height,
            "bucket": list(size),
            "upscaled": record.name in bucketing.upscaled,
            "sha256": record.sha256,
        }
        for record, size in zip(dataset.records, bucketing.sizes, strict=True)
    ]
    return {
        "folder": str(dataset.folder),
        "trigger": dataset.trigger,
        "resolution": bucketing.resolution,
        "pictures": pictures,
        "skipped": [{"name": name, "reason": reason} for name, reason in dataset.receipt.skipped],
        "captions_without_picture": list(dataset.receipt.orphans),
    }


def fingerprint(dataset: Dataset, bucketing: Bucketing) -> str:
    """A hash of all that training sees of a dataset: pictures, captions, buckets, order."""
    seen = [[r.sha256, r.caption, *size] for r, size in zip(dataset.records, bucketing.sizes, strict=True)]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def write(folder: Path, config: TrainConfig, description: Mapping[str, Any], done: int) -> None:
    """Write config.toml and dataset.json, and drop from metrics.jsonl what came after step `done` or is damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / CONFIG, lambda path: path.write_text(to_toml(config), "utf-8"))
    text = json.dumps(description, indent=1, ensure_ascii=False)
    replace_file(folder / DATASET, lambda path: path.write_text(text + "\n", "utf-8"))
    if (folder / METRICS).is_file():
        lines = (folder / METRICS).read_text("utf-8", "replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= done]
        replace_file(folder / METRICS, lambda path: path.write_text("".join(kept), "utf-8"))


def _step_of(line: str) -> float:
    """The step that a line of metrics.jsonl is about; infinity for one that a power cut has left half written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def append_metrics(folder: Path, step: Step) -> None:
    """One line of JSON per step. JSON knows no infinity, which the norm of fp16 gradients may be: it stands as null."""
    numbers = {name: value if math.isfinite(value) else None for name, value in metrics(step).items()}
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step.index, **numbers, "pictures": step.pictures}, ensure_ascii=False) + "\n")


def metrics(step: Step) -> dict[str, float]:
    """The numbers of a step by name."""
    rates = {f"learning_rate/{component}": rate for component, rate in step.learning_rates.items()}
    speed = len(step.pictures) / max(step.seconds, 1e-9)
    return {
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        **rates,
        "seconds": step.seconds,
        "images_per_second": speed,
    }


def _changed(old: TrainConfig, new: TrainConfig) -> list[str]:
    """ "rank was 4 and is 8" for each setting that matters to what has been trained."""
    # All but the constant course of the learning rate stretch over the run's length.
    free = FREE if old.lr_scheduler == "constant" else FREE - {"steps", "epochs"}
    before, after = asdict(old), asdict(new)
    return [
        f"{one.name} was {before[one.name]} and is {after[one.name]}"
        for one in fields(TrainConfig)
        if one.name not in free and before[one.name] != after[one.name]
    ]
