"""Shards in, checkpoints out: everything that makes a representation."""
