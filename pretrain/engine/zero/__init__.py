"""What DeepSpeed's ZeRO optimizers are made to do otherwise: memory that is held once, waits that are saved."""
