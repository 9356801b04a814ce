"""From a file, a hub name or `pydoc` to a data set with the columns that TRL trains on."""

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
# The columns of each kind of data, in the order in which they are looked for.
KINDS = {"chat": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}
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


def kind_of(dataset) -> str:
    for kind, columns in KINDS.items():
        if set(columns) <= set(dataset.column_names):
            return kind
    raise BadInput(
        f"--data: needs a column 'text', or 'messages', or 'prompt' and 'completion'; "
        f"found {', '.join(dataset.column_names) or 'none'}"
    )


def is_chat(value) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value)
    )


def fits(value, kind: str) -> bool:
    return {
        "chat": is_chat(value),
        "completion": is_chat(value) or isinstance(value, str),
        "text": isinstance(value, str),
    }[kind]


def only_wanted(dataset, kind: str):
    """The columns of this kind, without empty rows; a row of the wrong shape is refused."""
    columns = KINDS[kind]
    dataset = dataset.select_columns(list(columns))
    dataset = dataset.filter(lambda row: all(row[c] not in (None, "", []) for c in columns))
    for i, row in enumerate(dataset):
        for column in columns:
            if not fits(row[column], kind):
                wanted = "text" if kind == "text" else "a list of messages with 'role' and 'content'"
                raise BadInput(f"--data: '{column}' of example {i} is not {wanted}")
    return dataset


def load(source: str, eval_fraction: float, seed: int):
    """Returns (train, eval or None, kind); kind is chat, completion or text."""
    dataset = read(source)
    kind = kind_of(dataset)
    dataset = only_wanted(dataset, kind)
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
