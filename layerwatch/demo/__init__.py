"""Five small real trainings to look at."""
