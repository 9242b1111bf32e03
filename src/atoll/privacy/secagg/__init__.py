"""Secure aggregation: a server learns the sum of many nodes' numbers, and nothing else about any of them.

Double masking (Bonawitz et al. 2017, figure 4) over a sparse graph that the nodes draw themselves (Bell et al. 2020). `node`
and `server` are the two halves, each a row of pure functions; `terms` is what both know. Knows no network.
"""
