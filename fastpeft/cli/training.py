"""The Trainer of TRL or transformers, set up for a run of `fastpeft finetune`."""

import copy
import math
from pathlib import Path

import torch
import transformers
from transformers import PrinterCallback, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from fastpeft.cli import tasks
from fastpeft.cli.errors import BadInput
from fastpeft.cli.methods import encoder_of, load_head, load_peft_head, save_head
from fastpeft.cli.models import Dtype
from fastpeft.cli.tasks import TASKS
from fastpeft.nn import delete_bottleneck, load_bottleneck, save_bottleneck
from fastpeft.nn.prefix import load_encoder, save_encoder

CHECKPOINTS_A_RUN = 5
# However long the run is, no more than this is lost when it is interrupted.
MOST_STEPS_BETWEEN_CHECKPOINTS = 100
# An evaluation can take as long as several steps.
EVALUATIONS_A_RUN, FEWEST_STEPS_BETWEEN_EVALUATIONS = 4, 6
# So many points are enough for a curve.
LOGS_A_RUN = 100


def optimizer_name(given: str | None, device) -> str:
    from transformers.training_args import OptimizerNames

    if given is None:
        return "paged_adamw_8bit" if device.type == "cuda" else "adamw_torch"
    known = [name.value for name in OptimizerNames]
    if given not in known:
        raise BadInput(f"--optimizer: unknown '{given}'; transformers knows {', '.join(known)}")
    return given


def packing(kind: str, settings) -> dict:
    """How examples share a row.

    text: one stream, cut at the sequence length. Conversations: whole, several in a row, kept apart by their position
    ids, from which transformers builds the mask where there is no flash attention. Where peft puts virtual tokens
    before a row, it drops the position ids, and only a row's first conversation would have them: then one to a row.
    """
    if kind == "text":
        return {"packing": True, "packing_strategy": "wrapped", "include_num_input_tokens_seen": "non_padding"}
    if settings.way.family == "prompt" or (settings.way.family == "prefix" and not settings.accelerate):
        return {"packing": False, "include_num_input_tokens_seen": "non_padding"}
    # Rows are joined: there is no padding.
    return {"packing": True, "packing_strategy": "bfd", "include_num_input_tokens_seen": "all"}


class Checkpoints:
    """For a Trainer: what it does not save and load itself."""

    def _save(self, output_dir=None, state_dict=None):
        folder, family = Path(output_dir or self.args.output_dir), self.settings.way.family
        if family != "adapter":
            super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        if family == "adapter":
            save_bottleneck(self.model, folder)
            save_head(self.model, folder)
            self.processing_class.save_pretrained(folder)
        elif encoder := encoder_of(self.model):
            save_encoder(encoder, folder)
        if TASKS[self.settings.task].has_head:
            config = copy.deepcopy(self.model.config)  # with the names of the classes
            vars(config).pop("quantization_config", None)  # of the model in memory; the checkpoint's is not in 4 bits
            config.save_pretrained(folder)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody needs

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder, encoder = Path(resume_from_checkpoint), encoder_of(self.model)
        if self.settings.way.family == "adapter":
            load_bottleneck(self.model, folder, "resumed")
            delete_bottleneck(self.model, "default")  # not before: a model's first adapter freezes the head
            load_head(self.model, folder)
        elif encoder is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif load_encoder(encoder, folder):
            load_peft_head(self.model, folder)
        else:
            raise FileNotFoundError(f"{folder} does not hold the encoder of the virtual tokens")


class TextTrainer(Checkpoints, SFTTrainer):
    pass


class TaskTrainer(Checkpoints, Trainer):
    pass


def arguments(settings, output, device, *, evaluates: bool) -> dict:
    steps = settings.steps
    return {
        "output_dir": str(output.checkpoints),
        "max_steps": steps,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # of all steps
        "optim": optimizer_name(settings.optimizer, device),
        "seed": settings.seed,
        "use_cpu": device.type == "cpu",
        "bf16": settings.dtype == Dtype.bf16,
        "fp16": settings.dtype == Dtype.fp16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": max(1, steps // LOGS_A_RUN),
        "logging_first_step": True,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": max(FEWEST_STEPS_BETWEEN_EVALUATIONS, math.ceil(steps / EVALUATIONS_A_RUN)),
        "eval_on_start": evaluates and output.resume_point(steps) is None,
        "save_steps": min(MOST_STEPS_BETWEEN_CHECKPOINTS, math.ceil(steps / CHECKPOINTS_A_RUN)),
        "save_total_limit": 2,  # one more than needed, for an interruption while the newest is written
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,  # there is one bar, ours
        "report_to": "none",
    }


def build(settings, output, model, tokenizer, train, evaluation, kind: str, device, bar):
    """train, evaluation: rows of text for TRL, or the features of a task."""
    task = TASKS[settings.task]
    common = arguments(settings, output, device, evaluates=evaluation is not None)
    if task.features is None:
        config = SFTConfig(**common, max_length=settings.seq_len, shuffle_dataset=True, **packing(kind, settings))
        trainer_class, more = TextTrainer, {}
    else:
        config = TrainingArguments(
            **common,
            include_num_input_tokens_seen="non_padding",
            remove_unused_columns=False,  # there are none
            label_names=list(task.targets),
        )
        trainer_class = TaskTrainer
        more = {
            "data_collator": getattr(transformers, task.collator)(tokenizer),
            "compute_metrics": tasks.compute_metrics(task),
            "preprocess_logits_for_metrics": task.choose,
        }
    if config.n_gpu > 1:  # one process drives one GPU; several are for torchrun or accelerate launch
        config._n_gpu = 1
    if settings.way.family == "adapter" and settings.four_bit:
        model._hf_peft_config_loaded = True  # so transformers asks whether a 4-bit model has something to train
    trainer = trainer_class(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=[bar],
        **more,
    )
    trainer.settings = settings
    trainer.remove_callback(PrinterCallback)
    # TRL turns the adapters of a 4-bit model to bfloat16; small updates are lost in it, so they go back to float32.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


# The greatest resident size so far is kept by the kernel, and forgotten when a 5 is written here: see proc(5).
_PROCESS = Path("/proc/self")


def start_peak(device) -> None:
    """What `peak_bytes` tells begins here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (_PROCESS / "clear_refs").exists():
        (_PROCESS / "clear_refs").write_text("5")


def peak_bytes(device) -> int | None:
    """The most memory since `start_peak`: on CUDA what torch has allocated on the device, model included; on a CPU the
    resident size of the whole process, Python and its libraries included. None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not (_PROCESS / "clear_refs").exists():
        return None
    line = next(line for line in (_PROCESS / "status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024  # in kB


def eval_results(trainer) -> tuple[float | None, float | None, dict[str, float]]:
    """Loss before and after training, and what else the task measures after it, from the log; the last step is
    evaluated if it was not."""
    if trainer.eval_dataset is None:
        return None, None, {}
    evaluated = [row["step"] for row in trainer.state.log_history if "eval_loss" in row]
    if evaluated[-1] != trainer.state.global_step:
        trainer.evaluate()
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    names = ("accuracy", "token_accuracy", "exact_match", "f1")
    return (
        rows[0]["eval_loss"],
        rows[-1]["eval_loss"],
        {n: rows[-1][f"eval_{n}"] for n in names if f"eval_{n}" in rows[-1]},
    )
