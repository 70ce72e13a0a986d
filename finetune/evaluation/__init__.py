"""Any weights → accuracy, calibration and confusions on labelled images, and a file of predictions."""
