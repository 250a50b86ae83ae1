"""Experiments of the losses notebook: functions that `run.seeds` calls."""
