"""Reward models of many families: rewards are those of plain passes, and no bit depends on other rows."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from support.family_kinds import others_nightly
from transformers import AutoModelForSequenceClassification

from jobs.families.configurations import FAMILIES, is_installed, make_config
from jobs.families.measure import host_spec, prompts
from pipeline.hub.families import read_table
from pipeline.protocol.messages import Admission, Step
from pipeline.protocol.specs import RewardSpec
from pipeline.protocol.topology import HostRole
from pipeline.worker.cpu_kernels import choose_reproducible_kernels
from pipeline.worker.reward_loading import load_reward_model

NAMES = sorted(
    name for name, family in read_table().families.items()
    if is_installed(name) and FAMILIES[name].why_not is None and family.is_reward_model
)  # fmt: skip
ROLE = HostRole("judge")
NUM_STEPS, NUM_CANDIDATES = 4, 5


@pytest.fixture(autouse=True)
def _quiet():
    """Configurations this small make transformers warn of sizes."""
    choose_reproducible_kernels()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_classifier(folder, name, **settings):
    """A random classifier of a family whose scores differ by about one point."""
    torch.manual_seed(0)
    config = make_config(name)
    config.num_labels = 1
    for key, value in settings.items():
        setattr(config, key, value)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        states = model.base_model(input_ids=torch.arange(5, 29)[None], use_cache=False).last_hidden_state
        model.score.weight.div_((states @ model.score.weight.T).std())
    model.save_pretrained(folder)
    return model


def rewards(runner, texts):
    """By text, the rewards [T, K] of candidates along an answer, with all texts in the slots of one runner."""
    slots = list(range(len(texts)))
    runner.advance(Step([Admission(slot, {ROLE.name: text}) for slot, text in enumerate(texts)]))
    found = []
    for step in range(NUM_STEPS):
        candidates = torch.arange(20 + step, 20 + step + NUM_CANDIDATES).expand(len(texts), -1)
        found.append(runner.rewards_at(slots, candidates)[:, 0])
        runner.advance(Step((), slots, [20 + step] * len(texts)))
    return list(torch.stack(found, 1))


def load(folder, num_slots):
    spec = replace(host_spec(folder), roles=(ROLE,), num_slots=num_slots, reward=RewardSpec((0,)))
    return load_reward_model(spec, RewardSpec((0,)))


@torch.inference_mode()
def plain_rewards(model, text):
    """The same by whole passes of the model, pooled at the last token."""

    def score(ids):
        states = model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        return model.score(states)[0]

    found = []
    for step in range(NUM_STEPS):
        prefix = [*text, *range(20, 20 + step)]
        found.append(torch.stack([score([*prefix, 20 + step + at]) for at in range(NUM_CANDIDATES)]) - score(prefix))
    return torch.stack(found)


@pytest.mark.parametrize("name", others_nightly(NAMES))
def test_rewards_of_a_family_are_those_of_plain_passes_and_no_bit_depends_on_other_rows(name, tmp_path):
    model = make_classifier(tmp_path, name)
    texts = [*prompts(), *(text[:9] for text in prompts())]
    together = rewards(load(tmp_path, len(texts)), texts)
    for row in (0, 1, 4):
        assert torch.equal(rewards(load(tmp_path, 1), [texts[row]])[0], together[row])
    for row in (0, 4):
        torch.testing.assert_close(together[row], plain_rewards(model, texts[row]), atol=2e-3, rtol=0)


def test_a_reward_model_with_longrope_scores_nothing_beyond_the_switch(tmp_path):
    """There frequencies would depend on the longest row of a pass."""
    model = make_classifier(tmp_path, "phi3-longrope")
    long, short = list(range(5, 5 + 62)), list(range(5, 45))
    together = rewards(load(tmp_path, 2), [long, short])
    assert torch.equal(rewards(load(tmp_path, 1), [short])[0], together[1])
    torch.testing.assert_close(together[1], plain_rewards(model, short), atol=2e-3, rtol=0)
    assert not together[0][0].isnan().any()  # 63 tokens
    assert together[0][2:].isnan().all()  # the context is 64


def test_widths_that_do_not_fill_vectors_leave_rewards_their_own(tmp_path):
    make_classifier(tmp_path, "qwen2_moe", intermediate_size=100, moe_intermediate_size=20,
                    shared_expert_intermediate_size=36)  # fmt: skip
    texts = [*prompts(), *(text[:9] for text in prompts())]
    together = rewards(load(tmp_path, len(texts)), texts)
    for row, text in enumerate(texts):
        assert torch.equal(rewards(load(tmp_path, 1), [text])[0], together[row])
