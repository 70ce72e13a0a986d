"""Weights in: `load` finds a checkpoint and reads it into `Weights`; `fill` puts them into a network that trains."""
