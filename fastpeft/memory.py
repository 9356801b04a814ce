"""How much memory a training step needs, by arithmetic over a model's configuration.

A step is what `fastpeft finetune` runs: a frozen base in bf16 or nf4, trainable parameters, their gradients and the
optimizer's state in float32, products in bf16 under autocast, attention that keeps no scores, `fastpeft.accelerate`,
and one micro-batch. M tokens of H features pass through layers that keep, for each token, what autograd saves
(`_llama_layer`, `_gpt2_layer`: derived from the operations, checked against measured bytes in tests/test_memory.py).

Nothing here imports torch. All sizes are bytes unless they say otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

HALF, FLOAT = 2, 4
# A weight in nf4 with double quantization, as finetune loads it: half a byte, a byte of absmax for each block of 64,
# and a float32 for each 256 of those (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314).
NF4 = 0.5 + 1 / 64 + FLOAT / (64 * 256)
# The float32 buffer of ops.cross_entropy; a test holds the two together.
LOSS_BUFFER = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
# Scores that ops.prefix_attention has in one block on a CPU, for each thread; a test holds the two together.
SCORES_BLOCK = 2**17
# What a checkpoint keeps besides its input: the state of the CPU's random number generator.
RNG_STATE = 5056

# Bytes for each trainable parameter: of the state, and of what the step itself allocates. 8-bit states have a float32
# for each block of 256; torch's AdamW on a GPU makes one more list of tensors, the fused one none. Paged states count
# in full, though they may leave the GPU.
OPTIMIZERS = {
    "adamw_torch": (8, 4),
    "adamw_torch_fused": (8, 0),
    "adamw_8bit": (2 + 2 * FLOAT / 256, 0),
    "paged_adamw_8bit": (2 + 2 * FLOAT / 256, 0),
    "paged_adamw_32bit": (8, 0),
    "sgd": (0, 0),
}


# Models.


@dataclass(frozen=True)
class Linear:
    """`[N, K]`. reads: a name for its input, the same for linears that share it; None where autograd keeps that input
    anyway. ia3: whether (IA)^3 scales its "output" or its "input", by peft's choice of targets for the architecture."""

    name: str
    K: int
    N: int
    reads: str | None = None
    bias: bool = False
    ia3: str | None = None


@dataclass(frozen=True)
class Layers:
    """So many equal layers. kept: what autograd saves for a token of one layer, without adapters and with a frozen
    base: of the norm before attention, of attention, and of the norm and feed-forward after it. kept_full: of all, with
    float32 weights that all train. work: what backward of a layer allocates for a token."""

    count: int
    linears: tuple[Linear, ...]
    other_parameters: int
    kept: tuple[int, int, int]
    kept_full: int
    work: int


@dataclass(frozen=True)
class Shape:
    """What the estimate needs to know of a model. hidden, vocab: features and rows of the embedding. heads: of queries.
    key_width: features of a layer's keys. head: parameters of the output layer, 0 where it is tied. embeddings: all
    parameters that are neither there nor in layers. checked: whether the tests compare its activations with measured
    ones."""

    layers: tuple[Layers, ...]
    hidden: int
    vocab: int
    heads: int
    key_width: int
    embeddings: int
    head: int
    checked: bool = True

    @property
    def linear_parameters(self) -> int:
        """Of the layers' matrices: what 4 bits compress."""
        return sum(group.count * linear.K * linear.N for group in self.layers for linear in group.linears)

    @property
    def parameters(self) -> int:
        biases = sum(group.count * linear.N * linear.bias for group in self.layers for linear in group.linears)
        others = sum(group.count * group.other_parameters for group in self.layers)
        return self.linear_parameters + biases + others + self.embeddings + self.head

    @property
    def depth(self) -> int:
        return sum(group.count for group in self.layers)


