"""What a run costs before it is paid for: `flops` of an image, from the network's sizes; `peak` FLOP/s of a device."""
