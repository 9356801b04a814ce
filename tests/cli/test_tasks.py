"""Every task of `fastpeft finetune`: it learns, and what it leaves behind is what it trained."""

import json

import pytest
import torch

import fastpeft
from fastpeft.cli import tasks
from fastpeft.cli.errors import BadInput
from fastpeft.cli.methods import OPTIONS, WAYS, load_head
from fastpeft.cli.models import Dtype, choose_dtype, torch_dtype
from fastpeft.cli.tasks import TASKS

DTYPE = torch_dtype(choose_dtype(Dtype.auto, "cpu")[0])  # of a run on this machine


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

    from fastpeft.cli.models import nf4
    from fastpeft.integrations.bitsandbytes import close_cpu_trap

    family, auto = WAYS[method].family, getattr(transformers, TASKS[task].auto)
    config = transformers.AutoConfig.from_pretrained(run) if (run / "config.json").exists() else None
    quantized = {"quantization_config": nf4(DTYPE, ["classifier", "pooler"])} if WAYS[method].four_bit else {}
    model = auto.from_pretrained(run if family == "full" else base, config=config, dtype=DTYPE, **quantized)
    close_cpu_trap(model)
    if family == "adapter":
        fastpeft.nn.load_bottleneck(model, run)
        load_head(model, run)
    if WAYS[method].of_peft:
        model = PeftModel.from_pretrained(model, run)
    if family == "prefix" or (task in ("token-classification", "question-answering") and family == "prompt"):
        # peft reads it otherwise, keeps the logits of the prompt, or knows an older transformers: docs/differences.md
        fastpeft.accelerate(model)
    return model


def outputs(model):
    ids = torch.arange(40).view(2, 20) * 5 % 250
    extra = {"labels": ids[:, :7].contiguous()} if model.config.is_encoder_decoder else {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=torch.bfloat16 == DTYPE):
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
        ("token-classification", "bert", "prompt"),
        ("question-answering", "bert", "dora"),
        ("question-answering", "bert", "prefix"),
        ("question-answering", "bert", "p-tuning"),
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
    assert metrics["eval_metrics"].get("accuracy", 1) > 0.9
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


def test_predictions_and_metrics():
    import numpy

    start, end = torch.zeros(2, 5), torch.zeros(2, 5)
    start[0, 1], end[0, 3] = 5, 5
    start[1, 4], end[1, 0], end[1, 4] = 5, 9, 1  # the likeliest end lies before the likeliest start
    assert tasks.best_span((start, end), None).tolist() == [[1, 3], [0, 0]]
    found = numpy.array([[1, 3], [0, 0], [2, 3]])
    assert tasks.overlap(found, ([1, 4, 3], [3, 4, 6])) == pytest.approx(
        {"exact_match": 1 / 3, "f1": (1 + 0 + 1 / 3) / 3}
    )
    labels = numpy.array([[1, -100], [2, 3]])
    assert tasks.token_accuracy(numpy.array([[1, 1], [2, 2]]), labels) == {"token_accuracy": pytest.approx(2 / 3)}
    assert tasks.accuracy(numpy.array([1, 0]), numpy.array([1, 1])) == {"accuracy": 0.5}


def test_labels_lie_on_the_first_token_of_a_word_and_on_the_answer(tokenizer):
    ids = {"b": 0, "r": 1}
    tagged = tasks.tag([{"tokens": ["blue", "red"], "tags": ["b", "r"]}], tokenizer, 6, ids)[0]
    assert tagged["labels"] == [0, -100, -100, -100, 1, -100]  # cut at six tokens, here bytes
    with pytest.raises(BadInput, match="2 tokens and 1 tags"):
        tasks.tag([{"tokens": ["a", "b"], "tags": ["b"]}], tokenizer, 6, ids)

    row = {"question": "who", "context": "it is me", "answers": {"text": ["me"], "answer_start": [6]}}
    found = tasks.span([row], tokenizer, 64, {})[0]
    answer = found["input_ids"][found["start_positions"] : found["end_positions"] + 1]
    assert tokenizer.decode(answer) == "me"
    assert tasks.span([row], tokenizer, 10, {}) == []  # the cut goes through the answer
    assert len(tasks.span([{"question": "who", "context": "it is me", "answer": "me"}], tokenizer, 64, {})) == 1
    with pytest.raises(BadInput, match="the answer of example 0 is not in its context"):
        tasks.span([row | {"answers": {"text": ["me"], "answer_start": [5]}}], tokenizer, 64, {})


