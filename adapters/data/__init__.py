"""Image data as loaders whose batches depend on the seed and the epoch alone."""

from nni_plugin.adapters.data.loaders import DATASETS, DataSplits, create_loaders, is_in_memory

__all__ = ["DATASETS", "DataSplits", "create_loaders", "is_in_memory"]