# Model types of the Llama layer, and what `_llama` reads of a configuration besides LLAMA_FIELDS.
LLAMA_LIKE = {"llama": (), "mistral": (), "qwen2": (), "qwen3": ("head_dim",)}
LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


def shape_of(config, device: str = "cuda") -> Shape:
    """config: a transformers configuration, or anything with its attributes. Other architectures than Llama, Mistral,
    Qwen2, Qwen3 and GPT-2 are built on the meta device and counted; their activations are then a rough guess.

    device: "cuda" or "cpu", whose autocast differ. Raises ValueError for what no model can be built of."""
    if config.model_type in LLAMA_LIKE:
        return _llama(config)
    if config.model_type == "gpt2":
        return _gpt2(config, device)
    return _counted(config)


def _llama(config) -> Shape:
    H, heads = config.hidden_size, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or H // heads
    vocab = config.vocab_size * H
    return Shape(
        layers=(_llama_layer(config, heads, kv_heads, head_dim),),
        hidden=H,
        vocab=config.vocab_size,
        heads=heads,
        key_width=kv_heads * head_dim,
        embeddings=vocab + H,  # and the last norm
        head=0 if config.tie_word_embeddings else vocab,
    )


def _llama_layer(config, heads: int, kv_heads: int, head_dim: int) -> Layers:
    """Autograd keeps, for a token (transformers 5, modeling_llama; H hidden, I intermediate, Q and KV features of
    queries and of keys):

    - each of the two RMS norms: its input in float32, and a float32 (the product's two factors). Qwen3 has two more, of
      queries and keys. All trained: the input is the float32 residual stream itself, the product is kept too;
    - attention (flash): queries and keys after rotation, values, output, and a float32 logsumexp for each head;
    - MLP: gate, silu(gate) and up.

    What the linears read is kept only where something on them trains, in bf16: one tensor for q, k, v and one for gate,
    up under fastpeft's LoRA; one for each linear under autocast's casts of the float32 stream. Backward of the MLP
    allocates the gradients of gate, up and their product, of which two are more than it has freed by then; all three
    where the product itself was not kept.
    """
    H, I = config.hidden_size, config.intermediate_size  # noqa: E741
    Q, KV = heads * head_dim, kv_heads * head_dim
    qkv_bias = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
    out_bias = config.model_type != "qwen2" and getattr(config, "attention_bias", False)
    mlp_bias = getattr(config, "mlp_bias", False)
    linears = (
        Linear("q_proj", H, Q, "norm1", qkv_bias),
        Linear("k_proj", H, KV, "norm1", qkv_bias, "output"),
        Linear("v_proj", H, KV, "norm1", qkv_bias, "output"),
        Linear("o_proj", Q, H, None, out_bias),
        Linear("gate_proj", H, I, "norm2", mlp_bias),
        Linear("up_proj", H, I, "norm2", mlp_bias),
        Linear("down_proj", I, H, "product", mlp_bias, "input"),
    )
    normed = Q + KV if config.model_type == "qwen3" else 0
    norm = FLOAT * H + FLOAT
    attention = FLOAT * (normed + (heads + kv_heads if normed else 0)) + HALF * (2 * Q + 2 * KV) + FLOAT * heads
    kept = (norm, attention, norm + HALF * 3 * I)
    products, inputs = FLOAT * (2 * H + normed), HALF * (3 * H + 2 * H + I)
    return Layers(
        count=config.num_hidden_layers,
        linears=linears,
        other_parameters=2 * H + (2 * head_dim if normed else 0),
        kept=kept,
        kept_full=sum(kept) + products + inputs,
        work=HALF * (H + 2 * I),
    )


def _gpt2(config, device: str) -> Shape:
    H, vocab = config.n_embd, config.vocab_size * config.n_embd
    return Shape(
        layers=(_gpt2_layer(config, device),),
        hidden=H,
        vocab=config.vocab_size,
        heads=config.n_head,
        key_width=H,
        embeddings=vocab + config.n_positions * H + 2 * H,
        head=0 if config.tie_word_embeddings else vocab,
    )


