"""A checkpoint → a score: frozen features, linear probes, a report."""
