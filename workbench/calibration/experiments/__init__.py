"""Experiments of the calibration family: one module per paper, run by `run.seeds`."""
