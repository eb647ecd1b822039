"""The optimisers by name, as a table; those of other libraries only where these are installed."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn

from sdlora.errors import SdloraError, nearest

Groups = list[dict[str, Any]]


def build(name: str, rates: Mapping[str, tuple[Sequence[nn.Parameter], float]], weight_decay: float) -> Any:
    """The optimiser of that name. rates: parameters and peak learning rate of each component that is trained.

    An unknown name, or one whose library is missing, raises SdloraError.
    """
    if name not in OPTIMIZERS:
        raise SdloraError(f"optimizer {name!r} is unknown{nearest(name, OPTIMIZERS)}; choose {', '.join(OPTIMIZERS)}")
    groups = [{"params": list(parameters), "lr": rate} for parameters, rate in rates.values()]
    return OPTIMIZERS[name](groups, weight_decay)


def _adamw(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


def _adam(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, weight_decay=weight_decay)


def _sgd(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay)


def _adafactor(groups: Groups, weight_decay: float) -> torch.optim.Optimizer:
    """arXiv:1804.04235 with the learning rate taken as it is.

    The paper scales it by each parameter's own size, at least the second eps. LoRA's up factors start at 0 and would
    hardly move; a floor of 1 turns that off. The first eps stays
    torch's: the square of the paper's 1e-30 is 0 in float32, and down's first gradients are 0 too.
    """
    return torch.optim.Adafactor(groups, eps=(None, 1.0), weight_decay=weight_decay)


def _foreign(library: str, kind: str, **options: Any) -> Callable[[Groups, float], Any]:
    """An optimiser of another library, imported when it is asked for."""

    def made(groups: Groups, weight_decay: float) -> Any:
        try:
            module = import_module(library)
        except ImportError as error:
            raise SdloraError(
                f"this optimizer needs {library}, which cannot be imported ({error}); "
                f"pip install {library.partition('.')[0]}, or choose adamw"
            ) from error
        return getattr(module, kind)(groups, weight_decay=weight_decay, **options)

    return made


OPTIMIZERS: dict[str, Callable[[Groups, float], Any]] = {
    "adamw": _adamw,
    "adam": _adam,
    "sgd": _sgd,
    "adafactor": _adafactor,
    "adamw8bit": _foreign("bitsandbytes.optim", "AdamW8bit"),
    "prodigy": _foreign("prodigyopt", "Prodigy", safeguard_warmup=True, use_bias_correction=True),
}
