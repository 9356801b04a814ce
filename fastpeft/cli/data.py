"""From a file, a hub name or `pydoc` to a data set with the columns of a task."""

from pathlib import Path

from fastpeft.cli.errors import BadInput, one_line

# Extension -> (builder of `datasets`, its arguments). A text file is split at blank lines: one line is too little to be
# an example, and a whole file could not be split into training and evaluation.
READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "paragraph"}),
}
# The columns of each kind of data, by task, in the order in which they are looked for.
KINDS = {
    "causal-lm": {"chat": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)},
    "sequence-classification": {"pairs": ("text", "text_pair", "label"), "texts": ("text", "label")},
    "token-classification": {"words": ("tokens", "tags")},
    "question-answering": {
        "SQuAD": ("question", "context", "answers"),
        "questions": ("question", "context", "answer"),
    },
    "seq2seq": {"pairs": ("source", "target"), "completion": ("prompt", "completion")},
}
# Evaluating on more examples costs more time than it gives certainty.
MOST_EVAL_EXAMPLES = 200


def is_file(source: str) -> bool:
    path = Path(source).expanduser()
    return path.exists() or path.suffix in READERS or source.startswith((".", "/", "~"))


def check_source(source: str) -> None:
    """What can be refused before anything slow is imported."""
    if source == "pydoc" or not is_file(source):
        return
    path = Path(source).expanduser()
    if not path.exists():
        raise BadInput(f"--data: no such file: {source}")
    if not path.is_file():
        raise BadInput(f"--data: {source} is not a file")
    if path.suffix not in READERS:
        raise BadInput(f"--data: unknown extension '{path.suffix}' of {source}; known are {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise BadInput(f"--data: {source} is empty")


def pydoc():
    """The language reference that every CPython carries: real text without a download."""
    from pydoc_data.topics import topics

    from datasets import Dataset

    texts = dict.fromkeys(topics.values())  # a few topics share one text, which must not be on both sides of the split
    return Dataset.from_dict({"text": list(texts)})


def read(source: str):
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if source == "pydoc":
        return pydoc()
    if not is_file(source):
        try:
            return load_dataset(source, split="train")
        except (OSError, ValueError) as error:
            raise BadInput(f"--data: no such file or hub data set: {source} ({one_line(error)})") from error
    path = Path(source).expanduser()
    builder, arguments = READERS[path.suffix]
    try:
        return load_dataset(builder, data_files=str(path), split="train", **arguments)
    except (DatasetGenerationError, ValueError) as error:
        raise BadInput(f"--data: cannot read {source}: {one_line(error.__cause__ or error)}") from error


def kind_of(dataset, task: str) -> str:
    kinds = KINDS[task]
    for kind, columns in kinds.items():
        if set(columns) <= set(dataset.column_names):
            return kind
    wanted = ", or ".join(" and ".join(f"'{column}'" for column in columns) for columns in kinds.values())
    raise BadInput(f"--data: {task} needs {wanted}; found {', '.join(dataset.column_names) or 'none'}")


def is_chat(value) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def is_text(value) -> bool:
    return isinstance(value, str)


def is_label(value) -> bool:
    return isinstance(value, str | int)


def is_list_of(check):
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(check, value))


def is_answers(value) -> bool:
    """As SQuAD has them."""
    return (
        isinstance(value, dict)
        and is_list_of(is_text)(value.get("text"))
        and is_list_of(lambda start: isinstance(start, int))(value.get("answer_start"))
    )


_CHAT = "a list of messages with 'role' and 'content'"
# What a value must be, where it is not text.
SHAPES = {
    "messages": (is_chat, _CHAT),
    "prompt": (lambda value: is_text(value) or is_chat(value), _CHAT),
    "completion": (lambda value: is_text(value) or is_chat(value), _CHAT),
    "label": (is_label, "a name or a whole number"),
    "tokens": (is_list_of(is_text), "a list of words"),
    "tags": (is_list_of(is_label), "a list of names or whole numbers"),
    "answers": (is_answers, "SQuAD's 'text' and 'answer_start' with at least one answer"),
}


def only_wanted(dataset, task: str, kind: str):
    """The columns of this kind, without rows that hold nothing; a row of the wrong shape is refused, and one that has
    something to read but no label is of the wrong shape."""
    columns = KINDS[task][kind]
    dataset = dataset.select_columns(list(columns))
    needed = columns if task == "causal-lm" else columns[:1]
    dataset = dataset.filter(lambda row: all(row[c] not in (None, "", []) for c in needed))
    text = (is_text, "text")
    shapes = {c: text if task == "seq2seq" else SHAPES.get(c, text) for c in columns}
    for i, row in enumerate(dataset):
        for column, (fits, wanted) in shapes.items():
            if not fits(row[column]):
                raise BadInput(f"--data: '{column}' of example {i} is not {wanted}")
    return dataset


def load(source: str, eval_fraction: float, seed: int, task: str = "causal-lm"):
    """Returns (train, eval or None, kind); kind is a key of KINDS[task]."""
    dataset = read(source)
    kind = kind_of(dataset, task)
    dataset = only_wanted(dataset, task, kind)
    if len(dataset) == 0:
        raise BadInput(f"--data: {source} has no example that is not empty")
    if eval_fraction == 0:
        return dataset, None, kind
    held_out = min(max(1, round(len(dataset) * eval_fraction)), MOST_EVAL_EXAMPLES)
    if held_out >= len(dataset):
        raise BadInput(f"--data: {len(dataset)} example cannot be split; give more, or --eval-fraction 0")
    parts = dataset.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"], kind


def is_conversation(example: dict) -> bool:
    """Whether the tokenizer's chat template has to make text of it."""
    return any(isinstance(value, list) for value in example.values())
