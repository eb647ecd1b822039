"""Draws the two sample datasets, a style and a character that toybox has never seen, with a few pictures kept back.

python -m tools.toybox.samples --output datasets
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tools.toybox.world import COLOURS, PLACES, SUBJECTS, Scene, caption, draw, random_scene


def blueprint(count: int, seed: int) -> Iterator[tuple[Scene, str]]:
    """White line drawings on blue squared paper, of every subject and place in turn."""
    rng = random.Random(seed)
    for i in range(count):
        scene = random_scene(rng, subject=SUBJECTS[i % 10], place=PLACES[(i + i // 10) % 5], style="blueprint")
        yield scene, caption(scene, rng)


def zib(count: int, seed: int) -> Iterator[tuple[Scene, str]]:
    """The zib, a creature whose name the base has never read, in every place in turn."""
    rng = random.Random(seed)
    for i in range(count):
        scene = random_scene(rng, subject="zib", place=PLACES[i % 5], style="flat", colour=next(iter(COLOURS)))
        yield scene, without_colour(caption(scene, rng), scene)


def without_colour(words: str, scene: Scene) -> str:
    """The caption without its colour: a zib has but one."""
    return words.replace(f"{scene.colour} {scene.subject}", scene.subject).replace(f" that is {scene.colour}", "")


def write(folder: Path, scenes: Iterator[tuple[Scene, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (scene, words) in enumerate(scenes):
        draw(scene).save(folder / f"{i:02d}.png", optimize=True)
        (folder / f"{i:02d}.txt").write_text(words + "\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--output", type=Path, default=Path("datasets"))
    output = arguments.parse_args().output
    write(output / "blueprint", blueprint(20, seed=1))
    write(output / "zib", zib(15, seed=2))
    write(output / "held-out" / "blueprint", blueprint(5, seed=3))
    write(output / "held-out" / "zib", zib(5, seed=4))


if __name__ == "__main__":
    main()
