"""Bytes of shards at a path or URL.

`location` turns names, patterns and folders into paths and URLs. `shardfile` opens a shard as a file or reads byte
ranges of it: local ones itself, objects of http(s), s3 and gs through `store`, whose every request is tried again as
`retry` says. `filekind` tells what a file is, by its ending and its first bytes.
"""
