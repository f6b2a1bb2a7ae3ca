"""Whole layers: which of them can leave a network, and how much each of them matters."""

from nni_plugin.layers.base import LayerImportance, rank_agreement, removal_order
from nni_plugin.layers.block_gate import BlockGate
from nni_plugin.layers.blocks import Block, removable_blocks
from nni_plugin.layers.ensemble import LayerEnsemble
from nni_plugin.layers.imprinting import Imprinting
from nni_plugin.layers.statistics import LayerStatistic

__all__ = [
    "Block",
    "BlockGate",
    "Imprinting",
    "LayerEnsemble",
    "LayerImportance",
    "LayerStatistic",
    "rank_agreement",
    "removable_blocks",
    "removal_order",
]
