"""Encrypted sums: nodes share a key that the server never has, the server adds ciphertexts, nodes open the sum and no other.

`node` and `server` are the two halves, each a row of pure functions; terms, cohort and the survivors' signatures are those of
secure aggregation. Who holds the key reads every update that it gets hold of: docs/privacy.md says what follows.
"""
