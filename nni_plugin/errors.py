"""Errors of this package.

Every error says what was expected, what was got and what to do. Unless its text says otherwise, the
model that was passed in is unchanged when one of these is raised.
"""

from __future__ import annotations


class NNIPluginError(Exception):
    """Base class of every error that this package raises on purpose."""


class PlanError(NNIPluginError):
    """A plan cannot be read, or does not fit the model it is applied to."""


class BudgetError(NNIPluginError):
    """A budget is malformed, or cannot be met; the text says what could be reached."""


class CriterionError(NNIPluginError):
    """A criterion lacks the data it needs, or its scores are not finite."""


class GraphError(NNIPluginError):
    """The coupled channel groups of a model could not be found."""


class SurgeryError(NNIPluginError):
    """Channels could not be removed; the model has been put back as it was."""


class ScheduleError(NNIPluginError):
    """A pruning schedule is malformed or was driven in the wrong order."""


class ModelError(NNIPluginError):
    """A model is unknown, cannot be built, or its weights do not fit."""


class DataError(NNIPluginError):
    """A data set is unknown, missing, empty or damaged."""


class TrainingError(NNIPluginError):
    """Training cannot go on: a loss that is not finite, an unknown optimizer, a damaged checkpoint."""

    def of_pretraining(self) -> TrainingError:
        """Return the same error of the dense network's training, whose flag for the learning rate is another."""
        return TrainingError(str(self).replace("--lr", "--pretrain-lr"))


class CheckpointError(NNIPluginError):
    """A saved network is damaged, hostile, incomplete or meant for another model."""


class ExportError(NNIPluginError):
    """A network could not be exported, or the exported one gives other numbers."""


class OutputError(NNIPluginError):
    """Results cannot be written where they were asked for."""


class MaskError(NNIPluginError):
    """Masks cannot be read, or do not fit the network that they are to make smaller."""


class ExperimentError(NNIPluginError):
    """An NNI experiment cannot be started as asked, or none of its trials succeeded."""


class ConfigError(NNIPluginError):
    """A pruner was given a config_list, an evaluator or an option that it cannot work with; the text names the key."""


class SearchError(NNIPluginError):
    """A search over architectures is malformed or cannot go on: gates, losses or accuracies that make no sense."""
