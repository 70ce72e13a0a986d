"""What lies where in which shard.

`tar` finds the samples of a shard from its headers. `indexfile` is the format that holds them, for many shards, in one
mapped file, with hashes and digests. `index` maps one file or several, and answers ids with labels and byte ranges;
`compare` refuses files that do not go together. `members` splits the bytes of a range into files again.
"""
