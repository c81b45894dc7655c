"""A principal whose template names `weights` reads each row's own, and shares no prefix with rows of others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.decoding import NOWHERE, ask, config_of, decode
from support.failpoints import Failpoint, watched
from transformers import AutoTokenizer

from pipeline.config.variants import lay_out
from pipeline.engine.engine import decode_rows
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import start_hosts

TEXT = "tell me a story about the sea"
SHOWN = "kind {{ weights.kind }}|{{ principle }}|{{ messages[0].content }}"
# reads the same whatever the weights are, as the input of a model does that takes them by another way
UNSEEN = "{{ messages[0].content }}|{% if weights.kind > 100 %}!{% endif %}"
PLAIN = {"brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4}}


def principals(template, **kind):
    return {
        "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7, "template": template, **kind},
        **PLAIN,
    }


def of_weight(row_id, weight, text=TEXT):
    return ask(row_id, text, weights={"kind": weight})


class Admitted:
    """Keeps the admissions of all hosts."""

    def __init__(self):
        self.admissions = []

    def __call__(self, point, detail):
        if point is Failpoint.MID_PREFILL:
            self.admissions += detail

    def read(self, tokenizer, role):
        """What was read for a role, in the order of admission."""
        return [tokenizer.decode(each.prompts[role]) for each in self.admissions if role in each.prompts]


def admitted(config, rows):
    """Decode rows; the admissions, and the tokens that went through the passes of a lone host."""
    assembly, watch = assemble(config, NOWHERE), Admitted()
    engine = make_engine(assembly, start_hosts(assembly, wiring=watched(watch)))
    records = list(decode_rows(engine, rows, num_variants=len(lay_out(config))))
    assert all(record.error is None for record in records)
    return watch, engine.calls.hosts.sampler.work().result().num_tokens


def one_token(tiny, template, **sections):
    return config_of(tiny(), principals(template), decoding={"max_new_tokens": 1}, cluster={"slots": 4}, **sections)


def test_the_template_gets_the_weights_of_the_row(tiny):
    rows = [of_weight("a", 2.0), of_weight("b", 0.5), ask("configured", TEXT)]
    watch, _ = admitted(one_token(tiny, SHOWN), rows)
    tokenizer = AutoTokenizer.from_pretrained(tiny())
    assert watch.read(tokenizer, "kind") == [f"kind {weight}|be kind|{TEXT}" for weight in (2.0, 0.5, 0.7)]
    assert watch.read(tokenizer, "kind.reference") == [f"kind {weight}||{TEXT}" for weight in (2.0, 0.5, 0.7)]
    assert len(set(watch.read(tokenizer, "brief"))) == len(set(watch.read(tokenizer, "base"))) == 1
    assert [each.weights for each in watch.admissions] == [(2.0, 0.4), (0.5, 0.4), (0.7, 0.4)]


def test_the_variants_of_a_row_read_their_own_weights(tiny):
    grid = {"weights": [{"kind": 1.0, "brief": 0.0}, {"kind": 0.25, "brief": 0.75}]}
    watch, _ = admitted(one_token(tiny, SHOWN, grid=grid), [ask("a", TEXT)])
    read = watch.read(AutoTokenizer.from_pretrained(tiny()), "kind")
    assert read == [f"kind {weight}|be kind|{TEXT}" for weight in (1.0, 0.25)]


@pytest.mark.parametrize("template", [SHOWN, UNSEEN])
def test_rows_of_other_weights_share_no_prefix_of_roles_that_take_weights(tiny, template):
    config = one_token(tiny, template)
    row = of_weight("a", 2.0)
    watch, num_alone = admitted(config, [row])
    roles = assemble(config, NOWHERE).topology.roles
    takes_weights = {name: role.takes_weights for name, role in roles.items()}
    assert takes_weights == {"base": False, "kind": True, "kind.reference": True, "brief": False}
    [admission] = watch.admissions
    assert {name for name, num_shared in admission.shared_prefixes.items() if num_shared} == {"base", "brief"}

    # a row of the same text computes the last token of each prompt; of other weights, all of theirs
    _, num_same = admitted(config, [row, replace(row, row_id="b")])
    _, num_other = admitted(config, [row, of_weight("b", 0.5)])
    own = sum(len(prompt) - 1 for name, prompt in admission.prompts.items() if takes_weights[name])
    assert num_same == num_alone + len(roles)
    assert num_other == num_alone + len(roles) + own


@pytest.mark.parametrize("template", [SHOWN, UNSEEN])
@pytest.mark.parametrize("num_hosts", [1, 2, 3])
def test_rows_of_several_weights_have_the_bits_that_each_has_alone(tiny, judge, template, num_hosts):
    named = principals(template)
    if num_hosts > 1:
        arm = {"kind": "arm", "model": str(tiny(seed=5)), "reference": "none", "weight": 0.1, "template": template}
        named["arm"] = arm
    if num_hosts > 2:
        scored = {"kind": "reward_model", "model": str(judge()), "weight": 0.3, "candidates": 4, "template": template}
        named["scored"] = scored
    decoding = {"max_new_tokens": 6, "trace": "tokens", "agent_temperature": 0.5}
    config = config_of(tiny(), named, decoding=decoding, cluster={"slots": 4})
    assert len(assemble(config, NOWHERE).hosts) == num_hosts
    rows = [of_weight(f"r{at}", weight) for at, weight in enumerate((2.0, 0.5, 2.0, 0.0, 0.5, 3.0))]
    records = decode(config, rows)
    lone = config.model_copy(update={"cluster": config.cluster.model_copy(update={"slots": 1})})
    for row in rows:
        assert records[row.row_id] == decode(lone, [row])[row.row_id]


def test_a_template_with_the_weights_written_out_gives_the_same_answer(tiny):
    decoding = {"max_new_tokens": 8, "trace": "tokens", "agent_temperature": 0.5}
    found = decode(
        config_of(tiny(), principals(SHOWN), decoding=decoding), [of_weight("a", 2.0), of_weight("b", 0.5)]
    )
    rewards = []
    for row_id, weight in (("a", 2.0), ("b", 0.5)):
        written = SHOWN.replace("{{ weights.kind }}", str(weight))
        config = config_of(tiny(), principals(written), decoding=decoding)
        (expected,) = decode(config, [of_weight(row_id, weight)]).values()
        assert [token.token_id for token in found[row_id].tokens] == [token.token_id for token in expected.tokens]
        assert found[row_id].rewards == pytest.approx(expected.rewards, abs=1e-3)
        rewards.append(expected.rewards["kind"])
    assert rewards[0] != pytest.approx(rewards[1], abs=1e-2)
