"""The Trainer of TRL, set up for a run of `fastpeft finetune`."""

import math

from fastpeft.cli.errors import BadInput

CHECKPOINTS_A_RUN = 5
# However long the run is, no more than this is lost when it is interrupted.
MOST_STEPS_BETWEEN_CHECKPOINTS = 100
EVALUATIONS_A_RUN = 4
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


def packing(kind: str) -> dict:
    """How examples share a row.

    text: one stream, cut at the sequence length. Conversations: whole, several in a row, kept apart by their position
    ids, from which transformers builds the mask where there is no flash attention.
    """
    if kind == "text":
        return {"packing_strategy": "wrapped", "include_num_input_tokens_seen": "non_padding"}
    return {"packing_strategy": "bfd", "include_num_input_tokens_seen": "all"}  # rows are joined: there is no padding


def build(settings, output, model, tokenizer, train, evaluation, kind: str, device, bar):
    import torch
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from fastpeft.cli.models import compute_dtype

    half = compute_dtype(device)
    steps = settings.steps
    config = SFTConfig(
        output_dir=str(output.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        max_length=settings.seq_len,
        packing=True,
        shuffle_dataset=True,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # of all steps
        optim=optimizer_name(settings.optimizer, device),
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        bf16=half == torch.bfloat16,
        fp16=half == torch.float16,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=max(1, steps // LOGS_A_RUN),
        logging_first_step=True,
        eval_strategy="no" if evaluation is None else "steps",
        eval_steps=math.ceil(steps / EVALUATIONS_A_RUN),
        eval_on_start=evaluation is not None and output.resume_point(steps) is None,
        save_steps=min(MOST_STEPS_BETWEEN_CHECKPOINTS, math.ceil(steps / CHECKPOINTS_A_RUN)),
        save_total_limit=2,  # one more than needed, for an interruption while the newest is written
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,  # there is one bar, ours
        report_to="none",
        **packing(kind),
    )
    if config.n_gpu > 1:  # one process drives one GPU; several are for torchrun or accelerate launch
        config._n_gpu = 1
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=[bar],
    )
    trainer.remove_callback(PrinterCallback)
    # TRL turns the adapters of a 4-bit model to bfloat16; small updates are lost in it, so they go back to float32.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def eval_losses(trainer) -> tuple[float, float] | tuple[None, None]:
    """Before and after training, from the log; the last step is evaluated if it was not."""
    if trainer.eval_dataset is None:
        return None, None
    evaluated = [row["step"] for row in trainer.state.log_history if "eval_loss" in row]
    if evaluated[-1] != trainer.state.global_step:
        trainer.evaluate()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    return losses[0], losses[-1]
