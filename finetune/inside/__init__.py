"""Looking into a network: `embeddings` and `attention` compute, from the weights and from `examples`; `view` holds what
was found, `page` shows it.
"""
