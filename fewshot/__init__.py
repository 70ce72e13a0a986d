"""A checkpoint → a score: frozen features, linear probes, a report.

`config` names what is to be done; `task` opens the support and the query set and draws the support images; `networks`
finds the weights. `features` holds the table of feature layers and computes them, `cache` keeps them in files, `given`
reads a user's own. `probes` holds the table of probes, `ridge` the first of them; `score` fits and scores them;
`closeup` looks at one of them image by image. `report` makes report.json of it all, and pages of tables and charts.
`evaluator` scores a network that still trains.
"""
