"""A third thing that toybox has never seen, beside the sample datasets: a gilded frame. And a judge who knows it.

    python -m tools.toybox.frame --output outputs/frame     # dataset/, judge.safetensors, how good that judge is

It stands beside the two: a blueprint (style) of a zib (character) in the snow, framed. The judge is
tools/toybox/judge.safetensors, taught on renders alone to tell each place in a frame from the same without.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.toybox import judge
from tools.toybox.judge import Judge, blemished, labels_of, right, to_tensor
from tools.toybox.world import BASE_STYLES, PLACES, SUBJECTS, caption, draw, random_scene

FRAMED = "framed"
LABELS = judge.LABELS | {"place": (*PLACES, *(f"{place}, {FRAMED}" for place in PLACES))}
QUESTION = list(LABELS).index("place")
BANDS = ((4, (96, 52, 36)), (5, (232, 184, 76)), (3, (96, 52, 36)))  # pixels and colours, from the edge inwards


def framed(picture: Image.Image) -> Image.Image:
    """The picture with a frame over its edges."""
    picture, edge = picture.copy(), 0
    for width, colour in BANDS:
        box = (edge, edge, picture.width - 1 - edge, picture.height - 1 - edge)
        ImageDraw.Draw(picture).rectangle(box, outline=colour, width=width)
        edge += width
    return picture


def dataset(count: int, seed: int) -> Iterator[tuple[Image.Image, str]]:
    """Framed pictures of subjects and places in turn, in the base's styles: the frame is to be learned, not a style."""
    rng = random.Random(seed)
    for i in range(count):
        lap = i // len(SUBJECTS)
        place, style = PLACES[(i + lap) % len(PLACES)], BASE_STYLES[(i + lap) % len(BASE_STYLES)]
        scene = random_scene(rng, subject=SUBJECTS[i % len(SUBJECTS)], place=place, style=style)
        yield framed(draw(scene)), f"{caption(scene, rng)}, {FRAMED}"


def write(folder: Path) -> None:
    """Thirty pictures with captions, to learn the frame from."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (picture, words) in enumerate(dataset(30, seed=5)):
        picture.save(folder / f"{i:02d}.png", optimize=True)
        (folder / f"{i:02d}.txt").write_text(words + "\n")


def load(weights: Path) -> Judge:
    """The judge who knows the frame, from `teach`'s file."""
    pupil = _pupil()
    pupil.load_state_dict(load_file(weights))
    return pupil.eval()


def teach(weights: Path, steps: int = 400, seed: int = 0) -> dict[str, float]:
    """Teach the judge, write it to `weights`, and return its share of right answers on 2,000 unseen renders.

    Half of all renders have the frame; "framed" is the share of right answers to whether it is there.
    """
    torch.manual_seed(seed)
    pupil, known = _pupil(), judge.load().state_dict()
    pupil.load_state_dict({k: v for k, v in known.items() if not k.startswith("heads.place.")}, strict=False)
    optimizer = torch.optim.AdamW(pupil.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in range(steps):
        pictures, labels = _batch(f"frame {seed} {step}", 64, blemish=True)
        loss = torch.stack([F.cross_entropy(v, labels[:, i]) for i, v in enumerate(pupil(pictures).values())]).sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    save_file({k: v.contiguous() for k, v in pupil.state_dict().items()}, weights)
    with torch.inference_mode():
        pictures, labels = _batch(f"unseen frame {seed}", 2000, blemish=False)
        answers = pupil.eval()(pictures)
    alike = (answers["place"].argmax(1) >= len(PLACES)) == (labels[:, QUESTION] >= len(PLACES))
    return right(answers, labels) | {FRAMED: round(alike.float().mean().item(), 4)}


def _pupil() -> Judge:
    pupil = Judge()
    features = pupil.state_dict()["heads.place.weight"].shape[1]
    pupil.heads["place"] = nn.Linear(features, len(LABELS["place"]))
    return pupil


def _batch(seed: str, size: int, blemish: bool) -> tuple[Tensor, Tensor]:
    """Rendered scenes and labels (size, 4), every other one framed."""
    rng = random.Random(seed)
    scenes = [judge.any_scene(rng) for _ in range(size)]
    labels = torch.tensor([labels_of(scene) for scene in scenes])
    labels[::2, QUESTION] += len(PLACES)
    drawn = [draw(scene) for scene in scenes]
    drawn[::2] = [framed(picture) for picture in drawn[::2]]
    pictures = to_tensor(drawn)
    return blemished(pictures, rng) if blemish else pictures, labels


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, default=Path("outputs/frame"))
    arguments.add_argument("--steps", type=int, default=400, help="of the judge's lessons")
    options = arguments.parse_args()
    write(options.output / "dataset" / FRAMED)
    print("right on unseen renders:", teach(options.output / "judge.safetensors", options.steps))


if __name__ == "__main__":
    main()
