"""report: the results of a run's evaluations and trainings as one page of tables and curves."""
