"""A step's training state on disk, whatever ranks, ZeRO stage and precision wrote it. Knows no DeepSpeed.

`archive`: one file of named tensors. `step`: the folder of one checkpoint, its state, hashes and seal. `pieces`: what
each rank writes into it, and reading values back by kind, parameter and position. `folder`: all checkpoints of a run,
`latest`, the newest that is whole, which ones are kept.
"""
