"""peft's prompt tuning, P-Tuning and multitask prompt tuning, accelerated: against peft, and where peft is wrong."""

import copy
import inspect
import warnings
from functools import partial

import peft
import pytest
import torch
from peft import CPTConfig, MultitaskPromptTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import pad
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fastpeft
from tests.models import VOCAB, assert_same, gpt2, llama, recomputed, side_mask, text
from tests.parity import assert_parity

P, TASKS, BATCH = 5, 4, 3
METHODS = {
    "prompt": PromptTuningConfig,
    "mlp": partial(PromptEncoderConfig, encoder_hidden_size=24),
    "lstm": partial(PromptEncoderConfig, encoder_hidden_size=24, encoder_reparameterization_type="LSTM"),
    "multitask": partial(MultitaskPromptTuningConfig, num_tasks=TASKS),
}
EACH = pytest.mark.parametrize("method", METHODS)


def t5():
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0, decoder_start_token_id=0))


def bart():
    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": VOCAB, "dropout": 0}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    return BartForConditionalGeneration(
        BartConfig(**sizes, **heads, max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None)
    )


def bert(cls=BertForSequenceClassification, labels=3):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    dropout = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    return cls(BertConfig(**sizes, **dropout, vocab_size=VOCAB, num_labels=labels, max_position_embeddings=64))


def mistral():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, vocab_size=VOCAB, sliding_window=9))


def tuned(make=llama, method="prompt", task_type="CAUSAL_LM", dtype=torch.float32):
    """A stock peft model."""
    model = get_peft_model(make().to(dtype), METHODS[method](task_type=task_type, num_virtual_tokens=P)).train()
    model.prompt_encoder.to(dtype)
    with torch.no_grad():  # as large as what the text's embeddings are, so that it has an effect
        for name, parameter in model.prompt_encoder.named_parameters():
            if "prefix_task" in name:
                parameter.normal_(std=0.5)
    return model


def arguments_for(method, ids, side="none", labels=None):
    mask = side_mask(ids, side)
    labels = ids.masked_fill(mask == 0, -100) if labels is None else labels
    found = {"input_ids": ids, "labels": labels} | ({} if side == "none" else {"attention_mask": mask})
    return found | ({"task_ids": torch.tensor([0, 2, 2])} if method == "multitask" else {})


def results(model, **arguments):
    """Logits of what is no padding, the loss, and the gradient of every trainable parameter."""
    model.zero_grad(set_to_none=True)
    output = model(**arguments)
    output.loss.backward()
    logits, mask = output.logits.detach(), arguments.get("attention_mask")
    if mask is not None and logits.dim() == 3 and logits.shape[1] == mask.shape[1] + P:
        logits = logits[pad(mask, (P, 0), value=1).bool()]
    found = {"logits": logits, "loss": output.loss.detach()}
    found |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def generate(model, ids, **options):
    """Tokens, and the scores of each of them."""
    was_training = model.training
    model.eval()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | options
    found = model.generate(input_ids=ids, **options, return_dict_in_generate=True, output_scores=True)
    model.train(was_training)
    return found.sequences, torch.stack(found.scores)


@EACH
@pytest.mark.parametrize("side", ("none", "right"))
@pytest.mark.parametrize("make", (llama, gpt2))
def test_causal_models_give_what_peft_gives(make, side, method):
    model, arguments = tuned(make, method), arguments_for(method, text(), side)
    stock = results(model, **arguments)
    report = fastpeft.accelerate(model, strict=True)
    assert [(row.name, row.status) for row in report] == [("prompt_encoder.default", "fused")] and report.loss
    assert_same(results(model, **arguments), stock)
    fastpeft.restore(model)
    assert type(model) is peft.PeftModelForCausalLM
    assert_same(results(model, **arguments), stock, 1e-7)


