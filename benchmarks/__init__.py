"""Comparisons and the reproductions of published tables; `python -m nni_plugin.benchmarks NAME`."""
