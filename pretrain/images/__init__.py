"""Bytes to pixels.

`decode` turns an encoded image into uint8, or tells why it cannot. `transforms` crop it to the network's size for
training (with `randaugment`), evaluation and few-shot, and turn bytes into floats. `mixing` mixes the pairs of a batch,
on the device that trains.
"""
