"""The base's own parameters, for those that a mix has changed: once in memory at most, and only where they must be."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.formats.checkpoints import open_checkpoint
from sdlora.formats.mapped import Mapped

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element in bytes


class Untouched:
    """Untouched parameters by path: read back from the model's files where they lie there, else copied.

    source: folder or .safetensors file of the base model; None, or what cannot be opened as a checkpoint: all are
    copied.
    """

    def __init__(self, source: Path | None) -> None:
        self._source = source
        self._copies: dict[str, Tensor | None] = {}
        self._lying: dict[str, tuple[torch.device, torch.dtype]] = {}  # in the files, to be read as these

    def __contains__(self, path: object) -> bool:
        return path in self._copies or path in self._lying

    def __getitem__(self, path: str) -> Tensor | None:
        """To the bit what `keep` saw, in its dtype and on its device; not to be written to.

        SdloraError: the file it is read from was written to since then.
        """
        if path in self._copies:
            return self._copies[path]
        assert self._files is not None
        return self._files.tensor(path).to(*self._lying[path])

    def keep(self, path: str, parameter: Tensor | None) -> None:
        """Remember a parameter before it is changed for the first time; None: a bias that the base lacks.

        What is kept already stays as it is.
        """
        if path in self:
            return
        if parameter is None:
            self._copies[path] = None
        elif self._lies_in_files(path, parameter.detach()):
            self._lying[path] = (parameter.device, parameter.dtype)
        else:
            self._copies[path] = parameter.detach().clone()

    def forget(self, path: str) -> None:
        """Let go of a parameter: the model holds it itself again."""
        self._copies.pop(path, None)
        self._lying.pop(path, None)

    def check(self) -> None:
        """SdloraError where a file that was read from has been written to; for when all reading is done."""
        if self._lying and self._files is not None:
            self._files.check()

    @property
    def held(self) -> int:
        """Bytes of the copies."""
        return sum(copy.nbytes for copy in self._copies.values() if copy is not None)

    @cached_property
    def _files(self) -> Mapped | None:
        """Opened when a parameter is first kept."""
        try:
            return None if self._source is None else Mapped(open_checkpoint(self._source))
        except SdloraError:
            return None

    def _lies_in_files(self, path: str, parameter: Tensor) -> bool:
        """Whether the files say the same to the bit, once it is in the parameter's dtype."""
        if self._files is None or path not in self._files:
            return False
        try:
            lying = self._files.tensor(path)
        except SdloraError:  # changed since it was loaded
            return False
        return lying.shape == parameter.shape and _same_bits(lying.to(parameter.device, parameter.dtype), parameter)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Of equal shape and dtype. Zeros of both signs differ, NaN and NaN do not."""
    bits = BITS[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))
