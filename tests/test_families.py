"""Every family of causal language models that transformers ships: served exactly and strictly, or refused by name."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from support.family_kinds import others_nightly
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from jobs.commands.models import markdown_table, run_models
from jobs.families.configurations import FAMILIES, is_installed, make_config, make_random_model
from jobs.families.devices import why_not_spread
from jobs.families.measure import greedy, greedy_on_devices, host_spec, measure, prompts
from jobs.families.ranks import RankPair, why_no_split
from jobs.families.simulated_devices import simulated
from pipeline.attention.slots import SlotCache
from pipeline.errors import ConfigurationError
from pipeline.hub.families import PLAIN, REFUSED, SLOTS, expect, keeps_states, read_table
from pipeline.hub.model_facts import as_mapping
from pipeline.worker.layer_devices import _OutputTo
from pipeline.worker.loading import load_language_model

ROOT = Path(__file__).parent.parent
NAMES = sorted(name for name in FAMILIES if is_installed(name))
MADE = [name for name in NAMES if FAMILIES[name].why_not is None]


@pytest.fixture(autouse=True)
def _quiet():
    """Configurations this small make transformers warn of sizes, and slow families say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_every_family_of_causal_models_is_in_the_table_by_name():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(NAMES)
    assert set(read_table().families) == set(NAMES)
    assert len(MADE) >= 180
    for name, family in read_table().families.items():
        assert (family.decoding == REFUSED) == (FAMILIES[name].why_not is not None), name
        assert family.decoding == SLOTS or family.reasons["decoding"], name


@pytest.mark.parametrize(
    ("name", "made_before"), [("glm_ocr", "glm4v_moe"), ("glmga", "glm4v_moe"), ("glm4v", "glm4v")]
)
def test_a_familys_model_does_not_depend_on_the_models_made_before_it(name, made_before):
    # the class writes what it derives into the mapping that it is given
    make_config(made_before).text_config.rope_parameters["partial_rotary_factor"] = 0.5
    assert make_config(name).text_config.rope_parameters.get("partial_rotary_factor", 1.0) == 1.0
    make_random_model(name)  # whose rotations fit its sections


def plan_kind(name):
    """How transformers splits a family: families of one kind take the same way through the same code."""
    text = make_config(name).get_text_config(decoder=True)
    styles = frozenset((text.base_model_tp_plan or {}).values())
    return read_table().families[name].decoding, styles, bool(text.base_model_ep_plan), keeps_states(as_mapping(text))


SPLIT = [name for name in MADE if read_table().families[name].is_tensor_parallel]
# one of each kind, of which the tests take some: `cage models --measure` goes through all families
OF_EACH_KIND = sorted({plan_kind(name): name for name in reversed(SPLIT)}.values())
SOME_KINDS = OF_EACH_KIND[::5]


@pytest.fixture(scope="module")
def ranks():
    with RankPair() as pair:
        yield pair


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME_KINDS)
def test_two_ranks_decode_a_family_as_one_process_does(name, ranks, tmp_path):
    make_random_model(name).save_pretrained(tmp_path / "model")
    spec = host_spec(tmp_path / "model")

    def expected(rows, num_new):
        return greedy(load_language_model(spec).runner, rows, num_new)

    assert ranks.why_not(name, spec, prompts(), expected) is None


SPREAD = [name for name in MADE if read_table().families[name].is_pipeline_parallel]
UNSPLIT = [name for name in SPREAD if name not in SPLIT]


@pytest.mark.parametrize(
    "name",
    [*SOME_KINDS, *UNSPLIT[::24], *[pytest.param(name, marks=pytest.mark.nightly) for name in UNSPLIT[12::24]]],
)
def test_two_devices_give_the_bits_of_one(name, tmp_path):
    make_random_model(name).save_pretrained(tmp_path / "model")
    spec = host_spec(tmp_path / "model")
    expected, _ = greedy_on_devices(load_language_model(spec).runner)
    assert why_not_spread(spec, greedy_on_devices, expected) is None


