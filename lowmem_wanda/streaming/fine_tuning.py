"""Fine-tuning of a whole pruned model in memory, through transformers' Trainer, with its zeros held.

LoRA (arXiv 2106.09685) through peft: an adapter's product is masked like the matrix it is added to, while it is trained
and when it is merged, so that the merged model is the trained one and as sparse as before. Or all weights of the
blocks, whose gradients are masked.
"""

import math
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from lowmem_wanda.errors import LowmemError, ModelError, NumberError
from lowmem_wanda.streaming.buffers import DTYPES
from lowmem_wanda.streaming.model import StreamedModel
from lowmem_wanda.streaming.walk import Notify

ALPHA = 2  # an adapter's product is scaled by this
WARM = 0.05  # of the steps, in which the rate rises; then it falls as a cosine


@dataclass(frozen=True)
class FineTuned:
    """What training made: `tensors` that changed, by file tensor in the stored dtype, and losses `before` and `after`.

    Losses are the mean negative log-likelihood of a token of the sequences that were held out.
    """

    tensors: Mapping[str, torch.Tensor]
    before: float
    after: float


def fine_tune(
    opened: StreamedModel,
    pruned: Collection[str],
    training: np.ndarray,
    held_out: np.ndarray,
    *,
    rank: int | None,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    on_step: Notify,
) -> FineTuned:
    """Trains an opened model whose matrices `pruned` (file tensors) hold zeros, on token ids (sequences, length).

    `rank` is that of the adapters; None trains all weights of the blocks. The whole model is loaded, in float32.
    Raises LowmemError without peft, NumberError where training diverges.
    """
    peft = require_peft() if rank else None
    model = _whole(opened)
    names = _plain_names(opened, pruned)
    masked = {path: model.get_parameter(path) != 0 for path, name in names.items() if name in pruned}
    trained = set(masked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what transformers will remove, in its own calls; of transposed matrices
        if peft:
            wrapped = _with_adapters(peft, model, masked, rank)
        else:
            wrapped, trained = model, {path for path in names if path in dict(model.named_parameters())}
            _train_only(model, trained, masked)
        before = _loss(wrapped, held_out, batch)
        with _trainer(wrapped, training, steps, rate, batch, seed, on_step, opened.device) as trainer:
            trainer.train()
        after = _loss(wrapped, held_out, batch)
    if not math.isfinite(after):
        raise NumberError("training diverged, so nothing was written; give a smaller --learning-rate")
    if peft:
        _merge(model, masked)
    weights = {path.replace(".base_layer.", "."): value.detach() for path, value in model.named_parameters()}
    dtypes = {path: DTYPES[opened.checkpoint.tensors[names[path]].dtype] for path in trained}
    return FineTuned({names[path]: weights[path].cpu().to(dtypes[path]) for path in trained}, before, after)


def _plain_names(opened: StreamedModel, pruned: Collection[str]) -> dict[str, str]:
    """{parameter in a block: file tensor} of those that are stored as they are. Raises ModelError for pruned others."""
    inside = {path: view for path, view in opened.skeleton.names.items() if path.startswith(f"{opened.skeleton.path}.")}
    names = {path: view.tensor for path, view in inside.items() if view.is_whole}
    if others := sorted(set(pruned) - set(names.values())):
        raise ModelError(f"tensor {others[0]}: experts, and what is stored in parts, are not fine-tuned yet")
    return names


def _whole(opened: StreamedModel) -> Any:
    """The whole model with its weights in float32, on the device."""
    logging.disable_progress_bar()
    code = opened.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(
        opened.checkpoint.path, dtype=torch.float32, local_files_only=True, trust_remote_code=code
    )
    model.config.use_cache = False
    return model.to(opened.device)


def require_peft() -> Any:
    """The peft package. Raises LowmemError, saying how to install it."""
    try:
        import peft
    except ImportError:
        raise LowmemError("LoRA needs a package that is not installed: pip install peft (or give --full)") from None
    return peft


def _with_adapters(peft: Any, model: nn.Module, masked: Mapping[str, torch.Tensor], rank: int | None) -> nn.Module:
    """The model with an adapter beside each masked matrix, whose product is masked too."""
    modules = [path.rpartition(".")[0] for path in masked]
    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA * (rank or 1), lora_dropout=0.0, target_modules=modules)
    wrapped: nn.Module = peft.get_peft_model(model, config)
    for path, mask in masked.items():
        layer: Any = model.get_submodule(path.rpartition(".")[0])
        layer.forward = partial(_adapted, layer, mask)
    return wrapped


def _adapted(layer: Any, mask: torch.Tensor, inputs: torch.Tensor) -> Any:
    """The output of a matrix with its adapter, for inputs (..., columns)."""
    weight = layer.base_layer.weight + layer.get_delta_weight("default") * mask
    return functional_call(layer.base_layer, {"weight": weight}, (inputs,))


@torch.no_grad()
def _merge(model: nn.Module, masked: Mapping[str, torch.Tensor]) -> None:
    """Adds each adapter's masked product to its matrix."""
    for path, mask in masked.items():
        layer: Any = model.get_submodule(path.rpartition(".")[0])
        layer.base_layer.weight += layer.get_delta_weight("default") * mask


def _train_only(model: nn.Module, trained: Collection[str], masked: Mapping[str, torch.Tensor]) -> None:
    """Has the model train some parameters, those that are masked where they are not zero."""
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in trained)
        if path in masked:
            parameter.register_hook(partial(torch.mul, masked[path]))


class _Steps(TrainerCallback):
    """Tells of each step."""

    def __init__(self, on_step: Notify) -> None:
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.on_step({"index": state.global_step - 1})


@torch.no_grad()
def _loss(model: nn.Module, tokens: np.ndarray, batch: int) -> float:
    """The mean negative log-likelihood of the tokens (sequences, length) but the first of each sequence."""
    model.eval()
    total = 0.0
    for ids in _ids(tokens).split(batch):
        ids = ids.to(next(model.parameters()).device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return float(total / (len(tokens) * (tokens.shape[1] - 1)))


def _ids(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64))


@contextmanager
def _trainer(
    model: nn.Module, training: np.ndarray, steps: int, rate: float, batch: int, seed: int, on_step: Notify,
    device: torch.device,
) -> Iterator[Trainer]:  # fmt: skip
    """transformers' Trainer, which keeps nothing on the disk."""
    rows = [{"input_ids": row, "labels": row} for row in _ids(training)]
    with tempfile.TemporaryDirectory(prefix="lowmem-wanda-") as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate,
            lr_scheduler_type="cosine", warmup_steps=max(1, int(WARM * steps)), weight_decay=0.0,
            seed=seed % (1 << 32), save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=device.type == "cpu", dataloader_pin_memory=device.type == "cuda",
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[_Steps(on_step)])
        trainer.remove_callback(PrinterCallback)
        yield trainer