@EACH
@pytest.mark.parametrize("make", (t5, bart))
def test_encoder_decoder_models_give_what_peft_gives(make, method):
    model, ids = tuned(make, method, "SEQ_2_SEQ_LM"), text()
    arguments = arguments_for(method, ids, "right", labels=text(length=9))
    options = {name: arguments[name] for name in ("attention_mask", "task_ids") if name in arguments}
    calls = [options | more for more in ({}, {"num_beams": 2})]
    stock, stock_tokens = results(model, **arguments), [generate(model, ids, **call)[0] for call in calls]
    assert fastpeft.accelerate(model, strict=True).fused == 1
    assert_same(results(model, **arguments), stock)
    for call, tokens in zip(calls, stock_tokens, strict=True):
        assert torch.equal(generate(model, ids, **call)[0], tokens)


@EACH
@pytest.mark.parametrize("side", ("none", "right", "left"))
def test_a_bert_classifier_gives_what_peft_gives(side, method):
    model = tuned(bert, method, "SEQ_CLS")
    arguments = arguments_for(method, text(), side, labels=torch.tensor([0, 2, 1]))
    arguments["token_type_ids"] = torch.ones_like(arguments["input_ids"])
    stock = results(model, **arguments)
    assert fastpeft.accelerate(model, strict=True).fused == 1
    assert_same(results(model, **arguments), stock)


@pytest.mark.parametrize("method", ("prompt", "lstm"))
@pytest.mark.parametrize("make", (llama, gpt2))
def test_bfloat16_is_no_further_off_than_peft(make, method):
    exact = tuned(make, method, dtype=torch.bfloat16)
    model, arguments = copy.deepcopy(exact), arguments_for(method, text(), "right")
    truth, stock = results(exact.double(), **arguments), results(model, **arguments)
    fastpeft.accelerate(model)
    for name, value in results(model, **arguments).items():
        assert_parity(value, stock[name].to(value.dtype), truth[name].double(), name)


@EACH
@pytest.mark.parametrize("make", (llama, gpt2))
def test_generate_gives_the_tokens_of_recomputation(make, method):
    """Stock peft's forward without a cache is the judge: its `generate` loses the cache with transformers 5.24."""
    model, ids = tuned(make, method), text()
    options = {"task_ids": torch.tensor([0, 2, 2])} if method == "multitask" else {}
    tokens, scores = recomputed(model, ids, 6, **options)
    fastpeft.accelerate(model)
    beam_tokens, beam_scores = generate(model, ids, **options, num_beams=3, use_cache=False)
    for cache in ({}, {"use_cache": False}):
        found_tokens, found_scores = generate(model, ids, **options, **cache)
        assert torch.equal(found_tokens, tokens), cache
        torch.testing.assert_close(found_scores, scores, rtol=1e-4, atol=1e-4)
        found_tokens, found_scores = generate(model, ids, **options, **cache, num_beams=3)
        assert torch.equal(found_tokens, beam_tokens), cache
        torch.testing.assert_close(found_scores, beam_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", (1, 3))
@pytest.mark.parametrize("make", (llama, gpt2))
def test_a_row_gives_the_same_with_padding_before_it(make, beams):
    """In peft the padding stands between prompt and text, and takes positions."""
    model, ids = tuned(make), text()
    mask = side_mask(ids, "left")
    stock = model(input_ids=ids, attention_mask=mask).logits[0, P + 5 :]
    fastpeft.accelerate(model)
    alone = model(input_ids=ids[:1, 5:]).logits[0, P:]
    mine = model(input_ids=ids, attention_mask=mask).logits[0, P + 5 :]
    torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-5)
    assert (stock - alone).abs().max() > 50 * (mine - alone).abs().max()
    tokens = generate(model, ids, attention_mask=mask, num_beams=beams)[0][0, 14:]
    assert torch.equal(tokens, generate(model, ids[:1, 5:], num_beams=beams)[0][0, 9:])


