"""Image data as loaders whose batches depend on the seed and the epoch alone."""

from nni_plugin.adapters.data.loaders import DATASETS, DataSplits, create_loaders

__all__ = ["DATASETS", "DataSplits", "create_loaders"]
