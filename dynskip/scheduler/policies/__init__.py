"""The policies of the scheduler: lock-step, by path, cohorts of paths."""