def _gpt2_layer(config, device: str) -> Layers:
    """Autograd keeps, for a token (transformers 5, modeling_gpt2): each layer norm's input and two float32; queries,
    keys and values (one tensor), attention's output, its logsumexp; of the GELU, written out with tanh: x for the cube,
    tanh, 1 + tanh and x / 2; dropout's two masks. CUDA's autocast takes layer norm and powers to float32, a CPU's does
    not."""
    H, I = config.n_embd, config.n_inner or 4 * config.n_embd  # noqa: E741
    wide = FLOAT if device == "cuda" else HALF
    mask = (1 if device == "cuda" else HALF) if config.resid_pdrop > 0 else 0
    linears = (
        Linear("c_attn", H, 3 * H, "norm1", True, "output"),
        Linear("c_proj", H, H, None, True),
        Linear("c_fc", H, I, "norm2", True),
        Linear("mlp.c_proj", I, H, "gelu", True, "input"),
    )
    attention = HALF * 4 * H + FLOAT * config.n_head + mask * H
    feed_forward = 3 * wide * I + HALF * I + mask * H
    norm, norm_full = (width * H + 2 * FLOAT for width in (wide, FLOAT))
    return Layers(
        count=config.n_layer,
        linears=linears,
        other_parameters=4 * H,
        kept=(norm, attention, norm + feed_forward),
        kept_full=2 * norm_full + attention + feed_forward + HALF * (2 * H + I),
        work=HALF * H + 2 * wide * I,
    )


def _counted(config) -> Shape:
    """Any architecture, from its modules on the meta device. The guess for activations: float32 of what each layer's
    norms read, and what each linear makes, in bf16. Experts that are packed into one tensor are no linears here."""
    import torch
    import transformers
    from torch import nn

    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    else:
        # BERT and its like are on the list of causal models too, as decoders.
        masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
        causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
        causal = causal and (not masked or getattr(config, "is_decoder", False))
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    with torch.device("meta"):
        model = auto.from_config(config)
    text = config.get_text_config()
    H = text.hidden_size
    groups, inside = [], 0
    for module in model.modules():
        # The stacks of layers: lists of one class that holds linears. A list within a layer belongs to that layer.
        if not isinstance(module, nn.ModuleList) or not len(module) or len({type(m) for m in module}) != 1:
            continue
        weights = [sum(p.numel() for p in layer.parameters()) for layer in module]
        groups.append((module, weights))
    nested = {id(m) for module, _ in groups for m in module.modules() if m is not module}
    layers = []
    for module, weights in groups:
        if id(module) in nested:
            continue
        linears = tuple(
            Linear(name, *_k_and_n(m), reads=name, bias=getattr(m, "bias", None) is not None, ia3=_ia3(name))
            for name, m in module[-1].named_modules()
            if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
        )
        if not linears:
            continue
        held = sum(linear.K * linear.N + linear.N * linear.bias for linear in linears)
        wide = max(linear.N for linear in linears)
        # Which of the linears are attention's is not known: none of them.
        kept = (FLOAT * H, 0, FLOAT * H + HALF * sum(linear.N for linear in linears))
        # Layers that differ (the first of T5 has the table of positions) count with the least of them.
        others = min(weights) - held
        layers.append(Layers(len(module), linears, others, kept, 2 * sum(kept), HALF * (H + 2 * wide)))
        inside += len(module) * min(weights)
    if not layers:
        raise ValueError(f"no stack of layers with linears was found in {type(model).__name__}")
    total = sum(p.numel() for p in model.parameters())
    output = model.get_output_embeddings()
    tied = output is None or output.weight is model.get_input_embeddings().weight
    head = 0 if tied else output.weight.numel()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or H // heads
    rest = total - inside - head
    return Shape(tuple(layers), H, text.vocab_size, heads, kv_heads * head_dim, rest, head, checked=False)


