"""What a run is, from its config to its last checkpoint.

`config` says which keys there are. `experiment` runs it all: `setup` opens the data and checks that config, data and
ranks go together; `recipe` is what is computed (with `loss`), `notes` what a user may not have meant. A run starts from
its `origin`, or resumes: `resume` says what may have changed. `trainer` is the loop. Between two steps the `keeper`
saves (`saver`), evaluates (`evaluation`) and stops.
"""
