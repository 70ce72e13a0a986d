"""Weights in and out. In: a path or URL → `load` finds a checkpoint or a file → `read`, by its format, from a
`tensorfile` → `Weights` → `fill` puts them into a network that trains, `networks` names those that are scored.
Out: `export`, with a `selftest`.
"""
