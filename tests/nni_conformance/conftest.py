"""NNI 3.0's own tests as the referee: their cases in our words, with our pruners where NNI's stand.

What is followed of `test/algo/compression` in NNI's repository, and where:

    pruning/test_pruner.py                test_one_shot.py, test_scheduled.py
    test_fusion_compress.py               test_fusion.py
    base/test_compressor.py, test_wrapper.py, test_fused_wrapper.py, test_setting.py    test_wrappers.py
    utils/test_evaluator.py               test_evaluators.py
    pruning/test_channel_dependency.py    test_dependency.py
    pruning/test_speedup_init_mask.py, test_speedup_softmax.py, test_speedup_torchvision.py    test_speedup.py

Each case runs with NNI's pruner in the slot as well, where NNI's still passes on today's torch: the control, which
tells a wrong test from a wrong pruner. NNI's ModelSpeedup passes nowhere, so both are sped up by ours. Not followed:
what tests NNI's tracer (test_concrete_trace_*, test_auto_conv*), its quantizers and distillers by themselves, its
Scaling, and three slots that none of our pruners fills: `level` and `mvp`, which mask single weights, and `slim`, which
trains a factor of its own where ours reads the normalisation's, and `fc1` has none.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