@pytest.mark.parametrize("make", (llama, gpt2, bert))
def test_positions_are_kept(make):
    """peft drops them with a warning. The same logits from the base model: the prompt's positions, then the text's."""
    model, ids = tuned(make, task_type="SEQ_CLS" if make is bert else "CAUSAL_LM").eval(), text()
    positions = (2 * torch.arange(14)).expand(BATCH, -1) if make is bert else 7 + torch.arange(14)[None]
    start = int(positions[0, 0])
    prompt = model.prompt_encoder["default"].embedding.weight.expand(BATCH, -1, -1)
    embeds = torch.cat([prompt, model.word_embeddings(ids)], 1)
    moved = torch.cat([start + torch.arange(P).expand(len(positions), -1), positions + P], 1)
    expected = model.base_model(inputs_embeds=embeds, position_ids=moved).logits
    with pytest.warns(UserWarning, match="Position ids are not supported"):
        stock = model(input_ids=ids, position_ids=positions).logits
    fastpeft.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(input_ids=ids, position_ids=positions).logits, expected)
    if make is not llama:  # rotations do not change where all positions shift by the same number
        assert not torch.allclose(stock, expected)


@pytest.mark.parametrize("make", (llama, gpt2))
def test_packed_rows_are_a_loop_over_documents(make):
    """Each document sees the prompt and itself. In peft each sees all before it, at positions that go on."""
    model, lengths = tuned(make, "mlp"), (6, 1, 11)
    documents = [text(1, n) for n in lengths]
    row, positions = torch.cat(documents, 1), torch.cat([torch.arange(n) for n in lengths])[None]
    labels = torch.cat([pad(d[:, 1:], (1, 0), value=-100) for d in documents], 1)  # none across the border
    packed = {"input_ids": row.expand(2, -1), "position_ids": positions, "labels": labels.expand(2, -1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = model(**packed).logits[:1, P:].detach()
    fastpeft.accelerate(model)
    found = results(model, **packed)
    alone = torch.cat([model(input_ids=d).logits[:, P:] for d in documents], 1)
    mine = found["logits"][:, P:]
    torch.testing.assert_close(mine, alone.expand(2, -1, -1), rtol=1e-4, atol=1e-5)
    assert (stock - alone).abs().max() > 100 * (mine - alone).abs().max()
    model.zero_grad()
    for document in documents:
        if document.shape[1] > 1:
            label = pad(document[:, 1:], (1, 0), value=-100)
            (model(input_ids=document, labels=label).loss * (document.shape[1] - 1) / 15).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same({name: found[name] for name in gradients}, gradients)


def test_packed_rows_that_cannot_be_masked_are_refused():
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    for make in (mistral, llama):
        model = tuned(make)
        fastpeft.accelerate(model)
        model.base_model.config._attn_implementation = "sdpa" if make is mistral else "eager"
        with pytest.raises(ValueError, match="packed rows"):
            model(input_ids=text(1), position_ids=positions)


@EACH
@pytest.mark.parametrize("make", (llama, t5))
def test_gradient_checkpointing_gives_the_same_gradients(make, method):
    model = tuned(make, method, "CAUSAL_LM" if make is llama else "SEQ_2_SEQ_LM")
    arguments = arguments_for(method, text(), "right")
    fastpeft.accelerate(model)
    expected = results(model, **arguments)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(results(model, **arguments), expected)


def test_a_cache_goes_on():
    """peft puts the prompt before what comes, again."""
    model, ids = tuned(gpt2).eval(), text()
    fastpeft.accelerate(model)
    for mask in (torch.ones_like(ids), side_mask(ids, "left")):
        whole = model(input_ids=ids, attention_mask=mask).logits
        first = model(input_ids=ids[:, :8], attention_mask=mask[:, :8])
        rest = model(input_ids=ids[:, 8:], attention_mask=mask, past_key_values=first.past_key_values)
        torch.testing.assert_close(rest.logits, whole[:, P + 8 :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ("right", "left"))
@pytest.mark.parametrize("cls", (LlamaForSequenceClassification, GPT2ForSequenceClassification))
def test_a_decoders_classifier_reads_the_last_token(cls, side):
    """In peft it reads the padding."""
    base = llama() if cls is LlamaForSequenceClassification else gpt2()
    base.config.num_labels = 3
    model, ids = tuned(partial(cls, base.config), task_type="SEQ_CLS"), text()
    mask = side_mask(ids, side)
    stock = model(input_ids=ids, attention_mask=mask).logits
    fastpeft.accelerate(model, strict=True)
    alone = model(input_ids=ids[:1][mask[:1].bool()][None]).logits
    mine = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(mine[:1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1:], stock[1:], rtol=1e-4, atol=1e-5)
    assert (stock[:1] - alone).abs().max() > 50 * (mine[:1] - alone).abs().max()


@EACH
def test_labels_of_tokens_meet_the_logits_of_these_tokens(method):
    """peft's model has more logits than labels: it raises, or takes a token for that P places before it."""
    ids, answers = text(), torch.tensor([0, 3, 7])
    tasks = {"task_ids": torch.tensor([0, 2, 2])} if method == "multitask" else {}
    model = tuned(partial(bert, BertForTokenClassification), method, "TOKEN_CLS")
    fastpeft.accelerate(model, strict=True)
    output = model(input_ids=ids, labels=ids % 3, **tasks)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), (ids % 3).flatten())
    torch.testing.assert_close(output.loss, loss)
    logits = model(input_ids=ids, **tasks, return_dict=False)[0]
    assert torch.equal(logits, output.logits)

    model = tuned(partial(bert, BertForQuestionAnswering, 2), method, "QUESTION_ANS")
    fastpeft.accelerate(model, strict=True)
    output = model(input_ids=ids, start_positions=answers, end_positions=answers + 2, **tasks)
    assert output.start_logits.shape == ids.shape
    if method == "prompt":
        stock = copy.deepcopy(model)
        fastpeft.restore(stock)
        shifted = stock(input_ids=ids, start_positions=answers + P, end_positions=answers + 2 + P)
        torch.testing.assert_close(output.loss, shifted.loss)
        torch.testing.assert_close(output.end_logits, shifted.end_logits[:, P:])
        with pytest.raises(ValueError):
            tuned(partial(bert, BertForTokenClassification), method, "TOKEN_CLS")(input_ids=ids, labels=ids % 3)


def test_features_are_those_of_peft():
    model, ids = tuned(partial(bert, BertModel), task_type="FEATURE_EXTRACTION"), text()
    stock = model(input_ids=ids).last_hidden_state
    fastpeft.accelerate(model, strict=True)
    torch.testing.assert_close(model(ids).last_hidden_state, stock)


@pytest.mark.parametrize("method", ("mlp", "lstm", "multitask"))
def test_the_encoder_is_evaluated_once_a_call(method):
    model, rows = tuned(llama, method), []
    fastpeft.accelerate(model)
    watched = model.prompt_encoder["default"]
    watched = watched.embedding if method == "multitask" else watched.mlp_head
    watched.register_forward_hook(lambda m, i, o: rows.append(o.shape[:-1].numel()))
    options = {"task_ids": torch.zeros(7, dtype=torch.long)} if method == "multitask" else {}
    model(input_ids=text(7), **options)
    generate(model, text(7), **options)
    assert rows == [P, P]


def test_tasks_are_needed():
    model = tuned(llama, "multitask")
    fastpeft.accelerate(model)
    with pytest.raises(ValueError, match="task_ids"):
        model(input_ids=text())


@EACH
def test_training_is_resumed_after_a_reload(tmp_path, method):
    """peft saves what the MLP or LSTM makes, and takes it for what goes in."""
    model, ids = tuned(llama, method), text()
    arguments = arguments_for(method, ids)
    names = list(model.state_dict())
    fastpeft.accelerate(model)
    assert names == list(model.state_dict())
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(copy.deepcopy(model.base_model), copy.deepcopy(model.peft_config["default"]))
    fastpeft.accelerate(fresh)
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    saved, loaded = model.prompt_encoder.state_dict(), fresh.prompt_encoder.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert_same(results(fresh, **arguments), results(model, **arguments), 1e-7)
    # For inference peft reads the same folder.
    arguments.pop("labels")
    expected = model.eval()(**arguments).logits
    inference = peft.PeftModel.from_pretrained(copy.deepcopy(model.base_model), tmp_path)
    torch.testing.assert_close(inference(**arguments).logits, expected)
    fastpeft.accelerate(inference, strict=True)
    torch.testing.assert_close(inference(**arguments).logits, expected)


def test_a_folder_without_the_encoder_is_refused(tmp_path):
    model = tuned(llama, "mlp")
    model.save_pretrained(tmp_path)
    fastpeft.accelerate(model)
    with pytest.raises(ValueError, match="not the encoder"):
        model.load_adapter(tmp_path, "default", is_trainable=True)


def test_what_is_saved_in_training_has_no_dropout(tmp_path):
    config = METHODS["lstm"](task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_dropout=0.5)
    model, ids = get_peft_model(llama(), config).train(), text()
    fastpeft.accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model.base_model), tmp_path)
    assert model.prompt_encoder["default"].training
    torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_adapters_are_switched_and_disabled():
    model, ids = tuned(), text()
    model.add_adapter("second", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    outputs = []
    for prepare in (fastpeft.restore, fastpeft.accelerate):
        prepare(model)
        model.set_adapter("second")
        second = model(input_ids=ids).logits
        model.set_adapter("default")
        first = model(input_ids=ids).logits
        with model.disable_adapter():
            none = model(input_ids=ids).logits
            tokens = generate(model, ids)[0]
        outputs.append((second, first, none, tokens, model(input_ids=ids).logits))
    for stock, mine in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, stock, rtol=1e-4, atol=1e-5)
    fastpeft.restore(model)
    torch.testing.assert_close(model(input_ids=ids).logits, outputs[0][1], rtol=0, atol=0)