def hold_on_the_first_device(monkeypatch):
    hold = SlotCache.hold

    def held(self, layer, key_GTD, value_GTD, num_tokens):
        return hold(self, layer, key_GTD.to(simulated(0)), value_GTD.to(simulated(0)), num_tokens)

    monkeypatch.setattr(SlotCache, "hold", held)


def leave_outputs_on_the_last_device(monkeypatch):
    monkeypatch.setattr(_OutputTo, "__call__", lambda self, module, args, output: output)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (hold_on_the_first_device, "two devices decode it row by row: .*all tensors must be on one device"),
        (leave_outputs_on_the_last_device, "two devices cannot run it: .*all tensors must be on one device"),
    ],
)
def test_layers_that_cannot_be_spread_are_noticed(fault, says, tmp_path, monkeypatch):
    fault(monkeypatch)
    make_random_model("llama").save_pretrained(tmp_path / "model")
    assert re.match(says, why_not_spread(host_spec(tmp_path / "model"), greedy_on_devices, []))


def test_every_family_that_is_decoded_can_be_spread():
    assert SPREAD == MADE
    for family in read_table().families.values():
        assert "pipeline_parallel" not in family.reasons


def test_whether_a_family_is_split_is_what_its_plan_says():
    assert len(SPLIT) > 140
    assert len(OF_EACH_KIND) > 25
    for family in read_table().families.values():
        assert family.is_tensor_parallel == (family.decoding != REFUSED and "tensor_parallel" not in family.reasons)
    for name in ("llama", "gpt2", "hunyuan_v1_dense", "gpt_oss", "qwen3_next"):
        reason = why_no_split(make_random_model(name))
        assert reason == read_table().families[name].reasons.get("tensor_parallel")


@pytest.mark.parametrize("name", others_nightly(MADE))
def test_a_family_is_decoded_as_generate_decodes_it_and_as_the_table_says(name):
    found, said = measure(name), read_table().families[name]  # which raises where an answer or a bit differs
    if found.decoding == PLAIN and said.decoding == SLOTS:  # a processor on which its kernels are not reproducible
        assert "in strict mode" in found.reasons["decoding"]
        return
    assert replace(found, reasons={}) == replace(said, reasons={})
    assert set(found.reasons) == set(said.reasons)


def test_the_documentation_has_the_table():
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    shown = text.split("<!-- families -->\n")[1].split("\n<!-- end of families -->")[0]
    assert shown == markdown_table(read_table())


def test_cage_models_shows_families_and_why(capsys):
    run_models(["llama", "minimax", "moshi"], measure=False, write=False, markdown=False, json_file=None)
    shown = capsys.readouterr().out
    assert re.search(r"^llama +in slots +yes", shown, re.MULTILINE)
    assert "minimax, decoding: it keeps its states in a cache of its own class" in shown
    assert shown.splitlines()[-1].endswith("1 in slots, 1 row by row, 1 refused")
    with pytest.raises(ConfigurationError, match=r"llamma is no model family.*did you mean llama"):
        run_models(["llamma"], measure=False, write=False, markdown=False, json_file=None)


@pytest.mark.parametrize(
    ("config", "decoding", "reason"),
    [
        ({"model_type": "llama"}, SLOTS, None),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, PLAIN, "longrope"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic"}}, PLAIN, "dynamic rope"),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic"}, "max_position_embeddings": 64},
            SLOTS,
            None,
        ),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "indexed_attention"]}, PLAIN, "indexed_attention"),
        ({"model_type": "qwen3_next", "layer_types": ["full_attention", "linear_attention"]}, SLOTS, None),
        ({"model_type": "minimax", "layer_types": ["full_attention", "linear_attention"]}, PLAIN, "class"),
        ({"model_type": "moshi"}, REFUSED, "audio"),
        ({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}, None, None),
        ({"model_type": "of_tomorrow"}, None, None),
    ],
)
def test_a_configuration_tells_how_a_model_will_be_decoded(config, decoding, reason):
    found = expect(config)
    assert found.decoding == decoding
    assert found.reason is None if reason is None else reason in found.reason
