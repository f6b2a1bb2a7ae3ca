"""Whole layers: which of them can leave a network, and how much each of them matters."""

from nni_plugin.layers.blocks import Block, removable_blocks

__all__ = ["Block", "removable_blocks"]
