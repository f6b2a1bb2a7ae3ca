"""One trial of an NNI experiment: prune with the parameters that the tuner chose, and report the accuracy.

Copy it and make it yours. `nni-plugin experiment` runs it as `python trial.py SETTINGS RESULTS [MACS_PRICE]`; with
`--trial-command "python my_trial.py {settings} {results}"` it runs yours.
"""

import sys
from pathlib import Path

import nni
import yaml

from nni_plugin.adapters.training import Callback
from nni_plugin.cli.prune import job_from
from nni_plugin.search_space import with_parameters
from nni_plugin.workflow import run_job


class Report(Callback):
    """Reports top-1 (percent) after every epoch of fine-tuning."""

    def on_epoch_end(self, epoch: int, metrics: dict[str, float]) -> None:
        """Send it to NNI's web portal, and to an assessor if there is one."""
        nni.report_intermediate_result(metrics["top1"])


def main(settings: Path, results: Path, macs_price: float = 0.0) -> None:
    """Run the trial.

    Args:
        settings: YAML file with what all trials share, under the names of the flags of `nni-plugin prune`.
        results: The pruned network goes into a folder of this one that is named after the trial.
        macs_price: What all MACs of the dense network cost, in points of top-1.
    """
    parameters = nni.get_next_parameter()  # such as {"method": "taylor-fo", "epochs": 2, "stages.layer1": 0.5}
    shared = yaml.safe_load(settings.read_text())
    job = job_from({**with_parameters(shared, parameters), "output": str(results / nni.get_trial_id())})
    metrics = run_job(job, callbacks=[Report()]).metrics
    dense, pruned = metrics["baseline"], metrics["pruned"]
    macs_ratio, params_ratio = pruned["macs"] / dense["macs"], pruned["params"] / dense["params"]
    nni.report_final_result(
        {
            "default": pruned["top1"] - macs_price * macs_ratio,  # what the tuner maximises
            "top1": pruned["top1"],
            "macs_ratio": macs_ratio,
            "params_ratio": params_ratio,
        }
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(float, sys.argv[3:]))
