"""Experiments of the loss-landscapes notebook: functions that `run.seeds` calls."""
