"""What a training run is told: one frozen dataclass, the source for flags, TOML keys, widgets and their help."""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sdlora.errors import SdloraError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OPTIMIZERS = ("adamw", "adam", "sgd", "adafactor", "adamw8bit", "prodigy")
# Accelerate's, by its names.
TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio", "none")
SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")


def setting(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its help text and, in its metadata, bounds: min, max, above (exclusive), multiple, choices."""
    return field(default=default, metadata={"help": help, **bounds})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run. Values out of bounds or of the wrong type raise SdloraError."""

    dataset: str = field(metadata={"help": "folder of pictures with captions in .txt files of the same name"})
    model: str = setting("toybox", "base model: toybox, a diffusers folder, a .safetensors file or a hub id")
    output: str = setting("", "run folder; its name becomes the LoRA's (empty: outputs/ and the dataset's name)")
    resume: bool = setting(False, "continue the run in the output folder from its last checkpoint")
    trigger: str | None = setting(None, "phrase that stands in for missing captions; recorded in the LoRA")

    rank: int = setting(16, "inner size of each LoRA pair", min=1)
    alpha: float = setting(16.0, "the LoRA is scaled by alpha / rank", above=0)
    targets: tuple[str, ...] = setting(
        ("attention",), "modules to train: attention, attention+ff, linear, all, or patterns of module paths"
    )
    dropout: float = setting(0.0, "share of a LoRA layer's inputs dropped in training", min=0, below=1)

    learning_rate: float = setting(1e-4, "peak learning rate of the UNet's LoRA", above=0)
    text_encoder_learning_rate: float = setting(
        0.0, "peak learning rate of the text encoders' LoRA; 0 leaves them untrained", min=0
    )
    steps: int = setting(1000, "optimizer steps", min=1)
    epochs: int | None = setting(None, "passes over the pictures, in place of steps", min=1)
    batch_size: int = setting(1, "pictures per process and forward pass", min=1)
    gradient_accumulation: int = setting(1, "forward passes per optimizer step", min=1)
    optimizer: str = setting("adamw", "how gradients become updates", choices=OPTIMIZERS)
    weight_decay: float = setting(0.01, "decoupled weight decay (L2 penalty for adam and sgd)", min=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0 does not clip", min=0)
    lr_scheduler: str = setting("constant", "course of the learning rate", choices=SCHEDULES)
    warmup_steps: int = setting(0, "steps over which the learning rate first rises from 0", min=0)

    resolution: int | None = setting(
        None, "edge in pixels of a square picture, others get its area (default: the model's own)", min=16, multiple=8
    )
    seed: int = setting(0, "the run is a function of it: order, noise, initial weights", min=0, max=2**63 - 1)
    mixed_precision: str = setting("no", "number format of the forward pass", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, slower")
    caption_dropout: float = setting(0.0, "share of samples trained with an empty caption", min=0, max=1)
    noise_offset: float = setting(0.0, "strength of noise that a whole channel shares, for dark or light styles", min=0)
    min_snr_gamma: float | None = setting(
        None, "min-SNR loss weighting (arXiv:2303.09556), usually 5; none: unweighted", above=0
    )

    save_every: int = setting(200, "steps between checkpoints; 0 saves only at the end", min=0)
    sample_every: int = setting(0, "steps between sample pictures; 0 makes none", min=0)
    sample_prompts: tuple[str, ...] = setting((), "prompts of the sample pictures (none: the first captions)")
    naming: str = setting("kohya", "key names in LoRA files", choices=("kohya", "diffusers"))
    tracker: str = setting("tensorboard", "where metrics go beside metrics.jsonl", choices=TRACKERS)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, _checked(name, value))
        if not self.dataset:
            raise SdloraError("no dataset is given; name a folder of pictures")
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            raise SdloraError("prodigy finds the rate itself and multiplies it by learning_rate; give learning_rate 1")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output) if self.output else Path("outputs") / (Path(self.dataset).resolve().name or "run")


def load(path: Path | None, flags: Mapping[str, Any]) -> TrainConfig:
    """The config of a TOML file (None: of nothing), with flags winning over it.

    Unknown keys and values of the wrong type raise SdloraError; so do steps and epochs given side by side.
    """
    told = dict(_parsed(path)) if path else {}
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if flags.get(one) is not None:
            told.pop(other, None)
    told |= flags
    if told.get("steps") is not None and told.get("epochs") is not None:
        raise SdloraError("steps and epochs are both given; give one of them")
    source = f"config {path}: " if path else ""
    for name in told:
        if name not in TrainConfig.__dataclass_fields__:
            raise SdloraError(f"{source}unknown key {name!r}{nearest(name, TrainConfig.__dataclass_fields__)}")
    try:
        return TrainConfig(**{"dataset": "", **told})
    except SdloraError as error:
        raise SdloraError(f"{source}{error}") from error


def to_toml(config: TrainConfig) -> str:
    """The config as TOML with each key's help above it; `load` gives it back. What is not set is left out."""
    unset = {"resume", "steps" if config.epochs else "epochs"}
    lines = []
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name not in unset and value is not None:
            lines += [f"# {one.metadata['help']}", f"{one.name} = {_toml(value)}"]
    return "\n".join(lines) + "\n"


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SdloraError(f"config {path} cannot be read ({error.strerror}); check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SdloraError(f"config {path} is not TOML ({error}); mend that place") from error


def _checked(name: str, value: Any) -> Any:
    """The value in its field's type, within its bounds."""
    bounds = TrainConfig.__dataclass_fields__[name].metadata
    hint = _hints()[name]
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    value = _typed(name, value, hint)
    for bound, (broken, words) in _BOUNDS.items():
        if bound in bounds and broken(value, bounds[bound]):
            raise SdloraError(f"{name} is {value!r}; it must be {words} {_words(bounds[bound])}")
    return value


_BOUNDS: Mapping[str, tuple[Callable[[Any, Any], bool], str]] = {
    "min": (lambda value, bound: value < bound, "at least"),
    "max": (lambda value, bound: value > bound, "at most"),
    "above": (lambda value, bound: value <= bound, "above"),
    "below": (lambda value, bound: value >= bound, "below"),
    "multiple": (lambda value, bound: value % bound != 0, "a multiple of"),
    "choices": (lambda value, bound: value not in bound, "one of"),
}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as bool, int, float, str or tuple of texts; a whole number may stand for a number, nothing else."""
    if get_origin(kind) is tuple:
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise SdloraError(f"{name} is {value!r}; it must be a text or a list of texts")
    if kind is str and isinstance(value, Path):
        return str(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise SdloraError(f"{name} is {value!r}; it must be {_KINDS[kind]}")
    return value


def _words(bound: Any) -> str:
    return ", ".join(bound) if isinstance(bound, tuple) else str(bound)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    # A JSON string is a TOML string, but for this one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
