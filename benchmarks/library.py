"""How long a scan of 1,000 LoRA files takes, in fresh processes: all of them new, then none of them changed.

    python -m benchmarks.library [FILES]

The files have the headers of a mixed library (SD 1.x and SDXL as kohya writes them, some LoCon and LoHa, with tags in
the metadata) and holes where the numbers would be, so that they take next to no disk. A first library has six ranks, as
people choose them; in a second, the hardest there can be, each module of each file has a rank of its own, as after a
resize, so that no two headers are alike. Processor time is what counts where the machine has other work.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

from sdlora.formats.architectures import Architecture, sd1, sdxl
from sdlora.formats.names import kohya, original_unet

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out")
ENCODER = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")
RANKS = (4, 8, 16, 32, 64, 128)
# Share of the library: architecture, law, whether the text encoders are trained, whether convolutions are.
KINDS = (
    (0.45, sd1, "lora", True, False),
    (0.05, sd1, "loha", True, False),
    (0.05, sd1, "lora", True, True),
    (0.20, sdxl, "lora", False, False),
    (0.20, sdxl, "lora", True, False),
    (0.05, sdxl, "lora", False, True),
)
SCAN = """
import sys
from pathlib import Path
from sdlora.formats.library import scan
found = scan([Path(sys.argv[1])], Path(sys.argv[2]))
assert "torch" not in sys.modules
print(len(found), sum(one.problem == "" for one in found))
"""


def main(files: int = 1000) -> None:
    print(f"| {files:,} files | seconds | of the processor | described |\n|---|---|---|---|")
    for library, own in (("six ranks", False), ("a rank for each module", True)):
        with tempfile.TemporaryDirectory() as place:
            make_library(Path(place, "library"), files, own)
            for state in ("new", "unchanged"):
                print(f"| {library}, {state} | {' | '.join(_scanned(Path(place)))} |", flush=True)


def _scanned(place: Path) -> tuple[str, str, str]:
    """Seconds of a fresh process from its start to its end, those of the processor, and what came out."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    told = subprocess.run(
        [sys.executable, "-c", SCAN, place / "library", place / "cache.json"], capture_output=True, text=True
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if told.returncode:
        sys.exit(told.stderr)
    found, described = told.stdout.split()
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{wall:.2f}", f"{spent:.2f}", f"{described} of {found}"


def make_library(folder: Path, files: int, own: bool = False) -> None:
    """Write about `files` files, in the shares of KINDS. own: a rank for each module of each file, not for each file"""
    draw = random.Random(0)
    for kind, (share, architecture, law, encoders, convolutions) in enumerate(KINDS):
        (folder / f"kind {kind}").mkdir(parents=True)
        modules = dict(_modules(architecture(), encoders, convolutions))
        for i in range(round(share * files)):
            one = draw.choice(RANKS)
            ranks = {name: draw.randint(1, 128) if own else one for name in modules}
            tensors = dict(_tensors(modules, law, ranks))
            _write(folder / f"kind {kind}" / f"{i:04}.safetensors", tensors, _metadata(draw, architecture().name))


def _modules(architecture: Architecture, encoders: bool, convolutions: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names that kohya gives to the modules, those of SDXL as the original code calls them, and their shapes."""
    original = original_unet([*architecture.shapes, *architecture.norms])
    names = kohya(architecture.shapes)
    for path, shape in architecture.shapes.items():
        unet = path.startswith("unet.")
        if unet and architecture.name == "sdxl":
            names[path] = "lora_unet_" + original[path].replace(".", "_")
        convolution = ".resnets." in path and ".conv" in path
        if (path.endswith(ATTENTION) and unet) or (unet and convolutions and convolution):
            yield names[path], shape
        elif encoders and path.endswith(ENCODER) and not unet:
            yield names[path], shape


def _tensors(
    modules: dict[str, tuple[int, ...]], law: str, ranks: dict[str, int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, (out, into, *kernel) in modules.items():
        rank = ranks[name]
        yield f"{name}.alpha", ()
        if law == "loha":
            for factor in ("hada_w1", "hada_w2"):
                yield f"{name}.{factor}_a", (out, rank)
                yield f"{name}.{factor}_b", (rank, into * prod(kernel))
        else:
            yield f"{name}.lora_down.weight", (rank, into, *kernel)
            yield f"{name}.lora_up.weight", (out, rank, *(1 for _ in kernel))


def _metadata(draw: random.Random, architecture: str) -> dict[str, str]:
    tags = {f"tag {draw.randrange(10**6)}": draw.randrange(1, 200) for _ in range(300)}
    return {
        "ss_base_model_version": "sdxl_base_v1-0" if architecture == "sdxl" else "sd_v1",
        "ss_sd_model_name": f"{architecture}.safetensors",
        "ss_tag_frequency": json.dumps({"10_pictures": tags}),
        **{f"ss_setting_{i}": str(draw.random()) for i in range(60)},
    }


def _write(path: Path, tensors: dict[str, tuple[int, ...]], metadata: dict[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, shape in sorted(tensors.items()):
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
