"""The Vision Transformer: `section` of a config → sizes (`spec`) → network (`vit`) → initial values (`initialization`).
`positions` resizes its learned position grids.
"""
