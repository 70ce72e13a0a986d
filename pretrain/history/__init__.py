"""What a run folder tells afterwards, and while the run is going on: its page, its time, its certificate. Reads only.

`history.py` reads the files of a run. `hours.py` adds up its time, `page.py` draws it, `proof` proves from
audit, order and checkpoints that every sample was trained on as the order says.
"""
