"""SmolLM2 out of its GGUF file: weights as safetensors, the tokenizer rebuilt, all of it checked loudly.

transformers reads the weights. It cannot save what it reads from GGUF, and some versions of it build a tokenizer
other than the model's own or leave the head untied. So the tensors move into a fresh model, the tokenizer is built
here from the file's own tokens and merges, and the result is compared with what is known of the model beforehand.
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigurationError

if TYPE_CHECKING:  # seconds of import, for those who prepare the model
    import torch

CONTROL_TOKEN = 3  # GGUF's number for a control token

# Known beforehand, so that a wrong conversion is not merely compared with itself.
KNOWN_TEXT = ("hello world 😀 naïve 42", [28120, 905, 40303, 218, 15486, 46494, 216, 36, 34])
KNOWN_ANSWER = ("The capital of France is", " Paris")
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
ROUND_TRIPS = (
    "Plain words, and (punctuation)!",
    "  two spaces\n\n\tand a tab ",
    "naïve façade, Größe, œuvre, Łódź",
    "日本語と中文, العربية, हिन्दी, עברית",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and a flag 🇩🇪",
    "def f(x):\n    return x**2  # 3.14159, 1e-9",
    "<not> a </special> token & \\backslash",
)
CHAT = (
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 👋"}],
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 👋<|im_end|>\n<|im_start|>assistant\n",
)


def convert_gguf(gguf: Path, folder: Path) -> torch.Tensor:
    """Write the model and its tokenizer as safetensors and JSON; return the logits of the GGUF's own model.

    Raises:
        ConfigurationError: a package is missing, or this version of transformers cannot read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    try:
        tokenizer = build_tokenizer(gguf)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (ImportError, ValueError, OSError, RuntimeError, KeyError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigurationError(
            f"the embedded model cannot be converted: {reason}. cage-align[embedded] brings all that it takes"
        ) from error
    read.eval()
    expected = _logits(read, tokenizer)
    fields = read.config.to_dict()
    for unwanted in ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures"):
        fields.pop(unwanted, None)
    fields |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    tensors = read.state_dict()
    del read
    with torch.device("meta"):
        fresh = LlamaForCausalLM(LlamaConfig(**fields))
    fresh.load_state_dict(tensors, strict=True, assign=True)
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del fresh, tensors
    gc.collect()
    return expected


def build_tokenizer(gguf: Path) -> Any:
    """Byte-level BPE with single digits, from the tokens, merges and chat template that the file holds."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields
    tokens, merges, kinds = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"].contents()
    return tokenizer


def _logits(model: Any, tokenizer: Any, text: str = ROUND_TRIPS[0] + KNOWN_ANSWER[0]) -> torch.Tensor:
    """Logits of every token of the text."""
    import torch

    with torch.inference_mode():
        logits_TV: torch.Tensor = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
        return logits_TV.clone()


def check_conversion(folder: Path, expected: torch.Tensor) -> None:
    """Reload from safetensors and hold it against the GGUF's logits and against what is known of this model.

    Raises:
        ConfigurationError: with everything that is not as it must be, and the versions that made it so.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question, answer = KNOWN_ANSWER
    drawn = tokenizer.decode([int(_logits(model, tokenizer, question)[-1].argmax())])
    text, known_ids = KNOWN_TEXT
    messages, rendered = CHAT
    faults = {
        "its logits differ from the GGUF's": not torch.equal(_logits(model, tokenizer), expected),
        "lm_head and embeddings are not tied": model.lm_head.weight.data_ptr()
        != model.model.embed_tokens.weight.data_ptr(),
        f"it continues {question!r} with {drawn!r} instead of {answer!r}": drawn != answer,
        f"its tokenizer reads {text!r} differently": tokenizer(text)["input_ids"] != known_ids,
        "its chat template renders differently": tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        != rendered,
        "its special tokens are not those of SmolLM2": any(
            getattr(tokenizer, name) != token for name, token in SPECIAL_TOKENS.items()
        ),
    }
    for sample in ROUND_TRIPS:
        same = tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
        faults[f"its tokenizer does not give back {sample!r}"] = not same
    if found := [fault for fault, is_so in faults.items() if is_so]:
        raise ConfigurationError(
            "the embedded model was not converted correctly by these versions "
            f"({', '.join(f'{name} {version}' for name, version in library_versions().items())}): " + "; ".join(found)
        )


def library_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors", "gguf")}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers' own: this module says what it does.

    The bar of the GGUF reader heeds no setting; it writes to the standard error.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
