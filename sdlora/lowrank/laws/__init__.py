"""The laws of a delta: one small class for each way of writing down a change to one parameter."""

from sdlora.lowrank.laws.delta import Delta as Delta
from sdlora.lowrank.laws.low_rank import LowRank as LowRank
