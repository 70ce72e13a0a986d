"""A checkpoint → a score: frozen features, linear probes, a report.

`config` says what; `task` opens the support and the query set and draws the support images; `networks` finds the
weights. `features` holds the table of feature layers and computes them, `cache` keeps them in files, `given` reads a
user's own. `probes` holds the table of probes, of which `ridge` is the first; `score` fits and scores them. `report` puts
all of it into report.json, `page` into tables and charts. `evaluator` is the same for a network that still trains.
"""
