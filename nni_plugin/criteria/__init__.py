"""Channel criteria: what a coupled channel is worth. One idea a file, its paper at the top."""

from nni_plugin.criteria.base import Criterion
from nni_plugin.criteria.fisher import TaylorFG, TaylorFisher
from nni_plugin.criteria.taylor import TaylorFO

__all__ = ["Criterion", "TaylorFG", "TaylorFO", "TaylorFisher"]
