"""transformers: its loss for causal language models without a float32 copy of the logits."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpeft.expected import find, parameters, why_not
from fastpeft.ops import cross_entropy

LOSS_MAPPING = find("loss", "transformers.loss.loss_utils:LOSS_MAPPING")
ForCausalLMLoss = find("loss", "transformers.loss.loss_utils:ForCausalLMLoss")
parameters(
    "loss", ForCausalLMLoss, "logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels"
)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """transformers' `ForCausalLMLoss`, same arguments and value: the mean over the labels, or the sum divided by
    `num_items_in_batch`, where token n predicts token n + 1 unless `shift_labels` is given."""
    if type(logits) is not Tensor:  # a sharded tensor has operations of its own
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.reshape(-1).to(logits.device)
    losses = cross_entropy(logits.reshape(-1, vocab_size), shift_labels, ignore_index=ignore_index)
    if num_items_in_batch is None:
        return losses.sum() / (shift_labels != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch


def fuse_loss(model: nn.Module) -> bool:
    """Gives `causal_lm_loss` to each causal language model inside `model` that has the stock loss; True if any has."""
    found = False
    if why_not("loss") is not None:
        return False
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            # A loss_type that transformers does not know means the causal loss to it, too.
            stock = LOSS_MAPPING.get(getattr(module, "loss_type", None), ForCausalLMLoss)
            if stock is ForCausalLMLoss and "_loss_function" not in vars(module):
                module.loss_function = causal_lm_loss
            found |= vars(module).get("_loss_function") is causal_lm_loss
    return found


def restore_loss(model: nn.Module) -> None:
    """Undoes `fuse_loss`; a loss that somebody else has set stays."""
    for module in model.modules():
        if vars(module).get("_loss_function") is causal_lm_loss:
            del module._loss_function
