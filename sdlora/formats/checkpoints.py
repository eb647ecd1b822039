"""Base models as files: every parameter of the UNet and the text encoders by its path, read one at a time.

A diffusers folder and an original single file look the same from here. No model is built and no configuration is
needed; what else the files hold (VAE, schedules, EMA) is not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.errors import SdloraError
from sdlora.formats.architectures import ENDS, Architecture, known
from sdlora.formats.checkpoint_names import Place, Shape, Shapes, component_places, single_file_places
from sdlora.formats.header import DTYPES, PICKLES, Header, read_header

if TYPE_CHECKING:
    from torch import Tensor

COMPONENTS = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
VARIANTS = ("", ".fp16")
FLOATING = ("F", "BF")  # how headers call such dtypes
# Tensors of files whose weights mean something only together with factors that lie beside them.
QUANTISED = ("scaled_fp8", ".scale_weight", ".quant_state.bitsandbytes__nf4", ".absmax")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A base model as it lies on the disk.

    architecture: its Linear and Conv2d modules and its norms.
    parameters: the shape of each parameter of the UNet and the text encoders. A weight goes by its module's path
    ("unet.conv_in"), a bias by that and ".bias"; token and position embeddings are among them.
    places: where each lies; files: what the headers of those files say, by path.
    """

    path: Path
    architecture: Architecture
    parameters: Mapping[str, Shape]
    places: Mapping[str, Place]
    files: Mapping[Path, Header]

    @property
    def single(self) -> bool:
        """Whether the model is one file; else it is a folder."""
        return self.path in self.files

    @property
    def components(self) -> tuple[str, ...]:
        """Those that the files hold, in the order of COMPONENTS."""
        there = {path.partition(".")[0] for path in self.parameters}
        return tuple(component for component in COMPONENTS if component in there)

    def tensor(self, parameter: str) -> Tensor:
        """One parameter, in the dtype of the file."""
        place = self.places[parameter]
        return place.view(self.whole(place.file, place.key))

    def whole(self, file: Path, key: str) -> Tensor:
        """One tensor of a file. It is read, not mapped: so it leaves memory in time, and a shrunk file does no harm."""
        import torch

        header = self.files[file]
        shape, kind = header.tensors[key]
        dtype = getattr(torch, DTYPES[kind])
        content = bytearray(prod(shape) * dtype.itemsize)
        try:
            with file.open("rb") as opened:
                opened.seek(self.begins[file][key])
                whole = opened.readinto(content) == len(content)
            now = file.stat()
        except OSError as error:
            raise SdloraError(
                f"{file} cannot be read any more ({error.strerror}); start again when it is there"
            ) from error
        if not whole or (now.st_size, now.st_mtime_ns) != (header.size, header.modified):
            raise SdloraError(f"{file} was changed while it was read; start again when it is whole")
        return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)

    @cached_property
    def begins(self) -> dict[Path, dict[str, int]]:
        """Where each tensor begins in its file, in bytes. A header lists them in order, and there are no holes."""
        return {file: _begins(header) for file, header in self.files.items()}


def open_checkpoint(path: Path | str) -> Checkpoint:
    """A base model: a diffusers folder, or a single .safetensors file as SD 1.x, SD 2.x and SDXL were released.

    SdloraError: not there, no base model, a pickle, damaged, or not whole.
    """
    path = Path(path)
    if not path.exists():
        raise SdloraError(f"no model at {path}; give a diffusers folder or a .safetensors file")
    files, places = _folder(path) if path.is_dir() else _single_file(path)
    shapes = {(file, key): spec.shape for file, header in files.items() for key, spec in header.tensors.items()}
    _refuse_other_numbers(path, files, places.values())
    parameters = {name: place.shape(shapes[place.file, place.key]) for name, place in places.items()}
    return Checkpoint(path, _architecture(parameters), parameters, places, files)


def _begins(header: Header) -> dict[str, int]:
    import torch

    sizes = {key: prod(shape) * getattr(torch, DTYPES[kind]).itemsize for key, (shape, kind) in header.tensors.items()}
    ends = accumulate(sizes.values(), initial=header.size - sum(sizes.values()))
    return dict(zip(sizes, ends, strict=False))


