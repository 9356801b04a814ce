"""Every task of `fastpeft finetune`: it learns, and what it leaves behind is what it trained."""

import json

import pytest
import torch

import fastpeft
from fastpeft.cli import tasks
from fastpeft.cli.errors import BadInput
from fastpeft.cli.methods import OPTIONS, WAYS, load_head
from fastpeft.cli.tasks import TASKS

WORDS = ["red", "blue", "green", "black"]


def labelled(i):
    return {"text": ["red ", "blue "][i % 2] * 4, "text_pair": f"{i}", "label": ["warm", "cold"][i % 2]}


def tagged(i):
    words = [WORDS[(i + k) % 4] for k in range(1 + i % 5)]
    return {"tokens": words, "tags": [word[0] for word in words]}


def asked(i):
    context = f"{'x' * (i % 3)} {WORDS[i % 4]} is it"
    start = context.index(WORDS[i % 4])
    return {"question": "which", "context": context, "answers": {"text": [WORDS[i % 4]], "answer_start": [start]}}


def translated(i):
    return {"source": f"{WORDS[i % 4]} {i}", "target": WORDS[(i + 1) % 4]}


ROWS = {
    "sequence-classification": labelled,
    "token-classification": tagged,
    "question-answering": asked,
    "seq2seq": translated,
}
MEASURES = {
    "sequence-classification": {"accuracy"},
    "token-classification": {"token_accuracy"},
    "question-answering": {"exact_match", "f1"},
    "seq2seq": {"token_accuracy"},
}
LR = {"lora": 3e-3, "adapter": 1e-2, "ia3": 3e-2, "full": 1e-3, "prompt": 3e-2, "prefix": 1e-2}


@pytest.fixture
def data(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def options_of(method):
    family = WAYS[method].family
    sizes = {"rank": 4, "bottleneck": 4, "prefix_length": 6}
    return {"method": method, "rank": None, "lr": LR[family]} | {
        name: value for name, value in sizes.items() if name in OPTIONS[family]
    }


def reloaded(task, method, base, run):
    """As its documentation says: the configuration of the run has the names of the classes."""
    import transformers
    from peft import PeftModel

    from fastpeft.integrations.bitsandbytes import close_cpu_trap

    family, auto = WAYS[method].family, getattr(transformers, TASKS[task].auto)
    config = transformers.AutoConfig.from_pretrained(run) if (run / "config.json").exists() else None
    model = auto.from_pretrained(run if family == "full" else base, config=config, dtype=torch.bfloat16)
    close_cpu_trap(model)
    if family == "adapter":
        fastpeft.nn.load_bottleneck(model, run)
        load_head(model, run)
    if WAYS[method].of_peft:
        model = PeftModel.from_pretrained(model, run)
    if task == "seq2seq" and family == "prefix":
        fastpeft.accelerate(model)  # peft reads it otherwise, see fastpeft.integrations.peft_prefix
    return model


def outputs(model):
    ids = torch.arange(40).view(2, 20) * 5 % 250
    extra = {"labels": ids[:, :7].contiguous()} if model.config.is_encoder_decoder else {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)
    return (out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits])).float()


@pytest.mark.parametrize(
    ("task", "model", "method"),
    [
        ("sequence-classification", "bert", "qlora"),
        ("sequence-classification", "bert", "adapter-houlsby"),
        ("sequence-classification", "bert", "prompt"),
        ("sequence-classification", "bert", "full"),
        ("sequence-classification", "llama", "p-tuning"),
        ("token-classification", "bert", "ia3"),
        ("token-classification", "bert", "p-tuning-v2"),
        ("question-answering", "bert", "dora"),
        ("question-answering", "bert", "adapter-pfeiffer"),
        ("question-answering", "bert", "prefix"),
        ("seq2seq", "t5", "lora"),
        ("seq2seq", "t5", "adapter-parallel"),
        ("seq2seq", "t5", "prefix"),
        ("seq2seq", "t5", "prompt"),
    ],
)
def test_it_learns_and_is_loaded_as_it_was_trained(
    task, model, method, finetune, trained, read_metrics, data, model_dir, other_models, tmp_path
):
    run, base = tmp_path / "run", {"llama": model_dir, **other_models}[model]
    rows = [ROWS[task](i) for i in range(60)]
    options = options_of(method) | {"steps": 30, "batch_size": 8, "eval_fraction": 0.2, "seq_len": 64}
    code, out, err = finetune(task=task, model=base, data=data(rows), **options)
    assert (code, err) == (0, "")
    metrics = read_metrics(run)
    assert metrics["task"] == task
    assert set(metrics["eval_metrics"]) == MEASURES[task]
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.02
    names = {p.name for p in run.iterdir()}
    assert ("sample.txt" in names) == (task == "seq2seq")
    assert "model.safetensors" not in names or method == "full"
    if TASKS[task].labels is not None:
        config = json.loads((run / "config.json").read_text())
        column = [row[TASKS[task].labels] for row in rows]
        flat = {name for value in column for name in (value if isinstance(value, list) else [value])}
        assert set(config["label2id"]) == flat

    ours, theirs = outputs(trained["model"]), outputs(reloaded(task, method, base, run))
    assert (ours - theirs).norm() < 0.05 * ours.norm()
    trains = [name for name, p in trained["model"].named_parameters() if p.requires_grad]
    head = [name for name in trains if any(part in name for part in ("classifier", "score", "qa_outputs"))]
    assert bool(head) == TASKS[task].has_head
