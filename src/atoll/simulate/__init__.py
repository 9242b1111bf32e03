"""Simulation: the server's own machine and `close` over clients in memory, one at a time.

Enters: a plan and clients' data. Leaves: the run's history and its final model, the same bits that a
deployed federation of nodes with these names would give. May import ranks 0 to 4.
"""

from atoll.simulate.map import Simulated, simulate

__all__ = ["Simulated", "simulate"]
