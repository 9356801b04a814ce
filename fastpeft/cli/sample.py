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
    if "prompt" in example:
        return tokenizer(example["prompt"])["input_ids"]
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
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()


def sample_text(prompt: str, before: str, after: str) -> str:
    return f"prompt\n{prompt}\n\nbefore\n{before}\n\nafter\n{after}\n"
