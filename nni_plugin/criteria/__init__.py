"""Channel criteria: what a coupled channel is worth. One idea a file, its paper at the top."""

from nni_plugin.criteria.base import Criterion
from nni_plugin.criteria.bn_scale import BNScale
from nni_plugin.criteria.feature_map import FeatureMap
from nni_plugin.criteria.fisher import TaylorFG, TaylorFisher
from nni_plugin.criteria.geometric_median import GeometricMedian
from nni_plugin.criteria.magnitude import Magnitude
from nni_plugin.criteria.obs import OBS
from nni_plugin.criteria.oracle import Oracle
from nni_plugin.criteria.random import Random
from nni_plugin.criteria.second_order import OBD, TaylorSO
from nni_plugin.criteria.taylor import TaylorFO

__all__ = [
    "OBD",
    "OBS",
    "BNScale",
    "Criterion",
    "FeatureMap",
    "GeometricMedian",
    "Magnitude",
    "Oracle",
    "Random",
    "TaylorFG",
    "TaylorFO",
    "TaylorFisher",
    "TaylorSO",
]