def _k_and_n(module) -> tuple[int, int]:
    return tuple(module.weight.shape) if type(module).__name__ == "Conv1D" else tuple(reversed(module.weight.shape))


def _ia3(name: str) -> str | None:
    """By the names that models give to keys, values and the last product of the feed-forward."""
    last = name.rsplit(".", 1)[-1]
    if last in ("k_proj", "v_proj", "k", "v", "key", "value", "query_key_value", "qkv_proj"):
        return "output"
    return "input" if last in ("down_proj", "fc2", "wo", "dense_4h_to_h") else None


# Methods.


@dataclass(frozen=True)
class Options:
    """rank: of LoRA and DoRA, on all linears of the layers. bottleneck: features inside an adapter. positions: of a
    prefix or prompt."""

    rank: int = 16
    bottleneck: int = 64
    positions: int = 32


@dataclass(frozen=True)
class Method:
    """One way to train.

    parameters(shape, options): how many train. stored(shape, options): how many of them one task needs at inference,
    where it is not all. kept(layers, options): bytes that it adds to what one layer keeps for a token. changes:
    "weights", "layers" (modules beside frozen weights) or "input" (positions before the text or its keys). starts: the
    part of `Layers.kept` in which it begins to train; what comes before it in the first layer needs no gradient, and is
    not kept. reads: it keeps what the linears read, which backward frees as it goes. attends: with positions in
    ops.prefix_attention. merges: into dense weights, without a cost afterwards. lengthens: its positions pass through
    every layer. quality: what was published about it.
    """

    name: str
    parameters: Callable[[Shape, Options], int]
    kept: Callable[[Layers, Options], int]
    changes: str
    quality: str
    starts: int = 1
    reads: bool = False
    attends: bool = False
    merges: bool = False
    lengthens: bool = False
    four_bits: bool = False
    stored: Callable[[Shape, Options], int] | None = None


def _of_linears(shape: Shape, count: Callable[[Linear], int]) -> int:
    return sum(group.count * sum(map(count, group.linears)) for group in shape.layers)


def _inputs(layers: Layers) -> int:
    """What the linears read, each input once, in bf16, without what is kept anyway."""
    widths = {linear.reads: linear.K for linear in layers.linears if linear.reads is not None}
    return HALF * sum(widths.values())


def _lora(shape, options):
    return _of_linears(shape, lambda linear: options.rank * (linear.K + linear.N))


def _lora_kept(layers, options):
    """ops.lora_linear keeps x and x A^T."""
    return _inputs(layers) + HALF * options.rank * len(layers.linears)


def _dora(shape, options):
    return _lora(shape, options) + _of_linears(shape, lambda linear: linear.N)


def _dora_kept(layers, options):
    """ops.dora_linear keeps what lora_linear does, and the product before its gain."""
    return _lora_kept(layers, options) + HALF * sum(linear.N for linear in layers.linears)


def _ia3_count(shape, options):
    return _of_linears(shape, lambda linear: {"output": linear.N, "input": linear.K, None: 0}[linear.ia3])


def _ia3_kept(layers, options):
    """ops.ia3_linear keeps what it scales: a product, or the input of the feed-forward's last."""
    return HALF * sum({"output": linear.N, "input": linear.K, None: 0}[linear.ia3] for linear in layers.linears)


def _adapter(places: int, starts: int):
    def parameters(shape, options):
        R, H = options.bottleneck, shape.hidden
        return places * shape.depth * (2 * R * H + R + H)

    def kept(layers, options):
        """ops.bottleneck keeps x and the pre-activation; x has the features that the last linear makes."""
        return places * HALF * (layers.linears[-1].N + options.bottleneck)

    return {"parameters": parameters, "kept": kept, "starts": starts}


def _nothing(layers, options):
    return 0


