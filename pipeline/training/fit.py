"""Train one adapter: from encoded pairs to a finished folder, going on from the newest whole checkpoint.

Importing this takes seconds: it imports TRL and peft.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig

from pipeline.errors import CageError, ConfigurationError
from pipeline.hub.model_facts import reason_of
from pipeline.hub.weight_files import ADAPTER_CONFIG
from pipeline.training.backbone import Backbone
from pipeline.training.checks import PairScore, pick_examples, summarise
from pipeline.training.data import EncodedPair
from pipeline.training.folders import TrainingFolder
from pipeline.training.progress import ProgressCallback, newest_checkpoint
from pipeline.training.settings import Loss, TrainingConfig
from pipeline.training.trainers import ArmTrainer, PolicyTrainer, answer_logprobs, as_dataset, make_collator
from pipeline.worker.loading import pick_dtype

NUM_LOGS = 50


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter to train. Picklable.

    Args:
        name: of the objective, and of the folder.
        backbone: what it is trained on.
        training: how.
        train, held_out: its pairs.
        folder: where it goes.
    """

    name: str
    backbone: Backbone
    training: TrainingConfig
    train: Sequence[EncodedPair]
    held_out: Sequence[EncodedPair]
    folder: TrainingFolder


def fit(task: Task, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, measure and write one adapter, unless it is finished; what is stated beside it.

    Raises:
        ConfigurationError: the model cannot be trained so.
        CageError: the training diverged.
    """
    if (facts := task.folder.facts(task.name)) is not None:
        return facts
    disable_progress_bar()  # of transformers, when a checkpoint is written
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainers' own libraries
        trainer = _make_trainer(task, say)
        checkpoint = newest_checkpoint(task.folder.work(task.name))
        if checkpoint is not None:
            say(f"{task.name}: goes on from {checkpoint.name}")
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if not all(torch.isfinite(each).all() for each in trainer.model.parameters() if each.requires_grad):
            raise CageError(f"{task.name}: the training diverged; lower training.learning_rate")
        trainer.accelerator.wait_for_everyone()
        if not trainer.accelerator.is_main_process:
            return {}
        return _finish(task, trainer)


def _make_trainer(task: Task, say: Callable[[str], None]) -> Any:
    from peft import LoraConfig

    training, backbone = task.training, task.backbone
    targets = training.target_modules
    lora = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha or 2 * training.rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    model, tokenizer = backbone.load_model(), backbone.load_tokenizer()
    options: dict[str, Any] = {
        "model": model,
        "args": make_arguments(task),
        "processing_class": tokenizer,
        "train_dataset": as_dataset(task.train, task.name),
        "data_collator": make_collator(tokenizer.eos_token_id or 0),
        "peft_config": lora,
        "callbacks": [ProgressCallback(task.name, say)],
    }
    try:
        if training.loss is Loss.DPO:
            trainer: Any = PolicyTrainer(**options)
        else:
            trainer = ArmTrainer(length_normalization=training.length_normalization, **options)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:  # as TRL and peft refuse
        raise ConfigurationError(f"{backbone.source.name} cannot be trained so: {reason_of(error)}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_arguments(task: Task) -> DPOConfig:
    """The trainer's arguments."""
    training, device = task.training, task.backbone.device
    is_cpu, dtype = device.type == "cpu", pick_dtype(task.backbone.spec.dtype, device)
    arguments = DPOConfig(
        output_dir=str(task.folder.work(task.name)),
        use_cpu=is_cpu,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        learning_rate=training.learning_rate,
        num_train_epochs=training.epochs,
        lr_scheduler_type="cosine",
        weight_decay=training.weight_decay,
        beta=training.effective_beta,
        max_length=None,
        gradient_checkpointing=not is_cpu,
        save_strategy="steps",
        save_total_limit=2,
        eval_strategy="no",
        seed=training.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not is_cpu,
        log_level="error",
    )
    if arguments.n_gpu > 1:  # one process uses one; `accelerate launch` starts a process for each
        arguments._n_gpu = 1
    per_device, accumulation = split_batch(training.batch_size, training.device_batch_size, arguments.world_size)
    num_steps = math.ceil(math.ceil(len(task.train) / training.batch_size) * training.epochs)
    arguments.per_device_train_batch_size = per_device
    arguments.gradient_accumulation_steps = accumulation
    arguments.warmup_steps = round(num_steps * training.warmup)
    arguments.save_steps = max(1, num_steps // training.checkpoints)
    arguments.logging_steps = max(1, num_steps // NUM_LOGS)
    return arguments


def split_batch(batch_size: int, most_at_once: int, num_processes: int) -> tuple[int, int]:
    """How many pairs a process computes at once, and how often, for one step of the optimizer.

    Raises:
        ConfigurationError: the processes cannot share the batch equally.
    """
    if batch_size % num_processes:
        raise ConfigurationError(
            f"training.batch_size must be a multiple of the number of processes, {num_processes}; got {batch_size}"
        )
    of_process = batch_size // num_processes
    at_once = next(count for count in range(min(most_at_once, of_process), 0, -1) if of_process % count == 0)
    return at_once, of_process // at_once


def _finish(task: Task, trainer: Any) -> dict[str, Any]:
    """Measure the adapter on held-out pairs and write it."""
    training = task.training
    facts: dict[str, Any] = {
        "name": task.name,
        "loss": str(training.loss),
        "beta": training.effective_beta,
        "backbone": {"name": task.backbone.source.name, "identity": task.backbone.source.identity},
        "pairs": len(task.train),
        "steps": trainer.state.global_step,
        "training_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
        "settings": training.model_dump(mode="json", exclude={"judge"}),
        "held_out": _measure(task, trainer) if task.held_out else None,
    }
    prepared = task.folder.work(task.name) / "finished"
    shutil.rmtree(prepared, ignore_errors=True)
    trainer.model.save_pretrained(prepared, save_embedding_layers=False)
    describe_adapter(prepared, {"base_model_name_or_path": task.backbone.source.name})
    task.folder.finish(task.name, prepared, facts)
    return facts


def describe_adapter(folder: Any, changes: Mapping[str, Any]) -> None:
    """Change entries of a saved adapter's configuration, and remove the card that peft writes."""
    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text("utf-8")) | dict(changes)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def _measure(task: Task, trainer: Any) -> dict[str, Any]:
    training = task.training
    scores = score_pairs(trainer, task.held_out, task.name, training.device_batch_size)
    is_policy, per_token = training.loss is Loss.DPO, training.length_normalization
    used = [score.per_token() for score in scores] if per_token else scores
    margins = [score.margin_to_backbone if is_policy else score.margin for score in used]
    summary = summarise(scores, beta=training.effective_beta, is_policy=is_policy, per_token=per_token)
    return {**summary, "examples": pick_examples(task.held_out, margins, task.name)}


@torch.no_grad()
def score_pairs(trainer: Any, pairs: Sequence[EncodedPair], objective: str, at_once: int) -> list[PairScore]:
    """The log-likelihoods of pairs under the trained model, and under its backbone."""
    model = trainer.model.eval()
    dataset = as_dataset(pairs, objective)
    scores: list[PairScore] = []
    for start in range(0, len(pairs), at_once):
        batch = trainer.data_collator([dataset[at] for at in range(start, min(start + at_once, len(pairs)))])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        with trainer.accelerator.autocast():
            logprobs, num_tokens = answer_logprobs(model, batch)
            with model.disable_adapter():
                before, _ = answer_logprobs(model, batch)
        halves = [each.tolist() for tensor in (logprobs, before, num_tokens) for each in tensor.chunk(2)]
        scores += [PairScore(*each) for each in zip(*halves, strict=True)]
    return scores
