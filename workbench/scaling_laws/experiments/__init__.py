"""Experiments of the scaling-laws family: one module per paper, run by `run.seeds`."""