def test_deepcopy_is_independent():
    model, arguments = tuned(), arguments_for("prompt", text(), "right")
    fastpeft.accelerate(model)
    expected = results(model, **arguments)
    clone = copy.deepcopy(model)
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight)
    assert_same(results(clone, **arguments), expected, 1e-6)
    assert not torch.allclose(results(model, **arguments)["logits"], expected["logits"])


def test_an_unwrapped_forward_has_the_signature_of_peft_but_is_ours():
    """As `unwrap_model` of accelerate follows it back."""
    stock = tuned()
    signature = inspect.signature(stock.forward)
    fastpeft.accelerate(stock)
    assert inspect.signature(stock.forward) == signature
    assert inspect.unwrap(stock.forward) == stock.forward


@pytest.mark.slow
def test_a_compiled_model():
    model, arguments = tuned(llama, "mlp"), arguments_for("mlp", text(), "right")
    fastpeft.accelerate(model)
    expected = results(model, **arguments)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**arguments).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert_same(gradients, {name: expected[name] for name in gradients}, 1e-6)


def test_bad_calls_have_a_clear_error():
    model, ids = tuned(), text()
    fastpeft.accelerate(model)
    for arguments, words in (
        ({}, "input_ids or inputs_embeds"),
        ({"input_ids": ids, "attention_mask": torch.ones(BATCH, 1, 14, 14)}, "4 dimensions"),
    ):
        with pytest.raises(ValueError, match=words):
            model(**arguments)


def test_token_types_of_a_causal_model_are_left_out_as_in_peft():
    model, ids = tuned(gpt2), text()
    expected = model(input_ids=ids).logits
    fastpeft.accelerate(model)
    with pytest.warns(UserWarning, match="token_type_ids are ignored"):
        assert torch.equal(model(input_ids=ids, token_type_ids=torch.ones_like(ids)).logits, expected)


def test_the_report_says_why_a_prompt_is_left():
    cpt = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4])
    other = tuned()
    other.prompt_encoder["default"].__class__ = type("Own", (peft.PromptEmbedding,), {})
    untyped = peft.PeftModel(llama(), PromptTuningConfig(num_virtual_tokens=P))
    for model, words in (
        (get_peft_model(llama(), cpt), "CPT is not supported"),
        (other, "a Own as encoder"),
        (untyped, "PeftModel is not supported"),
    ):
        stock = type(model)
        report = fastpeft.accelerate(model)
        assert [row.status for row in report] == ["peft"] and words in report.rows[0].reason
        assert type(model) is stock
        with pytest.raises(ValueError, match=words):
            fastpeft.accelerate(model, strict=True)
