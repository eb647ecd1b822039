"""The laws of a delta: one small class for each way of writing down a change to one parameter."""

from sdlora.lowrank.laws.delta import Delta as Delta
from sdlora.lowrank.laws.dora import DoRA as DoRA
from sdlora.lowrank.laws.full import Full as Full
from sdlora.lowrank.laws.full import Replacement as Replacement
from sdlora.lowrank.laws.glora import GLoRA as GLoRA
from sdlora.lowrank.laws.hadamard import Hadamard as Hadamard
from sdlora.lowrank.laws.input_rotation import InputBOFT as InputBOFT
from sdlora.lowrank.laws.input_rotation import OFTv2 as OFTv2
from sdlora.lowrank.laws.kronecker import Kronecker as Kronecker
from sdlora.lowrank.laws.low_rank import LowRank as LowRank
from sdlora.lowrank.laws.orthogonal import BOFT as BOFT
from sdlora.lowrank.laws.orthogonal import OFT as OFT
from sdlora.lowrank.laws.orthogonal import Rotation as Rotation
from sdlora.lowrank.laws.scaling import IA3 as IA3
from sdlora.lowrank.laws.sums import Sparse as Sparse
from sdlora.lowrank.laws.sums import Sum as Sum
