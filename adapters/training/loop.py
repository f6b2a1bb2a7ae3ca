"""The training loop: minibatches, callbacks, checkpoints."""

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from nni_plugin.adapters.training.batches import EpochBatches
from nni_plugin.adapters.training.callbacks import Callback, TrainingState
from nni_plugin.adapters.training.checkpoint import (
    checkpoint_path,
    on_cpu,
    read_checkpoint,
    rng_state,
    set_rng_state,
    write_checkpoint,
)
from nni_plugin.adapters.training.config import TrainingConfig
from nni_plugin.adapters.training.evaluate import evaluate, kept_modes, show_progress
from nni_plugin.adapters.training.hardware import ParallelModel, own_accelerator
from nni_plugin.adapters.training.objective import Objective
from nni_plugin.adapters.training.optimization import build_optimizer, build_scheduler
from nni_plugin.errors import TrainingError

History = list[dict[str, float]]


def fit(
    model: nn.Module,
    data: Any,
    config: TrainingConfig,
    *,
    test_loader: Any = None,
    callbacks: Sequence[Callback] = (),
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    phase: str = "finetune",
) -> History:
    """Train a classifier in place; with `config.model_ema`, it holds the averaged weights at the end.

    Every minibatch: forward, loss, backward, `on_backward`, clipping, optimizer, scheduler, `on_step`,
    averaging. The same call gives the same network bit for bit on the same machine (on a GPU, as far as its
    kernels repeat), also when killed at any moment and called again on a freshly built model with `resume`.
    The global random generators are left seeded, the model on the run's device, its modes as they were.

    Args:
        model: Maps images (N, C, H, W) to logits (N, classes).
        data: Training `DataLoader` of (images, integer labels); or an object that has one as `train` and,
            unless `test_loader` is given, that of the test data as `test` (such as `adapters.data.DataSplits`).
        config: Settings of the run.
        test_loader: Data to evaluate on at the end of each epoch; every process evaluates all of it.
        callbacks: Called in this order.
        checkpoint_dir: Folder for the checkpoint (`checkpoint_path`); None keeps none.
        resume: Go on from the checkpoint of this phase, or from the start where there is none yet.
        device: "cpu", "cuda" ...; None takes the best there is.
        progress: Draw progress bars; None draws them when standard error is a terminal.
        phase: Names the checkpoint and the progress bar, such as "pretrain"; phases share a folder.

    Returns:
        One row an epoch: epoch (from 0), step (minibatches so far), train_loss, lr (of the last minibatch),
        top1 (percent, with test data; of the averaged weights where there are some), seconds.

    Raises:
        TrainingError: The loss or the weights are not finite, the model is frozen, data and model do not fit,
            or the checkpoint is damaged or another run's. The last checkpoint stays usable.
    """
    fingerprint = None
    if hasattr(data, "train") and not isinstance(data, torch.utils.data.DataLoader):
        test_loader = getattr(data, "test", None) if test_loader is None else test_loader
        fingerprint, data = getattr(data, "fingerprint", None), data.train
    if config.epochs == 0:
        return []
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("no parameter of the model requires gradients; unfreeze what should be trained")
    if resume and checkpoint_dir is None:
        raise TrainingError("resume needs checkpoint_dir, the folder that the killed run was given")
    path = None if checkpoint_dir is None else checkpoint_path(checkpoint_dir, phase)
    with own_accelerator(device, config.amp) as accelerator, kept_modes(model):
        bars = show_progress(progress) and accelerator.is_main_process
        run = _Run(accelerator, model, data, config, tuple(callbacks), path, phase, fingerprint, bars)
        return run.run(test_loader, resume)


