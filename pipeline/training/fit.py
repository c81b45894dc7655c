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
from pipeline.hub.preference_adapters import PreferenceForm
from pipeline.hub.weight_files import ADAPTER_CONFIG
from pipeline.training.backbone import Backbone
from pipeline.training.data import EncodedPair
from pipeline.training.folders import TrainingFolder
from pipeline.training.measure import measure
from pipeline.training.preference import (
    LabelledCollator,
    PreferenceArmTrainer,
    as_labelled_dataset,
    save_preference_adapter,
)
from pipeline.training.progress import ProgressCallback, newest_checkpoint
from pipeline.training.settings import Loss, TrainingConfig
from pipeline.training.trainers import ArmTrainer, PolicyTrainer, as_dataset, make_collator
from pipeline.training.value import make_value_trainer, measure_values, save_value_head, scored_answers
from pipeline.worker.devices import pick_dtype

NUM_LOGS = 50


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter to train. Picklable.

    Args:
        name: of the folder, and of the objective where it has one.
        backbone: what it is trained on.
        training: how.
        train, held_out: its pairs.
        folder: where it goes.
        objectives: that it is trained for.
    """

    name: str
    backbone: Backbone
    training: TrainingConfig
    train: Sequence[EncodedPair]
    held_out: Sequence[EncodedPair]
    folder: TrainingFolder
    objectives: tuple[str, ...]

    @property
    def form(self) -> PreferenceForm | None:
        """Of an adapter that depends on a preference vector."""
        training = self.training
        if training.loss is not Loss.PREFERENCE_ARM:
            return None
        rank = training.preference_rank
        return PreferenceForm(training.rank, rank, training.alpha or 2 * rank, self.objectives)


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

    training, backbone, form = task.training, task.backbone, task.form
    targets = training.target_modules
    lora = LoraConfig(
        r=training.rank + (0 if form is None else form.rank),
        lora_alpha=training.alpha or 2 * training.rank,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    if training.loss is Loss.VALUE:
        callbacks = [ProgressCallback(task.name, say)]
        try:
            trainer: Any = make_value_trainer(task, make_arguments(task), lora, callbacks)
        except (ValueError, TypeError) as error:  # as peft refuses
            raise ConfigurationError(f"{backbone.source.name} cannot be trained so: {reason_of(error)}") from error
        trainer.remove_callback(PrinterCallback)
        return trainer
    model, tokenizer = backbone.load_model(), backbone.load_tokenizer()
    pad_id = tokenizer.eos_token_id or 0
    options: dict[str, Any] = {
        "model": model,
        "args": make_arguments(task),
        "processing_class": tokenizer,
        "train_dataset": as_dataset(task.train, task.name)
        if form is None
        else as_labelled_dataset(task.train, task.objectives),
        "data_collator": make_collator(pad_id) if form is None else LabelledCollator(pad_token_id=pad_id),
        "peft_config": lora,
        "callbacks": [ProgressCallback(task.name, say)],
    }
    try:
        if training.loss is Loss.DPO:
            trainer = PolicyTrainer(**options)
        elif form is None:
            trainer = ArmTrainer(length_normalization=training.length_normalization, **options)
        else:
            options |= {"form": form, "concentration": training.concentration}
            trainer = PreferenceArmTrainer(length_normalization=training.length_normalization, **options)
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
    num_rows = len(scored_answers(task.train, task.name) if training.loss is Loss.VALUE else task.train)
    num_steps = math.ceil(math.ceil(num_rows / training.batch_size) * training.epochs)
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
        "objectives": list(task.objectives),
        "loss": str(training.loss),
        "beta": training.effective_beta,
        "backbone": {"name": task.backbone.source.name, "identity": task.backbone.source.identity},
        "pairs": len(task.train),
        "steps": trainer.state.global_step,
        "training_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
        "settings": training.model_dump(mode="json", exclude={"judge"}),
        "held_out": {name: _measure(task, trainer, name) for name in task.objectives} if task.held_out else {},
    }
    prepared = task.folder.work(task.name) / "finished"
    shutil.rmtree(prepared, ignore_errors=True)
    if training.loss is Loss.VALUE:
        save_value_head(trainer, prepared, describe_adapter)
        describe_adapter(prepared, {"base_model_name_or_path": task.backbone.source.name})
    elif task.form is None:
        trainer.model.save_pretrained(prepared, save_embedding_layers=False)
        describe_adapter(prepared, {"base_model_name_or_path": task.backbone.source.name})
    else:
        save_preference_adapter(trainer.model, task.form, prepared, task.backbone.source.name)
    task.folder.finish(task.name, prepared, facts)
    return facts


def _measure(task: Task, trainer: Any, objective: str) -> dict[str, Any]:
    return measure_values(task, trainer) if task.training.loss is Loss.VALUE else measure(task, trainer, objective)


def describe_adapter(folder: Any, changes: Mapping[str, Any]) -> None:
    """Change entries of a saved adapter's configuration, and remove the card that peft writes."""
    file = folder / ADAPTER_CONFIG
    config = json.loads(file.read_text("utf-8")) | dict(changes)
    if isinstance(config.get("target_modules"), list):  # of a set: in another order in every process
        config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)
