"""Checks at load that a model is decoded exactly: compares the decoder with the model's own plain forward passes.

Probes reach beyond every window and chunk, which are made small for as long as they run; two rows of different
lengths share passes; a prompt is read in parts, another one is copied from a row that holds it, and steps follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.hub.model_facts import stated, text_config
from pipeline.protocol.messages import Admission, Step
from pipeline.protocol.topology import HostRole
from pipeline.worker.hosts import LanguageRunner
from pipeline.worker.recurrent_passes import RecurrentPasses

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}  # nats
ROUNDINGS = 2.0  # times what one rounding of the embeddings does: every layer rounds
SMALL = 5  # tokens of windows and chunks while a model is probed
LENGTHS = (17, 9)  # of the probes: beyond three windows, and not beyond two
NUM_STEPS = 3  # of each probe's last tokens, decoded one by one
NUM_OTHERS, TOGETHER = 8, 7  # rows beside the one whose bits are compared: in its prompt's pass, in a step
LIMITS = ("sliding_window", "attention_chunk_size")


def probe_tokens(model: Any, vocab_size: int) -> list[list[int]]:
    """Token ids of the probes: the same for every model of a vocabulary, and none of them special as a rule."""
    generator = torch.Generator().manual_seed(0)
    high = max(3, min(vocab_size, 30_000))
    return [torch.randint(2, high, (length,), generator=generator).tolist() for length in LENGTHS]


@contextmanager
def small_limits(config: Any) -> Iterator[None]:
    """Make the windows and chunks that a configuration names small, so that short probes reach beyond them.

    transformers reads them whenever it makes a mask.
    """
    text, limits = text_config(config), _large_limits(config)
    try:
        for name in limits:
            setattr(text, name, SMALL)
        yield
    finally:
        for name, value in limits.items():
            setattr(text, name, value)


def has_large_limits(config: Any) -> bool:
    """Whether `small_limits` changes anything."""
    return bool(_large_limits(config))


def _large_limits(config: Any) -> dict[str, int]:
    text = text_config(config)
    return {name: value for name in LIMITS if isinstance(value := stated(text, name), int) and value > SMALL}


@torch.inference_mode()
def plain_logprobs(model: Any, probes: Sequence[Sequence[int]], vocab_size: int) -> list[Tensor]:
    """Log-probabilities [NUM_STEPS, V] of the last steps of each probe, by plain passes with the model's
    attention."""
    device = next(model.parameters()).device
    expected = []
    for probe in probes:
        logits = model(input_ids=torch.tensor([list(probe)], device=device), use_cache=False).logits
        expected.append(logits[0, -NUM_STEPS:, :vocab_size].float().log_softmax(-1))
    return expected


@torch.inference_mode()
def largest_difference(
    runner: LanguageRunner,
    roles: Sequence[HostRole],
    probes: Sequence[Sequence[int]],
    expected: Mapping[str | None, Sequence[Tensor]],
) -> float:
    """The largest difference of the runner's log-probabilities from the expected ones, in nats.

    The runner needs one slot more than there are probes: there the first prompt is read again, as a copy.

    Args:
        runner: with `len(probes) + 1` slots.
        roles: its roles.
        probes: token ids.
        expected: by adapter, what `plain_logprobs` gave.
    """
    slots = list(range(len(probes) + 1))
    texts = [*probes, probes[0]]
    prompts = [{role.name: text[: len(text) - NUM_STEPS + 1] for role in roles} for text in texts]
    shared = {role.name: len(probes[0]) // 2 for role in roles}
    runner.advance(Step([Admission(slot, prompts[slot], shared if slot == 0 else {}) for slot in slots[:-1]]))
    runner.advance(Step([Admission(slots[-1], prompts[-1], shared)]))
    worst = _difference(runner, slots[:-1], roles, expected, 0)
    for step in range(1, NUM_STEPS):
        tokens = [text[len(text) - NUM_STEPS + step] for text in texts]
        runner.advance(Step((), slots, tokens))
        again = {adapter: [*each, each[0]] for adapter, each in expected.items()}
        worst = max(worst, _difference(runner, slots, roles, again, step))
    return worst


@torch.inference_mode()
def tolerance_of(model: Any, probes: Sequence[Sequence[int]], expected: Sequence[Tensor]) -> float:
    """How far log-probabilities may be from those of plain passes, in nats.

    In half precision a model may magnify roundings: one trained adapter moves by more than a nat what the base alone
    moves by half a nat. So the embeddings are rounded otherwise, and twice of what that does is allowed.

    Args:
        model: whose plain passes they are.
        probes: token ids.
        expected: what `plain_logprobs` gave.
    """
    dtype = model.dtype
    least = TOLERANCE.get(dtype, 0.5)
    if dtype.itemsize > 2:
        return least
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return least
    if embeddings is None:
        return least
    generator = torch.Generator().manual_seed(0)

    def round_otherwise(_: Any, __: Any, states: Tensor) -> Tensor:
        signs = torch.randint(0, 2, states.shape, generator=generator).to(states.device) * 2 - 1
        return (states.float() * (1 + signs * torch.finfo(dtype).eps / 2)).to(states.dtype)

    hook = embeddings.register_forward_hook(round_otherwise)
    try:
        moved = plain_logprobs(model, probes, expected[0].shape[-1])
    finally:
        hook.remove()
    most = max((left - right).abs().max().item() for left, right in zip(moved, expected, strict=True))
    return max(least, ROUNDINGS * most) if math.isfinite(most) else least


@torch.inference_mode()
def reads_parts(passes: RecurrentPasses, probe: Sequence[int]) -> bool:
    """Whether a text that is read in two parts gives the logits of one that is read whole.

    Some models of the first Mamba's kind go on from a state with one token, and with several begin anew.

    Args:
        passes: of the model.
        probe: token ids.
    """
    passes.lay_out(2, [None] * 3)
    at = len(probe) // 2
    whole_V = passes.read(0, probe, 0).log_softmax(-1)
    passes.read(1, probe[:at], 0)
    parts_V = passes.read(1, probe[at:], at).log_softmax(-1)
    passes.let_go()
    return bool((whole_V - parts_V).abs().max() <= TOLERANCE.get(passes.dtype, 0.5))


@torch.inference_mode()
def bits_are_a_rows_own(
    make_runner: Callable[[int], LanguageRunner], roles: Sequence[HostRole], probes: Sequence[Sequence[int]]
) -> bool:
    """Whether a row's log-probabilities have the same bits alone and beside others, after its prompt and a step.

    Which matrix kernels a processor has, and what else a model computes, decides that, so it is tried.

    Args:
        make_runner: makes a runner with so many slots, none of them used.
        roles: its roles.
        probes: token ids.
    """
    *prompt, last = probes[0][: SMALL + 5]
    lone = make_runner(1)
    lone.advance(Step([Admission(0, {role.name: prompt for role in roles})]))
    after_prompt = lone.logprobs_at([0], None)
    lone.advance(Step((), [0], [last]))
    after_step = lone.logprobs_at([0], None)

    # among others; where the prompt is read again, what the first of its rows computes is copied
    others = [probes[1][at : at + 1 + at % 3] for at in range(NUM_OTHERS)]
    runner, texts = make_runner(NUM_OTHERS + TOGETHER), [*others, *[prompt] * TOGETHER]
    runner.advance(Step([Admission(slot, {role.name: text for role in roles}) for slot, text in enumerate(texts)]))
    if not torch.equal(runner.logprobs_at([NUM_OTHERS], None), after_prompt):
        return False
    slots = list(range(NUM_OTHERS, NUM_OTHERS + TOGETHER))
    runner.advance(Step((), slots, [last] * TOGETHER))
    return torch.equal(runner.logprobs_at(slots, None), after_step.expand(TOGETHER, -1, -1))


def _difference(
    runner: LanguageRunner,
    slots: Sequence[int],
    roles: Sequence[HostRole],
    expected: Mapping[str | None, Sequence[Tensor]],
    step: int,
) -> float:
    found_BRV = runner.logprobs_at(slots, None)
    wanted_BRV = torch.stack(
        [torch.stack([expected[role.adapter][at][step] for role in roles]) for at in range(len(slots))]
    )
    difference = (found_BRV - wanted_BRV).abs().max().item()
    return difference if difference == difference else float("inf")  # NaN counts as a difference
