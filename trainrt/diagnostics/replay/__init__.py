"""What-if replay of traces of operations: `trace.py` reads them, `lanes.py` and `dependencies.py` find what waits for what,
`replay.py` plays steps again with some operations at their ideal duration, `causes.py` and `network_causes.py` say what it tells,
`whatif.py` makes a diagnosis of it.
"""
