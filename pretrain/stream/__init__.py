"""The shard stream: index → order → reader → images → loader."""
