import json

import pytest


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def no_such_file(tmp):
    return {"data": tmp / "nothing.jsonl"}, "no such file"


def no_such_hub_data(tmp):
    return {"data": "nobody/nothing"}, "nobody/nothing"


def data_is_a_folder(tmp):
    return {"data": tmp}, "not a file"


def unknown_extension(tmp):
    (tmp / "a.docx").write_text("x")
    return {"data": tmp / "a.docx"}, "unknown extension '.docx'"


def empty_file(tmp):
    (tmp / "a.txt").write_text("")
    return {"data": tmp / "a.txt"}, "empty"


def blank_file(tmp):
    (tmp / "a.txt").write_text("\n\n\n")
    return {"data": tmp / "a.txt"}, "--data"


def no_such_column(tmp):
    return {"data": lines(tmp / "a.jsonl", {"body": "x"})}, "found body"


def not_json(tmp):
    (tmp / "a.jsonl").write_text("{oops\n")
    return {"data": tmp / "a.jsonl"}, "cannot read"


def only_empty_rows(tmp):
    return {"data": lines(tmp / "a.jsonl", {"text": ""}, {"text": None})}, "no example"


def text_is_a_number(tmp):
    return {"data": lines(tmp / "a.jsonl", {"text": 1}, {"text": 2})}, "'text' of example 0"


def messages_without_role(tmp):
    return {"data": lines(tmp / "a.jsonl", {"messages": [{"content": "x"}]})}, "'messages' of example 0"


def one_example(tmp):
    return {"data": lines(tmp / "a.jsonl", {"text": "x"})}, "--eval-fraction 0"


def unknown_method(tmp):
    return {"method": "magic"}, "magic"


def no_steps(tmp):
    return {"steps": 0}, "--steps"


def not_a_number(tmp):
    return {"lr": "fast"}, "--lr"


def unknown_option(tmp):
    return {"warp_speed": 9}, "--warp-speed"


def no_data(tmp):
    return {"data": None}, "--data"


def unknown_optimizer(tmp):
    return {"optimizer": "sgdd"}, "sgdd"


def no_such_folder(tmp):
    return {"model": tmp / "nothing"}, "no such folder"


def no_such_hub_model(tmp):
    return {"model": "nobody/nothing"}, "cannot load nobody/nothing"


def folder_without_a_model(tmp):
    (tmp / "model").mkdir()
    return {"model": tmp / "model"}, "cannot load"


def encoder(tmp):
    from transformers import BertConfig

    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp / "model")
    return {"model": tmp / "model"}, "not a causal language model"


def encoder_of_no_class(tmp):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp / "model")
    return {"model": tmp / "model"}, "not a causal language model"


def encoder_decoder(tmp):
    from transformers import T5Config

    T5Config().save_pretrained(tmp / "model")
    return {"model": tmp / "model"}, "not a causal language model"


def classifier(tmp):
    from transformers import LlamaConfig

    LlamaConfig(architectures=["LlamaForSequenceClassification"]).save_pretrained(tmp / "model")
    return {"model": tmp / "model"}, "LlamaForSequenceClassification"


def no_such_target(tmp):
    return {"target_modules": "q_proj,k_porj"}, "'k_porj'"


def no_target(tmp):
    return {"target_modules": ","}, "--target-modules"


def target_without_weights(tmp):
    return {"target_modules": "mlp"}, "--target-modules"


def target_is_the_head(tmp):
    return {"target_modules": "lm_head"}, "output head"


def rank_of_a_prefix(tmp):
    return {"method": "prefix"}, "--rank: prefix has none"


def bottleneck_of_ia3(tmp):
    return {"method": "ia3", "rank": None, "bottleneck": 8}, "--bottleneck: ia3 has none"


def method_that_the_model_cannot_have(tmp):
    from transformers import AutoModelForCausalLM, OPTConfig

    sizes = {"vocab_size": 300, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OPTConfig(**sizes, word_embed_proj_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp / "model")
    return {"method": "adapter-houlsby", "rank": None, "model": tmp / "model"}, "no layer of"


def prefix_of_lora(tmp):
    return {"prefix_length": 4}, "--prefix-length: lora has none"


def stock_prefix_with_checkpointing(tmp):
    options = {"method": "prefix", "rank": None, "gradient_checkpointing": True}
    return options | {"compare_steps": 1}, "--gradient-checkpointing: stock peft"


def full_in_4_bits(tmp):
    return {"method": "full", "rank": None, "quantize": "nf4"}, "--quantize: full"


def stock_adapter(tmp):
    return {"method": "adapter-houlsby", "rank": None, "no_accelerate": True}, "peft has no adapter-houlsby"


def resume_and_overwrite(tmp):
    return {"resume": True, "overwrite": True}, "exclude"


def output_below_a_file(tmp):
    (tmp / "file").write_text("")
    return {"output": tmp / "file" / "run"}, "not a folder"


CASES = [
    no_such_file, no_such_hub_data, data_is_a_folder, unknown_extension, empty_file, blank_file, no_such_column,
    not_json, only_empty_rows, text_is_a_number, messages_without_role, one_example, unknown_method, no_steps,
    not_a_number, unknown_option, no_data, unknown_optimizer, no_such_folder, no_such_hub_model,
    folder_without_a_model, encoder, encoder_of_no_class, encoder_decoder, classifier, no_such_target, no_target,
    target_without_weights, target_is_the_head, rank_of_a_prefix, bottleneck_of_ia3,
    method_that_the_model_cannot_have, prefix_of_lora, stock_prefix_with_checkpointing, full_in_4_bits,
    stock_adapter, resume_and_overwrite, output_below_a_file,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_one_line_exit_2_and_nothing_written(case, finetune, tmp_path):
    changes, words = case(tmp_path)
    there = sorted(tmp_path.rglob("*"))
    code, _, err = finetune(**changes)
    assert code == 2
    assert words in err
    assert err.startswith("fastpeft: error: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == there


def test_messages_need_a_chat_template(finetune, model_dir, tmp_path):
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(model_dir, plain, ignore=shutil.ignore_patterns("chat_template*"))
    message = {"messages": [{"role": "user", "content": "x"}]}
    code, _, err = finetune(model=plain, data=lines(tmp_path / "a.jsonl", message, message))
    assert code == 2
    assert "chat template" in err


def test_a_folder_with_other_things_in_it_is_not_touched(finetune, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for more in ({}, {"overwrite": True}, {"resume": True}):
        code, _, err = finetune(output=tmp_path, **more)
        assert code == 2
        assert "not empty" in err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_one_process_of_several_speaks(finetune, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    code, _, err = finetune(method="magic")
    assert (code, err) == (2, "")


def test_missing_packages_are_named(finetune, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("trl", "bitsandbytes") else name)
    assert "finetune needs trl: pip install" in finetune(method="lora")[2]
    assert "finetune needs trl, bitsandbytes: pip install" in finetune(method="qlora")[2]
