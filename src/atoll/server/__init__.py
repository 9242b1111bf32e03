"""The server: coordinates a run, and never sees a row of data.

Enters: a plan, nodes' messages, the log's records. Leaves: global models and a history. `machine.py` decides
(no I/O), `close.py` computes, `runtime.py` acts. Imported by the command line only; never by `node`.
"""
