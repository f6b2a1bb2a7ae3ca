"""Criteria against the exact loss change of every channel, in tables and plots: what `nni-plugin correlate` does."""
