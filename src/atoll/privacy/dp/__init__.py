"""Differential privacy: what a mechanism's noise is drawn from, what it is added to, and what it costs.

Enters: vectors, a plan's `[privacy]`. Leaves: clipped vectors, noise on a grid, ε for a δ. Rank 2, as all of `privacy`:
knows no network, no algorithm; `atoll.method` puts a plan's method and its guards together.
"""
