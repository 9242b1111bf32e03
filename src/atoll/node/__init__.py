"""The node: trains beside data it owns, and lets only sealed updates out.

Enters: the server's messages, the owner's rows. Leaves: updates, first into the owner's ledger. `machine.py`
decides (no I/O), `runtime.py` acts. Imported by the command line only; never by `server`.
"""
