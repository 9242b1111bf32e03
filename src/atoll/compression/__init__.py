"""Compression: pure stages that make flat vectors smaller on the wire, one after the other, and open them again.

Enters: groups of flat vectors. Leaves: groups whose layouts the plan alone says, so that a body of another length is none;
and readers, which open any stretch of a vector by itself. Rank 2: knows vectors and plans; rank 4 and up import it.
"""

from atoll.compression.down import Down, down
from atoll.compression.press import OPEN, Press, find, parted, stages
from atoll.compression.stage import Read, Stage

__all__ = ["OPEN", "Down", "Press", "Read", "Stage", "down", "find", "parted", "stages"]
