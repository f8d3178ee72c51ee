"""One file per family of faults; each reads a run and says what is wrong."""
