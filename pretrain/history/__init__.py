"""What a run folder tells afterwards, and while the run is going on: its page, its time, its certificate. Reads only.

`history.py` reads the files of a run, `saved.py` its checkpoints' descriptions, `hours.py` adds up its time.
`overlay.py` puts runs side by side: what they are called and how they are drawn. `page.py` makes their page:
`curves.py` draws what was measured over the steps (`series.py`) and what happened (`marks.py`), `scores.py` the
evaluations, `timeline.py` the time. `proof` proves from audit, order and checkpoints that every sample was trained on
as the order says.
"""
