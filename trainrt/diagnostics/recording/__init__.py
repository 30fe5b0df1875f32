"""What a rank makes of its events: a summary of every step (`summary.py`), and all of them for some steps (`windows.py`)."""
