"""The dress rehearsal of a run on its real machines: what it needs against what is seen, and a verdict."""
