"""What was promised of a run, proved from what its folder holds: `launch/report.py RUN --verify`.

`certificate.py` puts the findings together. `audit.py` compares what was fed with the order, `epochs.py` counts it
without; `logged.py` is about metrics.jsonl, `continuity.py` about the losses at each resume, `checkpoints.py` about
checkpoints and starts. `span.py` tells which start trained a step.
"""
