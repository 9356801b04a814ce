"""The methods of `fastpeft finetune`: their options, their learning rates, how a model gets them, what is saved."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fastpeft.cli.errors import BadInput, one_line
from fastpeft.cli.tasks import TASKS
from fastpeft.expected import cache_name


def add_lora(model, settings, heads, *, dora: bool = False):
    from peft import LoraConfig

    targets = settings.target_modules
    if targets != "all-linear":
        targets = [t.strip() for t in targets.split(",") if t.strip()]
        check_targets(model, targets)
    return add_peft(
        model,
        LoraConfig,
        settings,
        heads,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_dora=dora,
    )


def add_dora(model, settings, heads):
    return add_lora(model, settings, heads, dora=True)


def add_ia3(model, settings, heads):
    from peft import IA3Config

    return add_peft(model, IA3Config, settings, heads)


def add_prefix(model, settings, heads, *, mlp: bool = False):
    from peft import PrefixTuningConfig

    stack = model if cache_name(model.forward) else model.base_model
    if cache_name(stack.forward) is None:
        raise BadInput(f"--method: {type(model).__name__} takes no keys and values from outside, which a prefix is")
    return add_peft(
        model, PrefixTuningConfig, settings, heads, num_virtual_tokens=settings.prefix_length, prefix_projection=mlp
    )


def add_p_tuning_v2(model, settings, heads):
    """The prefix is made by a network as wide as the keys."""
    return add_prefix(model, settings, heads, mlp=True)


def add_prompt(model, settings, heads):
    """It starts as embeddings of random tokens, which Lester et al. found better than random numbers."""
    from peft import PromptTuningConfig, PromptTuningInit

    return add_peft(
        model,
        PromptTuningConfig,
        settings,
        heads,
        num_virtual_tokens=settings.prefix_length,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
    )


def add_p_tuning(model, settings, heads):
    from peft import PromptEncoderConfig

    return add_peft(model, PromptEncoderConfig, settings, heads, num_virtual_tokens=settings.prefix_length)


def add_peft(model, config_class, settings, heads, **options):
    from peft import get_peft_model

    config = config_class(task_type=TASKS[settings.task].peft, **options)
    config.modules_to_save = heads or None
    try:
        model = get_peft_model(model, config)
    except ValueError as error:  # modules that cannot carry an adapter, or a model that peft does not know
        option = "--target-modules" if "target_modules" in options else "--method"
        raise BadInput(f"{option}: {one_line(error)}") from error
    if heads:  # peft has added the usual names, the same ones too
        config.modules_to_save = sorted(set(config.modules_to_save))
    return model


def check_targets(model, targets: list[str]) -> None:
    """Each name must match, by peft's own rule, so that a misspelt one among several is not passed over."""
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        found = [n for n in names if n == target or n.endswith(f".{target}")]
        if not found:
            raise BadInput(f"--target-modules: no module of the model is called '{target}'")
        if any(model.get_submodule(n) is model.get_output_embeddings() for n in found):
            raise BadInput(f"--target-modules: '{target}' is the output head, which TRL cannot train an adapter on")


def adapter(placement: str, scaling: float = 1.0):
    def add(model, settings, heads):
        from fastpeft.nn import BottleneckConfig, add_bottleneck

        try:
            add_bottleneck(model, BottleneckConfig(placement, r=settings.bottleneck, scaling=scaling))
        except ValueError as error:
            raise BadInput(f"--method: {one_line(error)}") from error
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
        return model

    return add


def add_full(model, settings, heads):
    return model.requires_grad_(True)


# What a family of methods has of the command line's options.
OPTIONS = {
    "lora": ("rank", "alpha", "dropout", "target_modules"),
    "adapter": ("bottleneck",),
    "prefix": ("prefix_length",),
    "prompt": ("prefix_length",),
    "ia3": (),
    "full": (),
}


@dataclass(frozen=True)
class Way:
    """family: a key of OPTIONS; of a prefix the virtual tokens are keys and values, of a prompt embeddings. lr: the
    highest learning rate by default, for AdamW. add: of a model, the settings and the names of the modules that train
    in full beside it, returns what trains: the model itself, or peft's around it."""

    family: str
    lr: float
    add: Callable
    four_bit: bool = False

    @property
    def of_peft(self) -> bool:
        return self.family not in ("adapter", "full")


