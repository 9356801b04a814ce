import json

import pytest

from fastpeft.cli import main

SENTENCES = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "A function returns a value to the place that called it.",
    "Every list has a length, and every index is below that length.",
    "When the loop ends, the else clause runs unless a break came first.",
    "An exception travels up the stack until somebody handles it.",
]


@pytest.fixture(scope="session", autouse=True)
def no_network(tmp_path_factory):
    """Offline, and with caches of their own, so that no test depends on what a machine has downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These models are too small to share out, and waiting threads slow each other down on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer(no_network):
    """Byte-level, so that it knows every text without having been trained."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    return tokenizer


@pytest.fixture(scope="session")
def model_dir(tokenizer, tmp_path_factory):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    path = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def other_models(tokenizer, tmp_path_factory):
    """By name: an encoder without a head, and an encoder-decoder."""
    import torch
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    bert = BertConfig(
        **vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    t5 = T5Config(
        **vocabulary, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4,
        eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    models = {"bert": BertModel(bert), "t5": T5ForConditionalGeneration(t5)}
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    rows = [{"text": f"{i}. {sentence}"} for i in range(8) for sentence in SENTENCES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def command_line(capsys):
    """Runs the command line in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture
def finetune(command_line, model_dir, jsonl, tmp_path):
    """A few quick steps; keyword arguments become options, and None or False leaves one out."""

    def run(**changes):
        options = {
            "model": model_dir,
            "data": jsonl,
            "output": tmp_path / "run",
            "method": "lora",
            "steps": 4,
            "seq_len": 32,
            "rank": 4,
            "lr": 0.01,
        }
        words = ["finetune"]
        for name, value in (options | changes).items():
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [] if value is None or value is False else [flag, value]
        return command_line(*words)

    return run


@pytest.fixture
def read_metrics():
    return lambda path: json.loads((path / "metrics.json").read_text())


@pytest.fixture
def trained(monkeypatch):
    """Keeps the model of the run, which the command line does not return."""
    from fastpeft.cli.run import Run

    kept = {}
    write = Run.write

    def keep(self, trainer, *rest):
        kept["model"] = trainer.model
        write(self, trainer, *rest)

    monkeypatch.setattr(Run, "write", keep)
    return kept


@pytest.fixture
def interrupt(monkeypatch):
    """Makes the next run stop as Ctrl-C does, after so many steps."""
    from fastpeft.cli.progress import ProgressBar

    on_step_end = ProgressBar.on_step_end

    def arm(steps):
        def stop(self, args, state, control, **kwargs):
            on_step_end(self, args, state, control, **kwargs)
            if state.global_step == steps:
                raise KeyboardInterrupt

        monkeypatch.setattr(ProgressBar, "on_step_end", stop)

    yield arm
