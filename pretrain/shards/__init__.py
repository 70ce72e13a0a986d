"""Data sets → shards and their index; shards → their index, a check, figures.

`write.py` shuffles a data set and writes its shards; `scan.py` reads shards that exist. Both hand one `ShardEntry` a
shard to `indexwriter.py`, which keeps its columns in temporary files (`column.py`) and writes the index. `keys.py`
refuses a key that occurs twice. `verify.py` compares shards with their index. `survey.py` counts what an index holds,
and `page.py` shows it on a page.
"""
