"""DeepSpeed, optimizer and schedule, checkpoints, stopping."""