def _prefix(shape, options):
    return options.positions * 2 * shape.depth * shape.key_width


def _prefix_mlp(shape, options):
    """peft's encoder, as wide as the keys: embedding, linear, tanh, linear."""
    width = shape.key_width
    return options.positions * width + width * (width + 1) + (width + 1) * 2 * shape.depth * width


def _prompt(shape, options):
    return options.positions * shape.hidden


def _prompt_mlp(shape, options):
    """peft's encoder, as wide as the embedding: embedding and three linears."""
    return _prompt(shape, options) + 3 * shape.hidden * (shape.hidden + 1)


def _all(shape, options):
    return shape.parameters


_LORA = {"parameters": _lora, "kept": _lora_kept, "changes": "layers", "reads": True, "merges": True}
_DORA = _LORA | {"parameters": _dora, "kept": _dora_kept}

# In the order of the quality that the publications found; where they did not compare, of what they train.
METHODS = {
    method.name: method
    for method in (
        Method(
            "full",
            _all,
            _nothing,
            changes="weights",
            starts=0,
            reads=True,
            merges=True,
            quality="the most room to learn; ahead of LoRA on code and mathematics (Biderman et al., 2024)",
        ),
        Method("dora", **_DORA, quality="above LoRA of the same rank (Liu et al., DoRA, 2024)"),
        Method("lora", **_LORA, quality="equal to full fine-tuning on many tasks (Hu et al., 2021)"),
        Method("qdora", **_DORA, four_bits=True, quality="DoRA on a base that has lost little in 4 bits"),
        Method("qlora", **_LORA, four_bits=True, quality="equal to LoRA in 16 bits (Dettmers et al., 2023)"),
        Method(
            "adapter-parallel",
            **_adapter(1, starts=3),
            changes="layers",
            quality="ahead of adapters in series and of prefixes (He et al., 2022)",
        ),
        Method(
            "adapter-houlsby",
            **_adapter(2, starts=2),
            changes="layers",
            quality="within 0.4% of full fine-tuning on GLUE (Houlsby et al., 2019)",
        ),
        Method(
            "adapter-pfeiffer",
            **_adapter(1, starts=3),
            changes="layers",
            quality="about Houlsby's with half the modules (Pfeiffer et al., 2020)",
        ),
        Method(
            "p-tuning-v2",
            _prefix_mlp,
            _nothing,
            changes="input",
            attends=True,
            stored=_prefix,
            quality="equal to full fine-tuning on understanding tasks (Liu et al., P-Tuning v2, 2021)",
        ),
        Method(
            "prefix",
            _prefix,
            _nothing,
            changes="input",
            attends=True,
            quality="equal to full fine-tuning on table-to-text, below on summaries (Li and Liang, 2021)",
        ),
        Method(
            "ia3",
            _ia3_count,
            _ia3_kept,
            changes="layers",
            merges=True,
            quality="for few examples; ahead of in-context learning (Liu et al., 2022)",
        ),
        Method(
            "prompt",
            _prompt,
            _nothing,
            changes="input",
            starts=0,
            lengthens=True,
            quality="near full fine-tuning only from about 10 billion parameters on (Lester et al., 2021)",
        ),
        Method(
            "p-tuning",
            _prompt_mlp,
            _nothing,
            changes="input",
            starts=0,
            lengthens=True,
            stored=_prompt,
            quality="for understanding tasks; behind p-tuning-v2 below 10 billion parameters (Liu et al., 2021)",
        ),
    )
}


