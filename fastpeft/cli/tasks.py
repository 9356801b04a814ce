"""What `fastpeft finetune` can train a model to do: its class, what it reads of the data, how it is measured."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from fastpeft.cli.errors import BadInput
from fastpeft.expected import cache_name

IGNORED = -100  # what PyTorch's cross entropy passes over


# Features: what the model gets of an example.


def classify(rows, tokenizer, length: int, ids: dict) -> list[dict]:
    """One label for a text or a pair of texts."""
    return [
        tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=length) | {"labels": ids[row["label"]]}
        for row in rows
    ]


def tag(rows, tokenizer, length: int, ids: dict) -> list[dict]:
    """One label for each word, which its first token carries."""
    features = []
    for i, row in enumerate(rows):
        if len(row["tokens"]) != len(row["tags"]):
            raise BadInput(f"--data: example {i} has {len(row['tokens'])} tokens and {len(row['tags'])} tags")
        encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=length)
        words = encoded.word_ids()
        first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        labels = [ids[row["tags"][word]] if starts else IGNORED for word, starts in zip(words, first, strict=True)]
        features.append(encoded | {"labels": labels})
    return features


def span(rows, tokenizer, length: int, ids: dict) -> list[dict]:
    """First and last token of the answer; a context is cut at the length, and an example whose answer is lost so is
    left out."""
    features = []
    for i, row in enumerate(rows):
        start, text = answer_of(row)
        if row["context"][start : start + len(text)] != text or start < 0:
            raise BadInput(f"--data: the answer of example {i} is not in its context")
        encoded = tokenizer(
            row["question"], row["context"], truncation=True, max_length=length, return_offsets_mapping=True
        )
        offsets, parts = encoded.pop("offset_mapping"), encoded.sequence_ids()
        inside = [
            token
            for token, ((a, b), part) in enumerate(zip(offsets, parts, strict=True))
            if part == 1 and a < start + len(text) and b > start
        ]
        if inside and offsets[inside[-1]][1] >= start + len(text):
            features.append(encoded | {"start_positions": inside[0], "end_positions": inside[-1]})
    return features


def answer_of(row: dict) -> tuple[int, str]:
    """(start, text); of several answers, as SQuAD has them, the first."""
    if "answer" in row:
        return row["context"].find(row["answer"]), row["answer"]
    return row["answers"]["answer_start"][0], row["answers"]["text"][0]


def translate(rows, tokenizer, length: int, ids: dict) -> list[dict]:
    """A text of another text."""
    features = []
    for row in rows:
        source, target = (row["source"], row["target"]) if "source" in row else (row["prompt"], row["completion"])
        encoded = tokenizer(source, truncation=True, max_length=length)
        labels = tokenizer(text_target=target, truncation=True, max_length=length)["input_ids"]
        features.append(encoded | {"labels": labels})
    return features


# Metrics, of what the model predicts and the labels.


def best(logits, labels):
    """The likeliest class, before the logits of all examples are gathered."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def best_span(logits, labels):
    """[B, 2]: first and last token of the likeliest answer that does not end before it starts."""
    import torch

    start, end = logits[:2]  # [B, S]
    scores = start.float()[:, :, None] + end.float()[:, None, :]
    allowed = torch.ones_like(scores[0], dtype=torch.bool).triu()
    flat = scores.masked_fill(~allowed, float("-inf")).flatten(1).argmax(1)
    return torch.stack([flat // end.shape[1], flat % end.shape[1]], 1)


def accuracy(found, labels) -> dict[str, float]:
    return {"accuracy": float((found == labels).mean())}


def token_accuracy(found, labels) -> dict[str, float]:
    counted = labels != IGNORED
    return {"token_accuracy": float((found == labels)[counted].mean())}


def overlap(found, labels) -> dict[str, float]:
    """Exact matches of the span, and the F1 of its tokens, over examples."""
    import numpy

    start, end = (numpy.asarray(part) for part in labels)
    exact = (found[:, 0] == start) & (found[:, 1] == end)
    common = numpy.minimum(found[:, 1], end) - numpy.maximum(found[:, 0], start) + 1
    sizes = (found[:, 1] - found[:, 0] + 1) + (end - start + 1)
    return {"exact_match": float(exact.mean()), "f1": float((2 * common.clip(min=0) / sizes).mean())}


@dataclass(frozen=True)
class Task:
    """peft: its task type. auto: transformers' class. what: such a model. labels: the column whose values become the
    classes of a new head. features, choose, measure: as above; None where TRL does it. The new head is trained in
    full, whatever the method. targets: what the Trainer holds back from the metrics as labels."""

    peft: str
    auto: str
    what: str
    features: Callable | None = None
    collator: str = "DataCollatorWithPadding"
    choose: Callable | None = None
    measure: Callable | None = None
    has_head: bool = False
    labels: str | None = None
    targets: tuple[str, ...] = ("labels",)

    @property
    def generates(self) -> bool:
        return not self.has_head


TASKS = {
    "causal-lm": Task("CAUSAL_LM", "AutoModelForCausalLM", "causal language model"),
    "sequence-classification": Task(
        "SEQ_CLS",
        "AutoModelForSequenceClassification",
        "classifier of texts",
        classify,
        choose=best,
        measure=accuracy,
        has_head=True,
        labels="label",
    ),
    "token-classification": Task(
        "TOKEN_CLS",
        "AutoModelForTokenClassification",
        "classifier of tokens",
        tag,
        "DataCollatorForTokenClassification",
        choose=best,
        measure=token_accuracy,
        has_head=True,
        labels="tags",
    ),
    "question-answering": Task(
        "QUESTION_ANS",
        "AutoModelForQuestionAnswering",
        "finder of answers",
        span,
        choose=best_span,
        measure=overlap,
        has_head=True,
        targets=("start_positions", "end_positions"),
    ),
    "seq2seq": Task(
        "SEQ_2_SEQ_LM",
        "AutoModelForSeq2SeqLM",
        "sequence-to-sequence model",
        translate,
        "DataCollatorForSeq2Seq",
        choose=best,
        measure=token_accuracy,
    ),
}

TaskName = Enum("TaskName", {name.replace("-", "_"): name for name in TASKS}, type=str)


def check_task(settings, compare_steps: int) -> None:
    """What stock peft cannot do for a task."""
    stock = compare_steps or not settings.accelerate
    if stock and settings.way.family == "prompt" and settings.task in ("token-classification", "question-answering"):
        raise BadInput(
            f"--task {settings.task.value}: {settings.method.value} moves the tokens behind virtual ones, and stock "
            "peft does not move their labels"
        )
    if stock and settings.way.family == "prefix" and TASKS[settings.task].has_head:
        from transformers import LlamaModel

        if cache_name(LlamaModel.forward) != "past_key_values":
            raise BadInput(
                f"--task {settings.task.value}: stock peft cannot hand {settings.method.value} to this release of "
                "transformers, which has another name for the cache"
            )


def class_names(parts: list, column: str) -> tuple[list[str], dict]:
    """Names of the classes in order, and each value of the column in `parts` (of one data set) -> its number."""
    feature = parts[0].features[column]
    feature = getattr(feature, "feature", feature)  # of a list
    if hasattr(feature, "names"):
        return list(feature.names), {i: i for i in range(len(feature.names))}
    values = [value for part in parts for value in part[column]]
    if isinstance(values[0], list):
        values = [value for row in values for value in row]
    values = sorted(set(values))
    if len(values) < 2:
        raise BadInput(f"--data: '{column}' is always {values[0]}")
    return [str(value) for value in values], {value: i for i, value in enumerate(values)}


def prepare(task: Task, part, tokenizer, length: int, ids: dict):
    """The features of a part of the data, as the Trainer takes them."""
    from datasets import Dataset

    if task.features in (tag, span) and not tokenizer.is_fast:
        raise BadInput(f"--model: the tokenizer of a {task.what} must be a fast one, which knows words and offsets")
    features = task.features(part, tokenizer, length, ids)
    if not features:
        raise BadInput("--data: no answer lies within --seq-len")
    return Dataset.from_list([dict(feature) for feature in features])


def compute_metrics(task: Task) -> Callable:
    return lambda result: task.measure(result.predictions, result.label_ids)


def heads(model, fresh: list[str]) -> list[str]:
    """The modules of a new head: what is beside the base model in it, and what the checkpoint had no weights for."""
    beside = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    inside = [name for name in fresh if not any(name == head or name.startswith(f"{head}.") for head in beside)]
    return beside + inside
