"""The demo: a style and a character are trained on toybox, and a sheet shows how sliders blend them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdlora.errors import SdloraError
from sdlora.generation.job import Job, LoraWeight
from sdlora.generation.open import open_mixer
from sdlora.generation.render import Picture, render
from sdlora.generation.sheet import sheet
from sdlora.mixing.mixer import Mixer
from sdlora.training.config import TrainConfig
from sdlora.training.run import run_training


@dataclass(frozen=True)
class Lesson:
    """How one of the two LoRAs is trained; the trigger is also the name of its dataset."""

    trigger: str
    steps: int
    learning_rate: float
    text_encoder_learning_rate: float


# A style changes every picture, so the UNet learns most of it; a character hangs on its name, so the text encoder
# learns more of it, and the UNet little enough that it does not paint one unasked.
STYLE = Lesson("blueprint", 500, 1.5e-3, 5e-4)
CHARACTER = Lesson("zib", 1100, 1.1e-3, 2e-3)
BLEND = (1.0, 1.0)  # weights of style and character at which both show
LADDER = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
SEED = 7
GUIDANCE_SCALE = 3.0  # of toybox with LoRAs; more makes its flat colours glare

Weights = tuple[float, float]  # of style and character
Row = tuple[str, Sequence[tuple[str, Weights]]]  # a prompt, and labelled weights to paint it with

COLUMNS = (("base", (0.0, 0.0)), ("style 1.0", (1.0, 0.0)), ("character 1.0", (0.0, 1.0)))
BOTH = (*COLUMNS, ("style {} + character {}".format(*BLEND), BLEND))
ROWS: tuple[Row, ...] = (
    ("a blueprint of a zib on a beach", BOTH),
    ("a blueprint of a zib in the city", BOTH),
    ("a blueprint of a zib in the snow", BOTH),
    ("a blueprint of a boat at the beach", [(f"style {weight}", (weight, 0.0)) for weight in LADDER]),
    ("a zib in a meadow", [(f"character {weight}", (0.0, weight)) for weight in LADDER]),
)


def run_demo(datasets: Path, output: Path) -> Path:
    """Train both LoRAs into output/style and output/character, draw output/sheet.png and return its path.

    Runs that are there already go on where they stopped, so a second demo only draws the sheet.
    """
    loras = (
        train(STYLE, datasets, output / "style"),
        train(CHARACTER, datasets, output / "character"),
    )
    mixer = open_mixer("toybox")
    rows = [_painted(mixer, loras, row) for row in ROWS]
    path = output / "sheet.png"
    sheet(rows).save(path)
    return path


def train(lesson: Lesson, datasets: Path, output: Path) -> Path:
    """Train one LoRA as the demo does, and return its path."""
    dataset = datasets / lesson.trigger
    if not dataset.is_dir():
        raise SdloraError(f"no sample dataset at {dataset}; run the demo in the project's folder, or give --datasets")
    config = TrainConfig(
        dataset=str(dataset),
        output=str(output),
        resume=output.is_dir() and any(output.iterdir()),
        trigger=lesson.trigger,
        rank=16,
        alpha=16,
        learning_rate=lesson.learning_rate,
        text_encoder_learning_rate=lesson.text_encoder_learning_rate,
        steps=lesson.steps,
        batch_size=4,
        lr_scheduler="cosine",
        warmup_steps=10,
        min_snr_gamma=5,
        tracker="none",
    )
    return run_training(config)


def _painted(mixer: Mixer, loras: tuple[Path, Path], row: Row) -> tuple[str, list[tuple[str, Image.Image]]]:
    prompt, cells = row
    return prompt, [(label, _picture(mixer, prompt, loras, weights)) for label, weights in cells]


def _picture(mixer: Mixer, prompt: str, loras: tuple[Path, Path], weights: Weights) -> Image.Image:
    held = [
        LoraWeight(path=str(path), unet=weight, text_encoder=weight)
        for path, weight in zip(loras, weights, strict=True)
        if weight
    ]
    job = Job(prompt=prompt, loras=tuple(held), guidance_scale=GUIDANCE_SCALE, seed=SEED)
    return next(event.image for event in render(mixer, job) if isinstance(event, Picture))
