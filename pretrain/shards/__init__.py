"""Shards: made from data sets, indexed, checked, and seen at a glance."""
