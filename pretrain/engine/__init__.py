"""Everything that knows DeepSpeed.

`processgroup` joins the ranks; `optimizer` and `schedule` are what an update is made of; `engine` builds DeepSpeed's
engine around the network; `step` trains with it, `guards` say which updates are skipped. `fragments` find the training
state in the engine: `snapshot` copies it for a checkpoint, `restore` loads it. `quiet` imports DeepSpeed.
"""
