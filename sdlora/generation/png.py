"""Pictures on disk: PNGs that carry their job as JSON, and as the text that A1111 and its kin read."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

import sdlora
from sdlora.errors import SdloraError
from sdlora.formats.atomic import replace_file
from sdlora.formats.numbers import short
from sdlora.formats.sources import name_of
from sdlora.generation.job import SCHEDULERS, Job
from sdlora.generation.prompts.tags import tag_of
from sdlora.generation.render import Picture
from sdlora.mixing.plan import as_dict, from_dict

CHUNK = "sdlora"


def save(picture: Picture, folder: Path) -> Path:
    """Write the picture as a PNG of a new name, counted up from those in the folder; never over another file."""
    text = PngInfo()
    told = {**asdict(picture.job), "loras": [as_dict(lora) for lora in picture.job.loras]}
    text.add_text(CHUNK, json.dumps({"version": sdlora.__version__, "job": told}))
    text.add_itxt("parameters", parameters(picture.job))
    return _written(picture.image, folder, f"seed{picture.job.seed}-{_words(picture.job.prompt)}", text)


def save_sheet(image: Image.Image, folder: Path, job: Job) -> Path:
    """Write a sheet of pictures, which carries no job of its own; job: one of theirs."""
    return _written(image, folder, f"sheet-seed{job.seed}-{_words(job.prompt)}", PngInfo())


def _written(image: Image.Image, folder: Path, name: str, text: PngInfo) -> Path:
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = _reserve(folder, name)
        try:
            replace_file(path, lambda partial: image.save(partial, "PNG", pnginfo=text))
        except OSError:
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SdloraError(f"no picture can be written to {folder} ({error.strerror}); give another folder") from error
    return path


def check_folder(folder: Path) -> None:
    """SdloraError where the folder for pictures is a file: better said before they are painted than after."""
    if folder.exists() and not folder.is_dir():
        raise SdloraError(f"{folder} is a file; give a folder for the pictures")


def read_job(path: Path) -> Job:
    """The job of a picture that sdlora made; SdloraError for any other file."""
    try:
        with Image.open(path) as image:
            told = json.loads(image.info[CHUNK])["job"]
        return Job(**{**told, "loras": tuple(map(from_dict, told["loras"]))})
    except (OSError, UnidentifiedImageError) as error:
        raise SdloraError(f"{path} is no readable picture; give a PNG that sdlora made") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SdloraError(f"{path} carries no sdlora settings; give a PNG that sdlora made") from error


def parameters(job: Job) -> str:
    """The job in the form A1111 writes and reads ("infotext"). Bytes of file names that are no text are spelled out."""
    lines = [" ".join([job.prompt, *(tag_of(lora, job.steps) for lora in job.loras if lora.on)])]
    if job.negative_prompt:
        lines.append(f"Negative prompt: {job.negative_prompt}")
    sampler = SCHEDULERS[job.scheduler][2] if job.scheduler in SCHEDULERS else "Automatic"
    fields = {
        "Steps": job.steps,
        "Sampler": sampler,
        "CFG scale": short(job.guidance_scale),
        "Seed": job.seed,
        "Size": f"{job.width}x{job.height}",
        "Model": name_of(Path(job.model)),
    }
    known_by = {re.sub("[:,]", "", name_of(Path(lora.path))): lora.autov3[:12] for lora in job.loras if lora.autov3}
    if known_by:
        fields["Lora hashes"] = ", ".join(f"{name}: {autov3}" for name, autov3 in known_by.items())
    fields["Version"] = f"sdlora {sdlora.__version__}"
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items()))
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _quoted(value: str) -> str:
    """As A1111 does: what would end a value or a line stands in quotes."""
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value


def _words(prompt: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40].strip("-") or "picture"


def _reserve(folder: Path, name: str) -> Path:
    """An empty file of a name that nobody else has: 0001-seed7-a-red-cat.png."""
    number = max((int(m[1]) for p in folder.glob("*.png") if (m := re.match(r"(\d{4,})-", p.name))), default=0) + 1
    while True:
        path = folder / f"{number:04d}-{name}.png"
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            return path
        except FileExistsError:
            number += 1
