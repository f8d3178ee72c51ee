"""The log and what it means: summaries, runs, detectors. Imports neither torch nor dash."""