# Learning rates: of LoRA, what QLoRA's authors took up to 13B parameters (Dettmers et al., 2023), and DoRA's about so;
# of adapters, LLM-Adapters' (Hu et al., 2023), in the middle of Houlsby's range; of (IA)^3, T-Few's (Liu et al., 2022);
# of full, that of Llama 2's chat models (Touvron et al., 2023). A flat prefix or prompt starts far from every useful
# one and is not scaled as LoRA's update is, so it takes larger steps: a prompt those of peft's examples (0.3 of Lester
# et al. is for Adafactor), a prefix P-Tuning v2's largest. A network that makes it moves all of it at once, and takes
# smaller ones, as in peft's example of P-tuning.
WAYS = {
    "lora": Way("lora", 2e-4, add_lora),
    "qlora": Way("lora", 2e-4, add_lora, four_bit=True),
    "dora": Way("lora", 2e-4, add_dora),
    "qdora": Way("lora", 2e-4, add_dora, four_bit=True),
    "adapter-houlsby": Way("adapter", 3e-4, adapter("houlsby")),
    "adapter-pfeiffer": Way("adapter", 3e-4, adapter("pfeiffer")),
    "adapter-parallel": Way("adapter", 3e-4, adapter("parallel", scaling=4.0)),  # He et al., 2022
    "prefix": Way("prefix", 1e-2, add_prefix),
    "p-tuning-v2": Way("prefix", 1e-3, add_p_tuning_v2),
    "prompt": Way("prompt", 3e-2, add_prompt),
    "p-tuning": Way("prompt", 1e-3, add_p_tuning),
    "ia3": Way("ia3", 3e-3, add_ia3),
    "full": Way("full", 2e-5, add_full),
}

Method = Enum("Method", {name.replace("-", "_"): name for name in WAYS}, type=str)


def check_options(method: str, given: list[str]) -> None:
    for name in given:
        if name not in OPTIONS[WAYS[method].family]:
            raise BadInput(f"--{name.replace('_', '-')}: {method} has none")


def check_way(settings, compare_steps: int) -> None:
    """What a method cannot do, and what peft itself cannot."""
    way, name = settings.way, settings.method.value
    if way.family == "full" and settings.four_bit:
        raise BadInput("--quantize: full trains every weight, and a weight in 4 bits cannot be trained")
    if not way.of_peft and not settings.accelerate:
        raise BadInput(f"--no-accelerate: peft has no {name}")
    stock = compare_steps or not settings.accelerate or TASKS[settings.task].has_head
    if way.family == "prefix" and settings.gradient_checkpointing and stock:
        raise BadInput("--gradient-checkpointing: stock peft cannot train a prefix with it")


def count_parameters(model) -> tuple[int, int]:
    """(trainable, all); of a 4-bit weight, two to a byte."""
    from fastpeft.nn.frozen import is_linear4bit

    packed = {id(module.weight) for module in model.modules() if is_linear4bit(module)}
    sizes = [
        (p.numel() * p.element_size() * 2 if id(p) in packed else p.numel(), p.requires_grad)
        for p in model.parameters()
    ]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def count_bottlenecks(model) -> int:
    from fastpeft.nn import BottleneckAdapter

    return sum(isinstance(module, BottleneckAdapter) for module in model.modules())


def encoder_of(model):
    """The network that makes peft's virtual tokens, which peft does not save: it saves what the network makes, from
    which it could not be trained on. None where the virtual tokens are parameters themselves."""
    if not hasattr(model, "prompt_encoder"):
        return None
    encoder = model.prompt_encoder[model.active_adapter]
    return encoder if len(list(encoder.parameters())) > 1 else None


def saved_bytes(folder: Path) -> int:
    """Of the weights that are needed to use what was trained; a prompt's encoder is needed to train on only."""
    from fastpeft.nn.prefix import _ENCODER

    return sum(file.stat().st_size for file in folder.glob("*.safetensors") if file.name != _ENCODER)


HEAD = "head.safetensors"


def save_head(model, folder: Path) -> None:
    """What trains beside an adapter that is not peft's; by name, as in the model."""
    from safetensors.torch import save_file

    head = {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad and ".bottleneck." not in n}
    if head:
        save_file(head, folder / HEAD, metadata={"format": "pt"})


def load_head(model, folder: Path) -> None:
    """Reads it back into the model, in the model's type."""
    from safetensors.torch import load_file

    if (folder / HEAD).exists():
        foreign = model.load_state_dict(load_file(folder / HEAD), strict=False).unexpected_keys
        if foreign:
            raise ValueError(f"{folder / HEAD} does not fit the model: {', '.join(foreign[:3])}")


def load_peft_head(model, folder: Path) -> None:
    """The modules that peft trains in full, from its file: for a model whose virtual tokens were loaded otherwise."""
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.copy_(saved[name.replace(f".modules_to_save.{model.active_adapter}", "")])
