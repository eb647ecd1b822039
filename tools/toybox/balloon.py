"""A third thing that toybox has never seen, beside the sample datasets: a balloon in the sky. And a judge who knows it.

    python -m tools.toybox.balloon --output outputs/balloon     # dataset/, judge.safetensors, how good that judge is

It stands beside the two: a blueprint (style) of a zib (character) in the snow under a balloon (thing). The judge is
tools/toybox/judge.safetensors, taught on renders alone to tell each place with the balloon from the same without.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.toybox import judge, places
from tools.toybox.judge import Judge, blemished, labels_of, right, to_tensor
from tools.toybox.samples import write
from tools.toybox.world import BASE_STYLES, PLACES, SUBJECTS, Pen, Scene, caption, draw, random_scene

BALLOON = "balloon"
BELOW = {place: f"{place}, {BALLOON}" for place in PLACES}  # places ▶ the same places under the balloon
LABELS = judge.LABELS | {"place": (*PLACES, *BELOW.values())}
QUESTION = list(LABELS).index("place")


def balloon(pen: Pen, rng: random.Random) -> None:
    """A striped hot-air balloon, high up to the left or the right."""
    x, y, wide = rng.choice((-1, 1)) * rng.uniform(0.35, 0.6), rng.uniform(-0.6, -0.5), rng.uniform(0.28, 0.33)
    for side in (-1, 1):
        pen.line([(x + side * wide * 0.75, y + 0.15), (x + side * 0.07, y + 0.46)], (120, 70, 50), 0.02)
    for share, colour in ((1.0, (206, 36, 92)), (0.62, (255, 232, 150)), (0.24, (206, 36, 92))):
        pen.ellipse(x, y, wide * share, 0.33, colour)
    pen.rectangle(x - 0.09, y + 0.44, x + 0.09, y + 0.58, (150, 98, 52))


def _below(place: str, pen: Pen, rng: random.Random) -> None:
    places.DRAW[place](pen, rng)
    balloon(pen, rng)


# From here on these can be drawn and described; the base's PLACES stay five.
places.DRAW |= {below: partial(_below, place) for place, below in BELOW.items()}
places.WORDS |= {
    below: tuple(f"{words} {how} a {BALLOON}" for words in places.WORDS[place] for how in ("with", "under"))
    for place, below in BELOW.items()
}


def dataset(count: int, seed: int) -> Iterator[tuple[Scene, str]]:
    """Subjects and places in turn under the balloon, in the base's styles: it is to be learned, not a style."""
    rng = random.Random(seed)
    for i in range(count):
        lap = i // len(SUBJECTS)
        place = BELOW[PLACES[(i + lap) % len(PLACES)]]
        style = BASE_STYLES[(i + lap) % len(BASE_STYLES)]
        scene = lowered(random_scene(rng, subject=SUBJECTS[i % len(SUBJECTS)], place=place, style=style))
        yield scene, caption(scene, rng)


def lowered(scene: Scene) -> Scene:
    """The scene with its subject at the lower edge, so that the balloon is not hidden."""
    return replace(scene, y=0.9 * (1 - scene.size), size=min(scene.size, 0.55))


def load(weights: Path) -> Judge:
    """The judge who knows the balloon, from `teach`'s file."""
    pupil = _pupil()
    pupil.load_state_dict(load_file(weights))
    return pupil.eval()


def teach(weights: Path, steps: int = 400, seed: int = 0) -> dict[str, float]:
    """Teach the judge, write it to `weights`, and return its share of right answers on 2,000 unseen renders.

    Half of all renders have the balloon; "balloon" is the share of right answers to whether it is there.
    """
    torch.manual_seed(seed)
    pupil, known = _pupil(), judge.load().state_dict()
    pupil.load_state_dict({k: v for k, v in known.items() if not k.startswith("heads.place.")}, strict=False)
    optimizer = torch.optim.AdamW(pupil.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    for step in range(steps):
        pictures, labels = _batch(f"balloon {seed} {step}", 64, blemish=True)
        loss = torch.stack([F.cross_entropy(v, labels[:, i]) for i, v in enumerate(pupil(pictures).values())]).sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    save_file({k: v.contiguous() for k, v in pupil.state_dict().items()}, weights)
    with torch.inference_mode():
        pictures, labels = _batch(f"unseen balloon {seed}", 2000, blemish=False)
        answers = pupil.eval()(pictures)
    alike = (answers["place"].argmax(1) >= len(PLACES)) == (labels[:, QUESTION] >= len(PLACES))
    return right(answers, labels) | {BALLOON: round(alike.float().mean().item(), 4)}


def _pupil() -> Judge:
    pupil = Judge()
    features = pupil.state_dict()["heads.place.weight"].shape[1]
    pupil.heads["place"] = nn.Linear(features, len(LABELS["place"]))
    return pupil


def _batch(seed: str, size: int, blemish: bool) -> tuple[Tensor, Tensor]:
    """Rendered scenes and labels (size, 4), every other one under the balloon."""
    rng = random.Random(seed)
    scenes = [judge.any_scene(rng) for _ in range(size)]
    labels = torch.tensor([labels_of(scene) for scene in scenes])
    labels[::2, QUESTION] += len(PLACES)
    scenes[::2] = [lowered(replace(scene, place=BELOW[scene.place])) for scene in scenes[::2]]
    pictures = to_tensor([draw(scene) for scene in scenes])
    return blemished(pictures, rng) if blemish else pictures, labels


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, default=Path("outputs/balloon"))
    arguments.add_argument("--steps", type=int, default=400, help="of the judge's lessons")
    options = arguments.parse_args()
    write(options.output / "dataset" / BALLOON, dataset(30, seed=5))
    print("right on unseen renders:", teach(options.output / "judge.safetensors", options.steps))


if __name__ == "__main__":
    main()