@pytest.mark.parametrize("method", ["lora", "adapter-pfeiffer", "prompt"])
def test_what_a_checkpoint_lacks_trains_too(method, finetune, trained, data, other_models, tmp_path):
    """A masked language model has no pooler."""
    from transformers import BertForMaskedLM

    path = tmp_path / "masked"
    BertForMaskedLM.from_pretrained(other_models["bert"]).save_pretrained(path)
    for file in other_models["bert"].glob("token*"):
        (path / file.name).write_bytes(file.read_bytes())
    rows = data([labelled(i) for i in range(20)])
    options = options_of(method) | {"steps": 1, "task": "sequence-classification"}
    assert finetune(model=path, data=rows, **options)[::2] == (0, "")
    trains = {name for name, p in trained["model"].named_parameters() if p.requires_grad}
    assert any("pooler.dense" in name for name in trains)
    assert any("classifier" in name for name in trains)
    assert (tmp_path / "run" / "adapter_config.json").exists()


def test_classes_are_named_by_the_data():
    from datasets import ClassLabel, Dataset, Features, Value

    def names(values, **options):
        return tasks.class_names([Dataset.from_dict({"label": values}, **options)], "label")

    assert names(["b", "a", "b"]) == (["a", "b"], {"a": 0, "b": 1})
    assert names([3, 1]) == (["1", "3"], {1: 0, 3: 1})
    assert names([["y"], ["x", "y"]]) == (["x", "y"], {"x": 0, "y": 1})
    features = Features({"label": ClassLabel(names=["no", "yes"]), "x": Value("int64")})
    rows = Dataset.from_dict({"label": [1, 1], "x": [0, 0]}, features=features)
    assert tasks.class_names([rows], "label") == (["no", "yes"], {0: 0, 1: 1})
    with pytest.raises(BadInput, match="always b"):
        names(["b", "b"])


@pytest.mark.parametrize("method", ["adapter-pfeiffer", "p-tuning"])
def test_a_resumed_classifier_has_its_head_back(
    method, finetune, interrupt, monkeypatch, read_metrics, data, other_models, tmp_path
):
    options = options_of(method) | {"task": "sequence-classification", "model": other_models["bert"], "steps": 6}
    options |= {"data": data([labelled(i) for i in range(40)]), "seq_len": 64}
    assert finetune(output=tmp_path / "whole", **options)[0] == 0
    interrupt(5)
    assert finetune(output=tmp_path / "parts", **options)[0] == 130
    monkeypatch.undo()
    assert finetune(output=tmp_path / "parts", resume=True, **options)[::2] == (0, "")
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert [loss for _, loss in parts["loss_curve"]] == pytest.approx([x for _, x in whole["loss_curve"]], abs=5e-3)
    assert parts["eval_loss_after"] == pytest.approx(whole["eval_loss_after"], abs=5e-3)


CLASSIFY = {"task": "sequence-classification", "method": "lora"}


@pytest.mark.parametrize(
    ("changes", "rows", "words"),
    [
        (CLASSIFY, [{"text": "a"}], "needs 'text' and 'text_pair' and 'label', or 'text' and 'label'; found text"),
        (CLASSIFY, [{"text": "a", "label": "x"}, {"text": "b", "label": None}], "'label' of example 1"),
        (CLASSIFY, [{"text": "a", "label": 0.5}] * 3, "'label' of example 0 is not a name or a whole number"),
        (CLASSIFY, [{"text": str(i), "label": "x"} for i in range(4)], "'label' is always x"),
        (CLASSIFY | {"task": "token-classification"}, [{"tokens": ["a"], "tags": []}] * 2, "'tags' of example 0"),
        (CLASSIFY | {"task": "seq2seq"}, [{"prompt": "a"}], "or 'prompt' and 'completion'; found prompt"),
        (CLASSIFY | {"task": "seq2seq"}, [translated(i) for i in range(4)], "no sequence-to-sequence model of bert"),
        (
            {"task": "question-answering", "method": "adapter-pfeiffer", "rank": None, "seq_len": 8},
            [asked(i) for i in range(4)],
            "no answer lies within --seq-len",
        ),
        (
            {"task": "token-classification", "method": "prompt", "rank": None, "no_accelerate": True},
            [],
            "moves the tokens",
        ),
        ({"task": "causal-lm", "method": "lora"}, [labelled(i) for i in range(4)], "not a causal language model"),
    ],
)
def test_bad_input_of_a_task_is_refused(changes, rows, words, finetune, data, other_models, tmp_path):
    path = data(rows)
    code, _, err = finetune(**changes | {"data": path, "model": other_models["bert"]})
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]
