"""The optimiser's part of training, which is DeepSpeed's: mixed precision, averaged gradients, checkpoints."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from apb_ds.training.config import TrainingConfig

NEVER = 1_000_000_000  # steps between the lines that DeepSpeed prints
STEP_KEY = "step"
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own variable; it overrides the argument of torch.load


class Trainer:
    """A module in DeepSpeed's engine, data-parallel over all ranks. Frozen parameters do not change.

    Parameters
    ----------
    module : nn.Module
        On its device; returns the losses of a batch, (conversations,).
    config : TrainingConfig
        Its optimiser settings: steps, learning rate, warm-up, decay, clipping.
    dtype : torch.dtype
        Of the module. In half precision the optimiser keeps a float32 copy of the trained parameters.
    directory : Path
        Where checkpoints go; only the newest is kept.

    Attributes
    ----------
    step : number of completed steps, including those before a resume
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, dtype: torch.dtype, directory: Path) -> None:
        self._directory = directory
        self._engine = _engine(module, config, dtype)
        self.step = 0

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one; return the number of completed steps."""
        if (self._directory / "latest").is_file():
            with contextlib.redirect_stdout(io.StringIO()), _tensors_only():
                # Checkpoints leave out frozen parameters: the model has brought them.
                _, state = self._engine.load_checkpoint(str(self._directory), load_module_strict=False)
            self.step = int(state[STEP_KEY])
        return self.step

    def train(self, *inputs: Tensor) -> Tensor:
        """Do one step; return the losses of this rank's batch, (conversations,), float32."""
        losses = self._engine(*inputs)
        self._engine.backward(losses.mean())
        self._engine.step()
        self.step += 1
        return losses.detach()

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self._engine.get_lr()[0])

    def save(self, *, is_first: bool) -> None:
        """Write a checkpoint and remove older ones, on all ranks together; `is_first` on one of them.

        Raises
        ------
        RuntimeError
            On all ranks, if the last step's gradient is not finite: the parameters are lost, and nothing is written.
        """
        norm = self._engine.get_global_grad_norm()
        # DeepSpeed skips such steps in float16 and float32, where it lowers the loss scale: parameters are unchanged.
        if self._engine.was_step_applied() and norm is not None and (norm < 0 or not math.isfinite(norm)):
            raise RuntimeError(f"the gradient of step {self.step} is not finite; the previous checkpoint is kept.")
        tag = f"step-{self.step}"
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine.save_checkpoint(
                str(self._directory), tag=tag, client_state={STEP_KEY: self.step}, exclude_frozen_parameters=True
            )
        if is_first:
            for folder in self._directory.glob("step-*"):
                if folder.name != tag:
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Make torch read pickles as tensors, plain values and the few classes that DeepSpeed saves.

    DeepSpeed would load any object, and so run any code that someone has put into a checkpoint.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(classes), mock.patch.dict(os.environ, {WEIGHTS_ONLY: "1"}):
        yield


def _engine(module: nn.Module, config: TrainingConfig, dtype: torch.dtype) -> Any:
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from transformers import get_scheduler

    if dtype == torch.float16 and not get_accelerator().is_fp16_supported():
        raise ValueError(
            "model.dtype='float16': DeepSpeed does not train in it on this device; use bfloat16 or float32."
        )
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.95)
    )
    deepspeed_config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0 if config.clips_values else config.clip,
        "zero_optimization": {"stage": 1},
        # Checking each gradient of many small parameters takes longer than the step; `save` checks their norm.
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": NEVER,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameters,
            optimizer=optimizer,
            lr_scheduler=lambda wrapped: get_scheduler(config.schedule, wrapped, config.warmup_steps, config.steps),
            config=deepspeed_config,
        )
    if config.clips_values:
        for parameter in parameters:
            parameter.register_hook(lambda gradient: gradient.clamp(-config.clip, config.clip))
    return engine
