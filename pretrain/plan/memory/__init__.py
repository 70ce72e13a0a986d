"""Bytes of a rank before it runs: what is held, what a step adds, what lies outside torch, what the host needs."""
