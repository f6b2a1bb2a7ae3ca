"""Comparisons and the reproductions of published tables."""
