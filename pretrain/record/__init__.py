"""What a run leaves behind, and how it is measured.

`folder` names the files of a run folder and `claim` keeps a second run out of it. In every step the loop tells `pulse`
where it is; `ledger` writes down the samples (audit), those that could not be read (`quarantine`), the measurements
(`metrics`), and what a skipped step looked like (`inspection`). `lines` is the JSON-lines file that all of them append
to.
"""
