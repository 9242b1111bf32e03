"""What protects an update before it leaves a node: secure aggregation and its parts.

Enters: a node's numbers. Leaves: numbers that only their sum over a cohort can be read from.
Rank 2: knows vectors and keys, and no network; docs/privacy.md says what protects whom from whom.
"""
