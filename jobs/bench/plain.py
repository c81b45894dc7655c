"""What the decoder is measured against: bare forward passes, and a loop over transformers as users write it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.bench.models import Work
from pipeline.hub.sources import fetch_weights, resolve_model
from pipeline.worker.cuda_graphs import CapturedGraph
from pipeline.worker.devices import pick_device, pick_dtype
from pipeline.worker.stopwatch import Stopwatch

CONTEXT = 64  # tokens of every row when the floor is measured


def load_plain_model(model: str, cache_folder: Path) -> Any:
    """The model with its own attention."""
    from transformers import AutoModelForCausalLM

    device = pick_device("auto")
    folder = fetch_weights(resolve_model(model, cache_folder=cache_folder), cache_folder=cache_folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=pick_dtype("auto", device), use_safetensors=True)
    return loaded.to(device).eval()


@torch.inference_mode()
def time_floor(model: Any, num_rows: int, *, num_steps: int) -> float:
    """Median seconds of one decoding pass of `num_rows` rows of equal length, with transformers' own cache.

    On a GPU the pass is captured as a CUDA graph, where that is possible: launching its kernels one
    by one takes far longer.
    """
    device = model.device
    tokens = torch.ones(num_rows, CONTEXT, dtype=torch.long, device=device)
    cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    def run() -> Tensor:
        logits: Tensor = model(tokens[:, :1], past_key_values=cache, use_cache=True).logits
        return logits

    compute = run
    if device.type == "cuda":
        with suppress(RuntimeError):
            compute = CapturedGraph(run, device).replay
    seconds = []
    for _ in range(num_steps):
        started_s = time.perf_counter()
        compute()[0, 0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


def bytes_a_pass(model: Any, num_rows: int, num_tokens: float) -> float:
    """Bytes that a decoding pass has to read: weights but for unused embeddings, and every row's keys and values."""
    embeddings = model.get_input_embeddings().weight
    is_tied = model.get_output_embeddings().weight is embeddings
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    token = 2 * config.num_hidden_layers * heads * width * embeddings.element_size()
    unused = 0 if is_tied else embeddings.numel() * embeddings.element_size()
    return float(weights - unused + num_rows * num_tokens * token)


def copy_bandwidth(device: torch.device, *, num_bytes: int = 2**31, num_copies: int = 20) -> float:
    """Bytes a second that the device reads and writes when it copies: what "memory bandwidth" means here."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    watch = Stopwatch(device)
    with watch.running():
        for _ in range(num_copies):
            target.copy_(source)
    return 2 * num_bytes * num_copies / watch.seconds


@torch.inference_mode()
def decode_plainly(model: Any, work: Work, batch_size: int) -> dict[str, Any]:
    """Left-padded batches, one role after another, each batch until its longest answer is done."""
    num_tokens = num_steps = num_row_steps = num_forwards = 0
    forward_s = solve_s = 0.0
    started_s = time.perf_counter()
    for first in range(0, len(work.lengths), batch_size):
        lengths = work.lengths[first : first + batch_size]
        prompts = work.prompts[first : first + batch_size]
        states = [_Role(model, [prompt[role] for prompt in prompts]) for role in prompts[0]]
        for step in range(max(lengths)):
            before_s = time.perf_counter()
            logprobs_RBV = torch.stack([state.logprobs for state in states])
            weight = 1 / max(1, len(states) - 1)
            tilted_BV = logprobs_RBV[0] + weight * (logprobs_RBV[1:] - logprobs_RBV[0]).sum(0)
            tokens_B = torch.multinomial(tilted_BV.softmax(-1), 1)
            solve_s += time.perf_counter() - before_s
            num_row_steps += sum(step < length for length in lengths)
            num_steps += 1
            if step + 1 < max(lengths):
                before_s = time.perf_counter()
                for state in states:
                    state.append(tokens_B)
                forward_s += time.perf_counter() - before_s
                num_forwards += len(states)
        num_tokens += sum(lengths)
    seconds = time.perf_counter() - started_s
    forward, solve = forward_s / seconds, solve_s / seconds
    return {
        "tokens_per_s": num_tokens / seconds,
        "tokens": num_tokens,
        "seconds": seconds,
        "slot_utilisation": num_row_steps / (num_steps * batch_size),
        "forwards_per_step": num_forwards / num_steps,
        "share": {"forward": forward, "solve": solve, "transport": 0.0, "wait": 1 - forward - solve},
    }


class _Role:
    """One role of a left-padded batch."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self._model = model
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self._mask_BT = torch.tensor(mask, device=model.device)
        self._cache: Any = None
        self._forward(torch.tensor(padded, device=model.device))

    def append(self, tokens_B1: Tensor) -> None:
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(tokens_B1)], 1)
        self._forward(tokens_B1)

    def _forward(self, tokens_BT: Tensor) -> None:
        positions_BT = (self._mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -tokens_BT.shape[1] :]
        output = self._model(
            tokens_BT,
            attention_mask=self._mask_BT,
            position_ids=positions_BT,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        self.logprobs: Tensor = output.logits[:, -1].float().log_softmax(-1)
