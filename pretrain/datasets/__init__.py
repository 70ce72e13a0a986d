"""Data sets as people have them → rows of images and labels, which `shards` writes.

`sources.py` opens what a SOURCE names: a packaged or downloaded set, a folder. A folder is one of the published sets
(`published.py`) or an image folder (`folder.py`); its splits are found by `splits.py`, lists of labels are read by
`labelsfile.py`. Both list image files with `files.py` and return a `Dataset` (`dataset.py`).
"""
