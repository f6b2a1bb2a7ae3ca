"""Which models can be pruned: each one of a list is planned, cut, proven, run, saved and loaded, in its own process."""
