"""Train Stable Diffusion LoRAs, mix them, and know what they hold."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdlora.errors import SdloraError as SdloraError
    from sdlora.formats.read import describe as describe
    from sdlora.formats.read import read as read
    from sdlora.formats.write import write as write
    from sdlora.generation.job import Job as Job
    from sdlora.generation.job import LoraWeight as LoraWeight
    from sdlora.generation.open import open_mixer as open_mixer
    from sdlora.generation.png import save as save
    from sdlora.generation.render import Picture as Picture
    from sdlora.generation.render import render as render
    from sdlora.lowrank.adapter import Adapter as Adapter
    from sdlora.mixing.mixer import Mixer as Mixer
    from sdlora.models.load import load_pipeline as load_pipeline
    from sdlora.training.config import TrainConfig as TrainConfig
    from sdlora.training.run import run_training as run_training

__version__ = "0.1.0"

# Imported when they are first used, so that `import sdlora` costs next to nothing.
_HOMES = {
    "Adapter": "sdlora.lowrank.adapter",
    "Job": "sdlora.generation.job",
    "LoraWeight": "sdlora.generation.job",
    "Mixer": "sdlora.mixing.mixer",
    "Picture": "sdlora.generation.render",
    "SdloraError": "sdlora.errors",
    "TrainConfig": "sdlora.training.config",
    "describe": "sdlora.formats.read",
    "load_pipeline": "sdlora.models.load",
    "open_mixer": "sdlora.generation.open",
    "read": "sdlora.formats.read",
    "render": "sdlora.generation.render",
    "run_training": "sdlora.training.run",
    "save": "sdlora.generation.png",
    "write": "sdlora.formats.write",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sdlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
