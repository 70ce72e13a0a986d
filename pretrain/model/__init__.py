"""The Vision Transformer: `section` of a config → sizes (`spec`) → network (`vit`, of `block`s) →
initial values (`initialization`).
`positions` resizes its learned position grids.
"""
