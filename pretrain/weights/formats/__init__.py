"""The formats of weights, one module each: a table of names and axes, and how a network is told from a file."""
