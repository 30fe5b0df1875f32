"""Detectors: each looks at one window of steps and returns findings, without labels and without thresholds to be set.

`window.py` prepares what they all look at; `workers.py` finds ranks and hosts that are slow at the same work, `work.py` work that
is unevenly spread, `network.py` transfers, `common.py` what all ranks share.
"""