def _attention_work(shape: Shape, batch_size: int, seq_len: int, P: int) -> int:
    """What backward of ops.prefix_attention allocates on a CPU (prefix_attention_eager): for the sequences that are
    worked on together, scores, weights and their gradients in float32, two of them in bf16 too; queries, keys, values
    and the output's gradient, which is as wide as the queries, in bf16 or float32 or both, and the gradients."""
    scores = shape.heads * seq_len * (P + seq_len)
    block = SCORES_BLOCK * (os.cpu_count() or 1)
    together = min(batch_size, max(1, block // scores))
    rows = 2 * (HALF + FLOAT) * shape.hidden * seq_len + (HALF + 4 * FLOAT) * shape.key_width * (P + seq_len)
    gradients = HALF * batch_size * seq_len * (2 * shape.hidden + 2 * shape.key_width)
    return (4 * FLOAT + 2 * HALF) * min(together * scores, block) + together * rows + gradients


# The estimate.


@dataclass(frozen=True)
class Estimate:
    """Bytes. Each part is what it is at its most. `peak` is the most at one time: less than their sum where gradients
    come only after activations have gone. workspace: what else is allocated at the peak. adapters, gradients and
    optimizer have `trainable` parameters; `stored` of them make a task's file."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    peak: int
    trainable: int
    stored: int


def estimate(
    config,
    method: str,
    *,
    batch_size: int = 2,
    seq_len: int = 256,
    optimizer: str = "adamw_torch",
    gradient_checkpointing: bool = False,
    four_bits: bool = False,
    options: Options = Options(),  # noqa: B008  it is frozen
    device: str = "cuda",
) -> Estimate:
    """The memory of one training step of `method` on the model that `config` (or a Shape) describes.

    four_bits: the linears of the layers in nf4, which qlora and qdora imply. device: "cuda" or "cpu".

    Of the moments when most is allocated, the greatest counts: the loss (logits and their gradient in bf16, and a
    float32 buffer of the loss); backward of the last norm; backward of the last layer, when all layers' activations
    are there; backward of the first, when all gradients are; the optimizer's step. With 4 bits backward of a layer
    holds one dequantized weight. With checkpoints a layer keeps its input, and is computed again for its backward.

    Not counted: the CUDA context, the allocator's fragments, masks of padded or packed batches, buffers of attention.
    A trainer with a loss of its own that makes no logits, as TRL's, needs less. Stock peft needs more
    (benchmarks/memory.py measures it). Raises ValueError for an unknown method or optimizer, a size below 1, and 4 bits
    for full fine-tuning.
    """
    _check(method, optimizer, four_bits, batch_size=batch_size, seq_len=seq_len, **vars(options))
    shape = config if isinstance(config, Shape) else shape_of(config, device)
    way, full = METHODS[method], method == "full"
    four_bits = four_bits or way.four_bits
    tokens = batch_size * (seq_len + (options.positions if way.lengthens else 0))

    trainable = way.parameters(shape, options)
    state, step = (round(trainable * size) for size in OPTIMIZERS[optimizer])
    frozen = NF4 * shape.linear_parameters if four_bits else HALF * shape.linear_parameters
    weights = FLOAT * trainable if full else frozen + HALF * (shape.parameters - shape.linear_parameters)
    adapters = 0 if full else FLOAT * trainable
    gradients = FLOAT * trainable
    fixed = weights + adapters + state

    # The residual stream is as wide as the embedding is; autocast keeps bf16 copies of float32 weights for backward.
    stream = (FLOAT if full else HALF) * shape.hidden
    layers = []
    for group in shape.layers:
        copies = HALF * sum(linear.K * linear.N for linear in group.linears) if full else 0
        whole = tokens * (group.kept_full if full else sum(group.kept) + way.kept(group, options)) + copies
        dense = HALF * max(linear.K * linear.N for linear in group.linears) if four_bits else 0
        work = group.work + (0 if way.reads else HALF * group.linears[-1].K)
        layers.append((whole, tokens * work + dense))
    kept = [tokens * stream + RNG_STATE if gradient_checkpointing else whole for whole, _ in layers]
    again = max(whole for whole, _ in layers) if gradient_checkpointing else 0
    work = max(work for _, work in layers)
    # A checkpoint keeps the layer's input whether or not that needs a gradient.
    spared = 0 if gradient_checkpointing else tokens * sum(shape.layers[0].kept[: way.starts])
    # A prompt is joined to the text's embeddings, which a checkpoint's input that requires a gradient keeps alive.
    again += HALF * batch_size * seq_len * shape.hidden if way.lengthens and gradient_checkpointing else 0
    first = kept[0] - spared
    all_kept = sum(group.count * size for group, size in zip(shape.layers, kept, strict=True)) - spared

    logits = tokens * HALF * shape.vocab
    buffer = min(tokens * FLOAT * shape.vocab, max(LOSS_BUFFER[device], FLOAT * shape.vocab))
    last_norm = tokens * FLOAT * shape.hidden * (2 if full else 1)
    end = logits + last_norm + (HALF * shape.vocab * shape.hidden + tokens * HALF * shape.hidden if full else 0)
    # (gradients, activations, workspace). Backward of an RMS norm: five float32 tensors of its size.
    moments = [
        (0, all_kept + end, logits + buffer),
        (0, all_kept + last_norm, tokens * 5 * FLOAT * shape.hidden),
        (0, all_kept + again, work),
        (gradients * (1 - 1 / shape.depth), first + again, work),
        (gradients, 0, step),
    ]
    if way.attends and device == "cpu":  # what came after attention in its layer is free again
        beside = tokens * shape.layers[-1].kept[2]
        moments.append((0, all_kept + again - beside, _attention_work(shape, batch_size, seq_len, options.positions)))
    if full:  # the head's gradient is made in bf16; a tied embedding has a second one, which is then added
        table = shape.vocab * shape.hidden
        moments.append((FLOAT * table, all_kept + end, HALF * table))
        moments.append((gradients, 0, 0 if shape.head else FLOAT * table))
    greatest = max(moments, key=sum)
    sizes = (
        weights,
        adapters,
        gradients,
        state,
        max(activations for _, activations, _ in moments),
        greatest[2],
        fixed + sum(greatest),
        trainable,
        (way.stored or way.parameters)(shape, options),
    )
    return Estimate(*map(round, sizes))


def _check(method: str, optimizer: str, four_bits: bool, **sizes: int) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; allowed are {', '.join(METHODS)}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {optimizer!r}; allowed are {', '.join(OPTIMIZERS)}")
    if four_bits and method == "full":
        raise ValueError("full fine-tuning has no frozen weights to hold in 4 bits")
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


# Modelled, H100 SXM: bf16 matrix products and memory, as the benchmarks measure such ceilings.
FLOPS, BANDWIDTH = 800e12, 3e12


def step_seconds(
    shape: Shape,
    method: str,
    *,
    batch_size: int = 2,
    seq_len: int = 256,
    gradient_checkpointing: bool = False,
    four_bits: bool = False,
    options: Options = Options(),  # noqa: B008
) -> float:
    """The time of a step's products on an H100, modelled: good for comparing methods, not for planning.

    A parameter costs a token two operations forward, two for the gradient of its input, two for its own where it
    trains. Of memory only what differs between methods counts: dequantizing for each product, and the optimizer."""
    way, full = METHODS[method], method == "full"
    tokens = batch_size * (seq_len + (options.positions if way.lengthens else 0))
    trainable = way.parameters(shape, options)
    base = shape.linear_parameters + shape.vocab * shape.hidden
    passes = 2 + 1 + gradient_checkpointing if full else 2 + gradient_checkpointing
    operations = 2 * passes * tokens * base
    if way.changes == "layers":
        operations += 2 * (3 + gradient_checkpointing) * tokens * trainable
    traffic = 7 * FLOAT * trainable  # gradient, and weight and two states read and written
    if four_bits or way.four_bits:
        traffic += (2 + gradient_checkpointing) * (NF4 + HALF) * shape.linear_parameters
    return operations / FLOPS + traffic / BANDWIDTH
