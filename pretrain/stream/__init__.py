"""The shard stream: order → plan → chunks → batches.

`order` says which sample comes at which position, on every rank alike. `plan` cuts a rank's part into micro-batches,
and the chunks that they are read with. `reader` starts chunks ahead of their use; `chunk` reads one and compares its
samples with the index. `loader` decodes them into batches, in memory that `buffers` reuse. `fault` is what replaces a
sample that cannot be read; `counters` measure. `section` holds the config's keys; `colour` looks whether images are in
colour.
"""