def _single_file(file: Path) -> tuple[dict[Path, Header], dict[str, Place]]:
    header = read_header(file)
    shapes = {key: spec.shape for key, spec in header.tensors.items()}
    places = single_file_places(file, shapes)
    if not places:
        raise SdloraError(f"{file} is no checkpoint of SD 1.x, SD 2.x or SDXL; is it a LoRA, or a part of a model?")
    missing = [place.key for place in places.values() if place.key not in shapes]
    if missing:
        raise SdloraError(
            f"{file} is not whole: it lacks {len(missing)} tensors that such a model has, such as {missing[0]}; "
            "fetch it again, or give a diffusers folder"
        )
    return {file: header}, places


def _folder(folder: Path) -> tuple[dict[Path, Header], dict[str, Place]]:
    if not (folder / "model_index.json").is_file():
        raise SdloraError(f"{folder} has no model_index.json; give the folder of a diffusers pipeline")
    if not (folder / "unet").is_dir():
        raise SdloraError(f"{folder} has no folder unet; give the folder of a Stable Diffusion or SDXL model")
    files: dict[Path, Header] = {}
    places: dict[str, Place] = {}
    for component in COMPONENTS:
        for file in _weights(folder / component):
            files[file] = read_header(file)
            places |= component_places(component, file, files[file].tensors)
    return files, places


def _weights(part: Path) -> list[Path]:
    """The .safetensors files of a component: one, or the shards that an index lists; none where there is no folder."""
    stem = COMPONENTS[part.name]
    if not part.is_dir():
        return []
    for variant in VARIANTS:
        file = part / f"{stem}{variant}.safetensors"
        index = part / f"{stem}.safetensors.index{variant}.json"
        if file.is_file():
            return [file]
        if index.is_file():
            return _shards(index)
    pickles = sorted(file.name for file in part.iterdir() if file.suffix in PICKLES)
    why = f"its weights are in a pickle ({pickles[0]}), which is not read" if pickles else f"no {stem}.safetensors"
    raise SdloraError(f"{part}: {why}; fetch the model's .safetensors files")


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        plain = all(Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SdloraError(f"{index} is damaged ({error!r}); restore it from where the model came from") from error
    if not plain or not names:
        raise SdloraError(
            f"{index} is damaged: it must list files beside it; restore it from where the model came from"
        )
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise SdloraError(f"{index.parent} lacks {', '.join(missing)}; copy the whole model folder again")
    return sorted(index.parent / name for name in names)


def _architecture(parameters: Shapes) -> Architecture:
    """The name is that of the known architecture with the same modules in the components that are there.

    The convolutions at both ends do not count: inpainting models have more channels there.
    """
    weights = {path: shape for path, shape in parameters.items() if not path.endswith(".bias")}
    shapes = {path: shape for path, shape in weights.items() if len(shape) > 1 and ".embeddings." not in path}
    norms = {path: shape for path, shape in weights.items() if len(shape) == 1}
    there = {path.partition(".")[0] for path in shapes}
    inner = dict(_inner(shapes, there))
    same = (one.name for one in known() if dict(_inner(one.shapes, there)) == inner)
    return Architecture(next(same, "custom"), shapes, norms)


def _inner(shapes: Shapes, components: Iterable[str]) -> Iterator[tuple[str, Shape]]:
    for path, shape in shapes.items():
        if path not in ENDS and path.partition(".")[0] in components:
            yield path, shape


def _refuse_other_numbers(path: Path, files: Mapping[Path, Header], places: Iterable[Place]) -> None:
    """Parameters must be floating-point numbers that say all by themselves."""
    ours = {(place.file, place.key) for place in places}
    for file, header in files.items():
        for key, (_, kind) in header.tensors.items():
            known_kind = kind in DTYPES and (kind.startswith(FLOATING) or (file, key) not in ours)
            if key.endswith(QUANTISED) or not known_kind:
                raise SdloraError(
                    f"{path} is quantised (it holds {key} in {kind}); give the model in float16, bfloat16 or float32"
                )
