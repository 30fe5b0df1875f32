"""`trainrt dashboard`: one page about one run, live or finished, from its run directory.

`server.py` answers, `views.py` makes the documents, `reader.py` follows the files; `perfetto.py` and
`prometheus.py` are for other tools.
"""
