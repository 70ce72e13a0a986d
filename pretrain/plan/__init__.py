"""What a run costs before it is paid for. Of a `job` on its cluster: `memory` of a rank, `traffic`, `seconds` of a step
(`flops` at a share of a device's `peak`, or as `calibration` measured), `reading` of data; what `fit`s; the `plan`.
"""
