"""Everything about the removable blocks of one network, in tables and plots: what `nni-plugin layers` does."""
