"""The formats of weights. `format` says what a format is, `table` how its tensors lie; then one module for each."""
