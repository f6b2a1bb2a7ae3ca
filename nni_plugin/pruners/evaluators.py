"""What the pruners ask of NNI's evaluators, and evaluators for what NNI's own cannot do today.

`LightningEvaluator` takes the place of NNI's, which fails to train with Lightning 2.6 and does not know the package
`lightning.pytorch`; both packages work here. Lightning runs forward and backward inside the optimizer's step, so tasks
"before the step" run there after them. `TorchEvaluator` is NNI's with errors that say what is wrong.
"""

from __future__ import annotations

import importlib
import random
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from nni.common import is_traceable
from nni.compression import utils
from torch import Tensor, nn
from torch.optim import Optimizer

from nni_plugin.errors import ConfigError

Task = Callable[[], None]


class TorchEvaluator(utils.TorchEvaluator):  # type: ignore[misc]
    """NNI's evaluator of plain PyTorch; the arguments are NNI's.

    Raises:
        ConfigError: An argument is missing, or an optimizer is not traced; the text names it.
    """

    def __init__(
        self,
        training_func: Callable[..., Any],
        optimizers: Optimizer | list[Optimizer],
        training_step: Callable[..., Any],
        lr_schedulers: Any = None,
        dummy_input: Any = None,
        evaluating_func: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        for name, value in (("training_func", training_func), ("training_step", training_step)):
            if not callable(value):
                raise ConfigError(f"evaluator: {name} must be a function, got {value!r}.")
        for name, given in (("optimizers", optimizers), ("lr_schedulers", lr_schedulers)):
            for item in given if isinstance(given, (list, tuple)) else [given]:
                if item is None and name == "lr_schedulers":
                    continue
                if not is_traceable(item):
                    kind = type(item).__name__
                    raise ConfigError(
                        f"evaluator: {name} must be traced, so that they can be made again for the wrapped model; got "
                        f"a plain {kind}. Make it as nni.trace({kind})(...)."
                    )
        super().__init__(training_func, optimizers, training_step, lr_schedulers, dummy_input, evaluating_func)


class LightningEvaluator(utils.Evaluator):  # type: ignore[misc]
    """Trains and tests with Lightning, `pytorch_lightning` or `lightning.pytorch`; the arguments are NNI's.

    Optimizers need not be traced: `configure_optimizers` is called again on the wrapped network.

    Args:
        trainer: `nni.trace(Trainer)(...)`; made anew for every run.
        data_module: The data; traced or not.
        dummy_input: Inputs of the network's `forward`; None: those of the first minibatch.

    Raises:
        ConfigError: The trainer is not traced, or no trainer of Lightning.
    """

    def __init__(self, trainer: Any, data_module: Any, dummy_input: Any = None) -> None:
        symbol = getattr(trainer, "trace_symbol", None) if is_traceable(trainer) else None
        if symbol is None:
            raise ConfigError(
                f"evaluator: trainer must be made as nni.trace(Trainer)(...), so that it can be made anew for every "
                f"run; got a plain {type(trainer).__name__}."
            )
        root = str(symbol.__module__).partition(".trainer")[0]
        if root not in ("pytorch_lightning", "lightning.pytorch"):
            raise ConfigError(
                f"evaluator: trainer must be one of Lightning, got {symbol.__module__}.{symbol.__name__}."
            )
        self._module_type: type = importlib.import_module(root).LightningModule
        self.trainer, self.data_module, self.dummy_input = trainer, data_module, dummy_input
        self.model: Any = None
        self._originals: dict[str, Any] = {}
        self._initialization_complete = False

    def _init_optimizer_helpers(self, pure_model: nn.Module) -> None:
        if not isinstance(pure_model, self._module_type):
            raise ConfigError(
                f"evaluator: a {type(pure_model).__name__} is no {self._module_type.__module__}.LightningModule, which "
                "the trainer needs. The model is unchanged."
            )
        self._initialization_complete = True

    def bind_model(self, model: nn.Module, param_names_map: dict[str, str] | None = None) -> None:
        """Take a network to train; what was bound before is let go."""
        if self.model is not None:
            self.unbind_model()
        self.model = model
        patched = ("training_step", "configure_optimizers")
        self._originals = {name: model.__dict__[name] for name in patched if name in model.__dict__}

    def unbind_model(self) -> None:
        """Let the network go as it came: hooks and patches are taken off."""
        if self.model is not None:
            self.remove_all_hooks()
            self.revert_loss()
            self.revert_optimizer_step()
            self.model = None

    def patch_loss(self, patch: Callable[[Tensor, Any], Tensor]) -> None:
        """Pass every loss of `training_step` through `patch(loss, batch)`."""
        step = self.model.training_step

        def patched(_: Any, *args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            batch = args[0] if args else kwargs["batch"]
            if isinstance(output, Mapping):
                return {**output, "loss": patch(output["loss"], batch)}
            return output if output is None else patch(output, batch)

        self.model.training_step = types.MethodType(patched, self.model)

    def revert_loss(self) -> None:
        """Put back the network's own `training_step`."""
        self._revert("training_step")

    def patch_optimizer_step(self, before_step_tasks: Sequence[Task], after_step_tasks: Sequence[Task]) -> None:
        """Run tasks around each step of the first optimizer: before it with this step's gradients there, and after."""
        self._patch_optimizers(lambda optimizers: _patch_step(optimizers[0], before_step_tasks, after_step_tasks))

    def revert_optimizer_step(self) -> None:
        """Put back the network's own `configure_optimizers`."""
        self._revert("configure_optimizers")

    def patch_optim_param_group(self, module_name_param_dict: dict[str, list[Tensor]]) -> None:
        """Add parameters to the optimizers that hold those of the same layer."""
        self._patch_optimizers(
            lambda optimizers: self._optimizer_add_param_group(self.model, module_name_param_dict, optimizers)
        )

    def train(self, max_steps: int | None = None, max_epochs: int | None = None) -> None:
        """Train the bound network with a new trainer.

        Args:
            max_steps: Optimizer steps; the trainer's own limit of epochs does not cut them short.
            max_epochs: Epochs, without `max_steps`. None for both: as the trainer was made.
        """
        changes: dict[str, Any] = {"num_sanity_val_steps": 0}  # its forward passes are no training
        if max_steps is not None:
            changes |= {"max_steps": max_steps, "max_epochs": -1 if max_epochs is None else max_epochs}
        elif max_epochs is not None:
            changes["max_epochs"] = max_epochs
        trainer = self._trainer(changes)
        try:
            trainer.fit(self.model, datamodule=self.data_module)
        finally:
            self.model.trainer = None  # or a copy of the network would carry it along

    def finetune(self) -> None:
        """Train as the trainer was made."""
        self.train()

    def evaluate(self) -> tuple[float | None, Any]:
        """Test the bound network; returns the mean of the metrics logged as `default`, and all that were logged."""
        trainer = self._trainer({})
        try:
            results = trainer.test(self.model, datamodule=self.data_module)
        finally:
            self.model.trainer = None
        found = [metrics["default"] for metrics in results if "default" in metrics]
        return (sum(found) / len(found) if found else None), results

    def get_dummy_input(self) -> Any:
        """Return the inputs to trace the network with; None if none were given."""
        return self.dummy_input

    def _trainer(self, changes: Mapping[str, Any]) -> Any:
        arguments = {**self.trainer.trace_kwargs, **changes}
        return self.trainer.trace_symbol(*self.trainer.trace_args, **arguments)

    def _patch_optimizers(self, patch: Callable[[list[Optimizer]], Any]) -> None:
        configure = self.model.configure_optimizers

        def patched(_: Any) -> Any:
            configured = configure()
            optimizers = list(_optimizers_in(configured))
            if not optimizers:
                raise ConfigError("evaluator: configure_optimizers() returned no optimizer, and pruning here trains.")
            patch(optimizers)
            return configured

        self.model.configure_optimizers = types.MethodType(patched, self.model)

    def _revert(self, name: str) -> None:
        self.model.__dict__.pop(name, None)
        if name in self._originals:
            self.model.__dict__[name] = self._originals[name]


def _optimizers_in(configured: Any) -> Iterator[Optimizer]:
    """Yield the optimizers in any of the forms that `configure_optimizers` may return."""
    if isinstance(configured, Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield configured["optimizer"]
    elif isinstance(configured, (list, tuple)):
        for part in configured:
            yield from _optimizers_in(part)  # schedulers are none of these and give nothing


def _patch_step(optimizer: Optimizer, before: Sequence[Task], after: Sequence[Task]) -> None:
    step = optimizer.step

    def patched(_: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        def computed() -> Any:
            result = None if closure is None else closure()
            for task in before:
                task()
            return result

        if closure is None:
            computed()
            result = step(**kwargs)
        else:
            result = step(closure=computed, **kwargs)
        for task in after:
            task()
        return result

    optimizer.__dict__["step"] = types.MethodType(patched, optimizer)


def untrained(evaluator: Any, model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a network that no optimizer of a bound evaluator holds, as far as it shows them.

    Nobody clears their gradients after a step. NNI leaves such parameters behind where an evaluator was made before
    another compressor wrapped the network.

    Raises:
        ConfigError: No optimizer holds any parameter of the network.
    """
    optimizers = getattr(evaluator, "_optimizers", None)
    if not optimizers:
        return []
    held = {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }
    parameters = list(model.parameters())
    left = [parameter for parameter in parameters if id(parameter) not in held]
    if len(left) == len(parameters):
        raise ConfigError(
            f"evaluator: optimizers hold no parameter of this {type(model).__name__}; make them with its own "
            "model.parameters(), before any compressor wraps it."
        )
    return left


def training_loss(evaluator: Any) -> Callable[[nn.Module, Any], Tensor]:
    """Return an evaluator's loss as a function of any network and a minibatch.

    Raises:
        ConfigError: The evaluator's loss belongs to its own network.
    """
    step = getattr(evaluator, "_ori_training_step", None)
    if step is None:
        raise ConfigError(
            f"The loss of a {type(evaluator).__name__} cannot be computed on changed networks: take a TorchEvaluator, "
            "or give the criterion one, criterion=Oracle(loss_fn) with loss_fn(model, batch). The model is unchanged."
        )

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        output = step(batch, model)
        if isinstance(output, Mapping):
            output = output["loss"]
        loss: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return loss

    return loss_fn


class _Recorded(BaseException):
    """Ends a run at the network's first call; no Exception, so that no training loop takes it for a failure."""


def first_inputs(evaluator: Any, model: nn.Module) -> Any:
    """Return what the evaluator's training first calls a network with; it goes no further than that call.

    Args:
        evaluator: Any of NNI's, initialised for this network, bound to none.
        model: The network, unwrapped; modes, hooks and random state are put back.

    Returns:
        A tuple of arguments or a dict of named ones.

    Raises:
        ConfigError: The training never calls the network, or in a way that cannot be repeated.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Recorded

    modes = {module: module.training for module in model.modules()}
    with _random_state():
        evaluator.bind_model(model)
        hook = model.register_forward_pre_hook(record, with_kwargs=True)
        try:
            evaluator.train(max_steps=1)
        except _Recorded:
            pass
        finally:
            hook.remove()
            evaluator.unbind_model()
            for module, training in modes.items():
                module.training = training
    args, kwargs = seen[0] if seen else ((), {})
    if bool(args) == bool(kwargs):
        found = "a mixture of arguments by position and by name" if args else "nothing"
        raise ConfigError(
            f"The evaluator's training called {type(model).__name__} with {found}, so its layers' dependencies cannot "
            "be traced: give example_inputs (a tensor, or a tuple or dict of inputs). The model is unchanged."
        )
    return args or kwargs


@contextmanager
def _random_state() -> Iterator[None]:
    """Put back the random states that a training loop draws from."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
