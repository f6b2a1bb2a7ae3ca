"""NNI experiments: its server started, watched and stopped. NNI itself is imported when it is used."""

from nni_plugin.adapters.experiment.config import TUNERS, Request, check_request, command_line, runs_here
from nni_plugin.adapters.experiment.server import Running, started
from nni_plugin.adapters.experiment.trials import CANCELED, Trial

__all__ = ["CANCELED", "TUNERS", "Request", "Running", "Trial", "check_request", "command_line", "runs_here", "started"]
