"""The Vision Transformer: the network, its sizes, its position grids."""
