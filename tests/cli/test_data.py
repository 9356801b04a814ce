import csv
import json

import pytest


def chat(i):
    return [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i} is a number."}]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_txt(path):
    path.write_text("\n\n".join(f"Paragraph {i}\nhas two lines." for i in range(6)))


def write_csv(path):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "other"], *([f"row {i}", i] for i in range(6))])


def write_parquet(path):
    from datasets import Dataset

    Dataset.from_dict({"text": [f"row {i}" for i in range(6)]}).to_parquet(str(path))


def write_chat(path):
    write_lines(path, [{"messages": chat(i), "source": "made up"} for i in range(6)])


def write_completion(path):
    write_lines(path, [{"prompt": f"What is {i}?", "completion": f" {i} is a number."} for i in range(6)])


def write_chat_completion(path):
    write_lines(path, [{"prompt": chat(i)[:1], "completion": chat(i)[1:]} for i in range(6)])


FILES = {
    "text.txt": (write_txt, "text"),
    "text.csv": (write_csv, "text"),
    "text.parquet": (write_parquet, "text"),
    "chat.jsonl": (write_chat, "chat"),
    "completion.jsonl": (write_completion, "completion"),
    "chat_completion.jsonl": (write_chat_completion, "completion"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_trains(name, finetune, tmp_path):
    write, kind = FILES[name]
    write(tmp_path / name)
    code, out, err = finetune(data=tmp_path / name, steps=1)
    assert (code, err) == (0, "")
    assert f"5 examples to train on, 1 to evaluate ({kind})" in out
    sample = (tmp_path / "run" / "sample.txt").read_text()
    if kind != "text":  # the model is asked, and not shown the answer
        assert "What is" in sample.split("before")[0]
        assert "is a number" not in sample.split("before")[0]


def test_pydoc_is_real_text_without_a_download():
    from fastpeft.cli import data

    train, held_out, kind = data.load("pydoc", 0.05, seed=0)
    assert kind == "text"
    assert sum(map(len, train["text"])) > 300_000
    assert 1 <= len(held_out) < 10
    assert not set(train["text"]) & set(held_out["text"])


def test_the_split_depends_on_the_seed_only(jsonl):
    from fastpeft.cli import data

    first, again, other = (data.load(str(jsonl), 0.2, seed=seed)[1]["text"][:] for seed in (0, 0, 1))
    assert first == again != other


def test_packed_conversations_do_not_see_each_other(model_dir):
    """Conversations share a row, told apart by position ids alone; this must hold without flash attention."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    a, b = torch.arange(10, 30)[None], torch.arange(40, 55)[None]
    positions = torch.cat([torch.arange(20), torch.arange(15)])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat([a, b], 1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(input_ids=a).logits, model(input_ids=b).logits], 1)
        leaking = model(input_ids=torch.cat([a, b], 1)).logits
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert (leaking - alone).abs().max() > 1e-3
