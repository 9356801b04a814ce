"""A short greedy continuation, to see with one's own eyes what the training did."""

PROMPT_TOKENS = 24
NEW_TOKENS = 40


def prompt_of(example: dict, tokenizer) -> list[int]:
    """The part of an example before what the model is to write."""
    if "messages" in example:
        asked = example["messages"][:-1] or example["messages"]
        return tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
    if isinstance(example.get("prompt"), list):
        return tokenizer.apply_chat_template(
            example["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    for column in ("prompt", "source"):
        if column in example:
            return tokenizer(example[column])["input_ids"]
    return tokenizer(example["text"])["input_ids"][:PROMPT_TOKENS]


def continuation(model, tokenizer, prompt: list[int]) -> str:
    import torch

    was_training = model.training
    model.eval()
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    new = out[0] if model.config.is_encoder_decoder else out[0, len(prompt) :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


class Sample:
    """What the model writes before and after training. A fresh LoRA changes nothing, a fresh prefix does."""

    def __init__(self, model, tokenizer, example: dict):
        self.parts = model, tokenizer, prompt_of(example, tokenizer)
        self.before = continuation(*self.parts)

    def after(self) -> str:
        """The text that compares the two."""
        _, tokenizer, prompt = self.parts
        return f"prompt\n{tokenizer.decode(prompt)}\n\nbefore\n{self.before}\n\nafter\n{continuation(*self.parts)}\n"