class _Run:
    """One call of `fit`: its live objects and its position."""

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        loader: Any,
        config: TrainingConfig,
        callbacks: tuple[Callback, ...],
        path: Path | None,
        phase: str,
        fingerprint: str | None,
        bars: bool,
    ) -> None:
        self._config, self._callbacks, self._path, self._bars = config, callbacks, path, bars
        self._accelerator, self._phase = accelerator, phase
        self._format = torch.channels_last if config.channels_last else torch.preserve_format
        self._batches = EpochBatches(accelerator, loader, config.seed)
        model.to(accelerator.device)
        model.to(memory_format=self._format)
        self._objective = Objective(model, config)
        optimizer = build_optimizer(model, config)
        self._scheduler = build_scheduler(optimizer, config, len(self._batches))
        decay = config.model_ema_decay
        self._ema = ModelEmaV3(model, decay=decay, use_warmup=True) if config.model_ema else None
        self._settings = self._identity(model, loader, fingerprint)
        self._forward = ParallelModel(accelerator, model)
        self._optimizer = accelerator.prepare_optimizer(optimizer)
        self._state = TrainingState(
            model=model,
            optimizer=optimizer,
            ema=None if self._ema is None else self._ema.module,
            accelerator=accelerator,
            step=0,
            epoch=0,
            total_steps=config.epochs * len(self._batches),
        )
        self._history: History = []
        self._loss_sum, self._images, self._seconds = 0.0, 0, 0.0

    def run(self, test_loader: Any, resume: bool) -> History:
        """Train from the start or from the checkpoint to the end."""
        state = self._state
        content = self._found() if resume else None
        if content is not None:
            state.step, state.epoch = content["step"], content["epoch"]
        for callback in self._callbacks:
            callback.on_train_begin(state)
        pending_rng = None if content is None else self._restore(content)
        while state.epoch < self._config.epochs:
            self._train_epoch(pending_rng)
            pending_rng = None
            self._end_epoch(test_loader)
        if state.ema is not None:
            state.model.load_state_dict(state.ema.state_dict())
        return self._history

    def _train_epoch(self, pending_rng: dict[str, Any] | None) -> None:
        """Train the rest of the current epoch."""
        state, length = self._state, len(self._batches)
        done = state.step - state.epoch * length
        state.model.train()
        self._started = time.perf_counter() - self._seconds
        description = f"{self._phase} {state.epoch + 1}/{self._config.epochs}"
        with tqdm(total=length, initial=done, desc=description, leave=False, disable=not self._bars) as bar:
            for images, target in self._batches.epoch(state.epoch, skip=done):
                if pending_rng is not None and done > 0:
                    # Only now: starting the loader has drawn from them, as in the killed run.
                    set_rng_state(pending_rng)
                    pending_rng = None
                loss = self._minibatch(images, target)
                self._loss_sum += loss * len(target)
                self._images += len(target)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                every = self._config.checkpoint_every
                if every is not None and state.step % every == 0 and state.step % length != 0:
                    self._save()

    def _minibatch(self, images: torch.Tensor, target: torch.Tensor) -> float:
        """Train on one minibatch and return its loss."""
        state, accelerator = self._state, self._accelerator
        images, target = self._objective.mix(images.contiguous(memory_format=self._format), target)
        self._optimizer.zero_grad()
        loss = self._objective(self._forward(images), target)
        # The mean of all processes, so that all of them stop on a loss that is not finite.
        value = float(accelerator.reduce(loss.detach(), reduction="mean"))
        if not math.isfinite(value):
            raise TrainingError(f"loss is {value} at step {state.step}, lower --lr")
        state.batch = (images, target)
        state.loss_scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        if any(getattr(callback, "needs_graph", False) for callback in self._callbacks):
            accelerator.backward(loss, create_graph=True)
        else:
            accelerator.backward(loss)
        accelerator.unscale_gradients(self._optimizer)
        gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
        skipped = accelerator.scaler is not None and not _finite(gradients)
        if not skipped:
            for callback in self._callbacks:
                callback.on_backward(value)
        if self._config.clip_grad is not None:
            nn.utils.clip_grad_norm_(state.model.parameters(), self._config.clip_grad)
        self._lr = float(state.optimizer.param_groups[0]["lr"])
        self._optimizer.step()
        state.step += 1
        if self._scheduler is not None:
            self._scheduler.step_update(state.step)
        if not skipped:
            for callback in self._callbacks:
                callback.on_step()
            # After the callbacks, of weights that are held at zero: momentum has moved them until then.
            if self._ema is not None:
                self._ema.update(state.model, step=state.step)
        return value

    def _end_epoch(self, test_loader: Any) -> None:
        """Evaluate, tell the callbacks, and write a checkpoint."""
        state = self._state
        row: dict[str, float] = {
            "epoch": state.epoch,
            "step": state.step,
            "train_loss": self._loss_sum / self._images,
            "lr": self._lr,
        }
        if test_loader is not None:
            judged = state.model if state.ema is None else state.ema
            row["top1"] = evaluate(judged, test_loader, self._accelerator.device, progress=self._bars)["top1"]
        row["seconds"] = time.perf_counter() - self._started
        self._history.append(row)
        for callback in self._callbacks:
            callback.on_epoch_end(state.epoch, row)
        state.epoch += 1
        self._loss_sum, self._images, self._seconds = 0.0, 0, 0.0
        self._save(epoch_ended=True)

    def _identity(self, model: nn.Module, loader: Any, fingerprint: str | None) -> dict[str, Any]:
        """Return what a run must share with this one to go on from its checkpoint."""
        config = dataclasses.asdict(self._config)
        del config["checkpoint_every"]  # no influence on the outcome
        named = getattr(model, "nni_plugin_identity", None)
        return {
            "phase": self._phase,
            "config": config,
            "model": {
                "class": type(model).__qualname__,
                "identity": repr(named) if named is not None else None,
                "shapes": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
            },
            "data": {
                "fingerprint": fingerprint,
                "batch_size": loader.batch_size,
                "images": len(loader.dataset),
                "batches": len(self._batches),
            },
            "processes": self._accelerator.num_processes,
            "callbacks": [type(callback).__qualname__ for callback in self._callbacks],
        }

    def _save(self, epoch_ended: bool = False) -> None:
        """Write a checkpoint of this moment, if one is wanted."""
        if self._path is None:
            return
        from accelerate.utils import gather_object

        state, accelerator = self._state, self._accelerator
        weights = state.model.state_dict()
        if not _finite([tensor for tensor in weights.values() if tensor.is_floating_point()]):
            raise TrainingError(f"weights are not finite at step {state.step}, lower --lr")
        seconds = 0.0 if epoch_ended else time.perf_counter() - self._started
        # Each process has gathered from its own minibatches.
        callbacks = gather_object([on_cpu([callback.state_dict() for callback in self._callbacks])])
        content = {
            "step": state.step,
            "epoch": state.epoch,
            "history": self._history,
            "running": [self._loss_sum, self._images, seconds],
            "callbacks": callbacks[0],
            "callbacks_of_others": callbacks[1:],
            "model": weights,
            # Holds the learning rate; timm's schedules have no state of their own.
            "optimizer": state.optimizer.state_dict(),
            "ema": None if state.ema is None else state.ema.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            "rng": gather_object([rng_state()]),
        }
        if accelerator.is_main_process:
            write_checkpoint(self._path, self._settings, content)
        accelerator.wait_for_everyone()

    def _found(self) -> dict[str, Any] | None:
        """Return the content of the checkpoint, or None where there is none yet."""
        if self._path is None or not self._path.exists():
            return None
        content: dict[str, Any] = read_checkpoint(self._path, self._settings)
        return content

    def _restore(self, content: dict[str, Any]) -> dict[str, Any]:
        """Put every part back, callbacks first, and return the random state for the next minibatch."""
        state, accelerator = self._state, self._accelerator
        rank = accelerator.process_index
        try:
            states = content["callbacks"] if rank == 0 else content["callbacks_of_others"][rank - 1]
            # First, since a callback that had shrunk the model must shrink it again before its weights fit.
            for callback, saved in zip(self._callbacks, states, strict=True):
                callback.load_state_dict(saved)
            state.model.load_state_dict(content["model"])
            state.optimizer.load_state_dict(content["optimizer"])
            if state.ema is not None:
                state.ema.load_state_dict(content["ema"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(content["scaler"])
            self._history = content["history"]
            self._loss_sum, self._images, self._seconds = content["running"]
            rng: dict[str, Any] = content["rng"][rank]
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise TrainingError(f"checkpoint {self._path} does not fit this run: {reason}") from error
        return rng


def _finite(tensors: list[torch.Tensor]) -> bool:
    """Return whether every value of every tensor is finite."""
    # One transfer from the device, not one a tensor.
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
