"""Language models with other tokens than the base's, against whole passes without a cache over every text."""

from __future__ import annotations

import math
import random

import pytest
import torch
from support import tiny_models
from support.decoding import NOWHERE, ask, config_of, decode
from support.heads import random as random_matrix
from support.heads import with_head
from support.lora import make_lora
from support.preference_adapters import make_preference_adapter, merged
from support.runs import job, parts, run_job, write_prompts
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jobs.commands.plan import describe_plan
from pipeline.aligner import Aligner
from pipeline.engine.engine import decode_rows
from pipeline.errors import ConfigurationError
from pipeline.evaluation.judges.conversations import JudgedConversations
from pipeline.evaluation.judges.interface import JudgedAnswer
from pipeline.hub.chat_templates import PromptTemplate
from pipeline.hub.retokeniser import Retokeniser
from pipeline.protocol.hosts import Hosts
from pipeline.protocol.messages import Admission, Step
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import LocalHost, LocalProposingHost
from pipeline.runtime.replica_plan import plan_replica
from pipeline.stages.relabel import prepare
from pipeline.worker import branch_runner
from pipeline.worker.hosts import TextModelHost
from pipeline.worker.start import start_proposing
from pipeline.worker.text_loading import load_text_model

DECODING = {"max_new_tokens": 8, "candidates": 20, "agent_temperature": 0.7, "seed": 3, "trace": "tokens"}
ROWS = [ask(f"r{at}", text) for at, text in enumerate(["why?", "tell me a story", "hi", "and then what is it?"])]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Make (once) a random causal LM whose tokens are pairs of letters: pairs("llama", seed=1) is its folder."""
    made = {}

    def make(kind="llama", *, seed=0, **options):
        key = (kind, seed, *options)
        if key not in made:
            folder = tmp_path_factory.mktemp("pairs")
            tokenizer = tiny_models.make_pair_tokenizer()
            made[key] = tiny_models.make_model(folder, kind, seed=seed, scale=2.0, tokenizer=tokenizer, **options)
        return made[key]

    return make


class PlainText:
    """log P(the text begins with an answer) by whole passes, token by token of the vocabulary."""

    def __init__(self, folder, base, *, adapter=None, principle=None):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if adapter is not None:
            import peft

            self.model = peft.PeftModel.from_pretrained(self.model, adapter).eval()
        self.tokenizer, self.base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
        self.bytes_by_id, self.base_bytes = (self.bytes_of(each) for each in (self.tokenizer, self.base))
        self.principle, self.known = principle, {}

    @staticmethod
    def bytes_of(tokenizer):
        if tokenizer.get_vocab().get("\u2581") is not None:
            by_token = {token: token.replace("\u2581", " ").encode() for token in tokenizer.get_vocab()}
            by_token |= {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        else:
            byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
            by_token = {token: bytes(byte_of.get(letter, 0) for letter in token) for token in tokenizer.get_vocab()}
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        return {i: by_token[token] for token, i in tokenizer.get_vocab().items() if i not in special}

    @staticmethod
    def is_no_text(raw):
        """Whether the last byte belongs to no whole character."""
        for count in (1, 2, 3, 4):
            try:
                if len(raw[-count:].decode()) == 1:
                    return False
            except UnicodeDecodeError:
                pass
        return True

    def prompt(self, question):
        system = [{"role": "system", "content": self.principle}] if self.principle else []
        messages = [*system, {"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def next(self, ids):
        """Probabilities of the next token."""
        if tuple(ids) not in self.known:
            self.known[tuple(ids)] = self.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        return self.known[tuple(ids)]

    def beginning(self, ids, start):
        """The logarithm of the probability of the tokens that begin with some bytes; None where there are none."""
        found = [i for i, value in self.bytes_by_id.items() if value and value.startswith(start)]
        return self.next(ids)[found].logsumexp(-1).item() if found else None

    def score(self, question, answer):
        prompt, ended = self.prompt(question), bool(answer) and answer[-1] not in self.base_bytes
        raw = b"".join(
            self.base_bytes[token] for token in (answer[:-1] if ended else answer) if token in self.base_bytes
        )
        pending = b""
        while not ended and raw and self.is_no_text(raw):  # an incomplete character at the end, or none at all
            raw, pending = raw[:-1], raw[-1:] + pending
        text = raw.decode(errors="replace")
        own = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.tokenizer.eos_token_id] * ended

        def whole(count):
            return sum(self.next([*prompt, *own[:at]])[own[at]].item() for at in range(count))

        if ended or not (own or pending):
            return whole(len(own))
        ways = []
        if own:
            before = [*prompt, *own[:-1]]
            longer = self.beginning(before, self.bytes_by_id[own[-1]] + pending)
            ways += [whole(len(own) - 1) + longer] if longer is not None else []
        if pending and (after := self.beginning([*prompt, *own], pending)) is not None:
            ways.append(whole(len(own)) + after)
        if not ways:  # no token begins with these bytes: they are tokens of one byte each
            one = [
                next(i for i, value in self.bytes_by_id.items() if value == bytes([each])) for each in pending[:-1]
            ]
            at = [[*prompt, *own, *one[:count]] for count in range(len(one) + 1)]
            known = sum(self.next(ids)[token].item() for ids, token in zip(at, one, strict=False))
            return whole(len(own)) + known + self.beginning(at[-1], pending[-1:])
        return math.log(sum(math.exp(way - max(ways)) for way in ways)) + max(ways)


def replica(config):
    """An engine, the host of the model with other tokens, and its runner."""
    assembly = assemble(config, NOWHERE)
    (base_plan, plan), (base_spec, spec) = assembly.topology.hosts, assembly.hosts
    runner = load_text_model(spec, spec.text.retokeniser)
    host = TextModelHost(runner)
    base = LocalProposingHost(start_proposing(base_spec), base_plan)
    return make_engine(assembly, Hosts(base, (LocalHost(host, plan),))), host, runner


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "gemma2"])
def test_every_candidate_after_any_answer_has_its_conditional_log_probability(tiny, pairs, kind):
    base, folder = tiny("llama"), pairs(kind, seed=1)
    principals = {"it": {"kind": "arm", "model": str(folder), "reference": "none"}}
    _, _, runner = replica(config_of(base, principals, decoding=DECODING, cluster={"slots": 2}))
    plain, draw = PlainText(folder, base), random.Random(5)
    tokenizer = plain.base
    runner.advance(Step([Admission(1, {"it": plain.prompt("hello")})]))
    answer = []
    for piece in [
        "",
        "a",
        "b",
        "c",
        " a",
        "\u00e9",
        "x",
        "\u65e5",
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
        "zz",
    ]:
        for token in tokenizer(piece, add_special_tokens=False)["input_ids"]:
            runner.advance(Step((), [1], [token]))
            answer.append(token)
            if draw.random() < 0.3:  # several tokens between two scored steps
                continue
            others = draw.sample(sorted(plain.base_bytes), 8)
            ids = [*others, tokenizer.eos_token_id, 2, tokenizer("a", add_special_tokens=False)["input_ids"][0]]
            [found] = runner.gains([1], [ids])
            now = plain.score("hello", answer)
            expected = [plain.score("hello", [*answer, each]) - now for each in ids]
            assert found[0].tolist() == pytest.approx(expected, abs=2e-3)
            assert max(expected) < 0.7  # about a conditional probability


def test_the_gains_of_an_answer_sum_to_the_log_probability_of_its_own_tokens(tiny, pairs):
    base, folder = tiny("llama"), pairs(seed=1)
    principals = {"it": {"kind": "arm", "model": str(folder), "reference": "none"}}
    row = ask("a", "hello", response="go\u00f6d day, \u65e5\u672c")
    record = decode(config_of(base, principals, decoding=DECODING), [row])["a"]
    plain = PlainText(folder, base)
    ids = [*plain.tokenizer(row.response, add_special_tokens=False)["input_ids"], plain.tokenizer.eos_token_id]
    prompt = plain.prompt("hello")
    expected = sum(plain.next([*prompt, *ids[:at]])[each].item() for at, each in enumerate(ids))
    assert record.original_rewards["it"] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("reproducibility", ["strict", "relaxed"])
def test_drawn_tokens_are_rewarded_as_whole_passes_say(tiny, pairs, tmp_path, reproducibility):
    base, tuned, before = tiny("llama"), pairs(seed=1), pairs("gpt2", seed=2)
    adapter = make_lora(tmp_path / "lora", tuned, "q_proj", "up_proj", seed=4)
    principals = {
        "arm": {"kind": "arm", "model": str(tuned), "adapter": str(adapter), "weight": 0.4},
        "asked": {"kind": "prompted", "model": str(tuned), "principle": "be kind", "weight": 0.3},
        "pair": {"kind": "tuned_pair", "model": str(tuned), "reference": str(before), "weight": 0.2},
        "own": {"kind": "prompted", "principle": "be brief", "weight": 0.3},
    }
    decoding = {**DECODING, "reproducibility": reproducibility}
    config = config_of(base, principals, decoding=decoding, cluster={"slots": 3})
    assembly = assemble(config, NOWHERE)
    assert [(host.name, host.reads_text, len(host.roles)) for host in assembly.topology.hosts] == [
        ("base", False, 2), ("arm", True, 3), ("pair.reference", True, 1),
    ]  # fmt: skip
    record = decode(config, ROWS)["r2"]
    plain = PlainText(tuned, base)
    sides = {
        "arm": (PlainText(tuned, base, adapter=adapter), plain),
        "asked": (PlainText(tuned, base, principle="be kind"), plain),
        "pair": (plain, PlainText(before, base)),
    }
    answer = [token.token_id for token in record.tokens]
    for name, (first, second) in sides.items():
        assert record.rewards[name] == pytest.approx(first.score("hi", answer) - second.score("hi", answer), abs=8e-3)


def test_a_base_with_longer_tokens_and_a_sentencepiece_model_beside_it(pairs, tmp_path):
    """A candidate may be several tokens of the model, and a character several of its byte tokens."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *map(chr, range(33, 127)),
    ]
    pieces += ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    inner = Tokenizer(
        models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<unk>", "<s>", "</s>", *pieces[-4:]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = tiny_models.CHAT_TEMPLATE
    folder = tiny_models.make_model(tmp_path / "pieces", seed=1, scale=2.0, tokenizer=tokenizer)
    base = pairs(seed=3)
    principals = {"it": {"kind": "arm", "model": str(folder), "reference": "none", "weight": 0.2}}
    record = decode(config_of(base, principals, decoding=DECODING), ROWS)["r1"]
    expected = PlainText(folder, base).score("tell me a story", [token.token_id for token in record.tokens])
    assert record.rewards["it"] == pytest.approx(expected, abs=8e-3)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_strict_row_has_the_same_bits_in_any_batch(tiny, pairs, kind):
    base, model = tiny("llama"), str(pairs(kind, seed=1))
    principals = {
        "arm": {"kind": "arm", "model": model, "reference": "none", "weight": 0.2},
        "kind": {"kind": "prompted", "model": model, "principle": "be kind", "weight": 0.5},
    }
    many, alone, other = (
        config_of(base, principals, decoding=DECODING, cluster={"slots": slots}) for slots in (4, 1, 3)
    )
    expected = decode(many, ROWS)
    assert decode(alone, ROWS[::-1]) == expected
    assert decode(other, [ROWS[2], ROWS[0], ROWS[1], *ROWS[3:]]) == expected


@pytest.mark.parametrize("reproducibility", ["strict", "relaxed"])
def test_a_lost_state_changes_no_token(tiny, pairs, reproducibility):
    principals = {"it": {"kind": "prompted", "model": str(pairs(seed=1)), "principle": "be kind", "weight": 0.5}}
    decoding = {**DECODING, "max_new_tokens": 6, "reproducibility": reproducibility}
    config = config_of(tiny("llama"), principals, decoding=decoding, cluster={"slots": 2})
    expected = {record.row_id: record for record in decode_rows(replica(config)[0], ROWS)}
    engine, host, _ = replica(config)
    records, waiting = {}, list(ROWS)
    for turn in range(1000):
        while engine.wants_row and waiting:
            engine.admit(waiting.pop(0))
        if turn in (3, 9):
            host.resize(2)
        records |= {record.row_id: record for record in engine.step()}
        if engine.is_idle and not waiting:
            break
    assert engine.recoveries.states_lost == 2
    for row_id, record in expected.items():
        assert [token.token_id for token in records[row_id].tokens] == [token.token_id for token in record.tokens]
    if reproducibility == "strict":
        assert records == expected


def test_passes_of_one_shape_give_the_same_bits_in_any_batch(tiny, pairs, monkeypatch):
    """As strict passes are on a GPU."""
    monkeypatch.setattr(branch_runner, "PASS_TOKENS", 32)
    monkeypatch.setattr(branch_runner.BranchRunner, "_has_one_shape", True)
    principals = {"it": {"kind": "arm", "model": str(pairs(seed=1)), "reference": "none", "weight": 0.2}}
    configs = [config_of(tiny("llama"), principals, decoding=DECODING, cluster={"slots": slots}) for slots in (4, 1)]
    assert decode(configs[0], ROWS) == decode(configs[1], ROWS[::-1])


def test_a_candidate_that_is_one_token_of_the_model_costs_no_token(tiny, pairs):
    """It costs those before its last one: a step reads the newest tokens, and 26 candidates with them."""
    principals = {"it": {"kind": "arm", "model": str(pairs(seed=1)), "reference": "none"}}
    _, _, runner = replica(config_of(tiny("llama"), principals, decoding=DECODING, cluster={"slots": 1}))
    plain = PlainText(pairs(seed=1), tiny("llama"))
    letters = plain.base("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    runner.advance(Step([Admission(0, {"it": plain.prompt("hi")})]))
    for token in plain.base("abcdefgh", add_special_tokens=False)["input_ids"]:
        runner.advance(Step((), [0], [token]))
        before = runner.num_tokens, runner.num_forwards
        runner.gains([0], [letters])
        assert runner.num_tokens - before[0] <= 3
        assert runner.num_forwards - before[1] == 1


def test_what_cannot_be_read_as_text_is_refused_in_one_line(tiny, pairs, tmp_path):
    def message(fields, **decoding):
        config = config_of(tiny("llama"), {"it": fields}, decoding={**DECODING, **decoding})
        with pytest.raises(ConfigurationError) as caught:
            assemble(config, NOWHERE)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    fields = {"kind": "arm", "model": str(pairs(seed=1)), "reference": "none"}
    assert "decoding.candidates: all needs models with the base's tokens" in message(fields, candidates="all")
    silent = tiny_models.make_pair_tokenizer(chat_template=None)
    folder = tiny_models.make_model(tmp_path / "silent", tokenizer=silent)
    assert "principals.it.template is missing: its model's tokenizer has no chat template" in message(
        {**fields, "model": str(folder)}
    )
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "<|end|>": 3}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|end|>", pad_token="<|end|>", unk_token="[UNK]"
    )
    tokenizer.chat_template = tiny_models.CHAT_TEMPLATE
    folder = tiny_models.make_model(tmp_path / "words", tokenizer=tokenizer)
    assert "are neither bytes nor SentencePiece's pieces" in message({**fields, "model": str(folder)})


def test_a_preference_adapter_is_read_at_unit_vectors_and_not_at_the_weights_of_rows(tiny, pairs, tmp_path):
    base, model = tiny("llama"), pairs(seed=1)
    adapter = make_preference_adapter(tmp_path / "parm", model)
    arm = {"kind": "preference_arm", "model": str(model), "adapter": str(adapter), "reference": "none", "weight": 0.2}
    principals = {"one": {**arm, "objective": 0}, "other": {**arm, "objective": 1}}
    record = decode(config_of(base, principals, decoding=DECODING), ROWS[2:3])["r2"]
    answer = [token.token_id for token in record.tokens]
    for name, vector in (("one", [1.0, 0.0]), ("other", [0.0, 1.0])):
        plain = PlainText(model, base)
        plain.model = merged(model, adapter, vector)
        assert record.rewards[name] == pytest.approx(plain.score("hi", answer), abs=8e-3)
    own = {name: {**each, "preference": "weights"} for name, each in principals.items()}
    with pytest.raises(ConfigurationError, match=r"preference: weights, or rule parm, needs the base's tokens"):
        assemble(config_of(base, own, decoding={**DECODING, "rule": "linear"}), NOWHERE)


def test_rows_have_weights_of_their_own(tiny, pairs, tmp_path):
    """Also beside a value head."""
    base = tiny("llama")
    head = {"v_head.summary.weight": random_matrix(1, 64, seed=1), "v_head.summary.bias": torch.zeros(1)}
    valued = with_head(tiny("llama", seed=3), tmp_path / "valued", head, drop=())

    def config(weight):
        asked = {"kind": "prompted", "model": str(pairs(seed=1)), "principle": "be kind", "weight": weight}
        worth = {"kind": "value", "model": str(valued), "candidates": 5, "weight": weight}
        return config_of(base, {"asked": asked, "worth": worth}, decoding=DECODING, cluster={"slots": 3})

    given = [{}, {"asked": 0.0, "worth": 0.0}, {"asked": 2.0, "worth": 2.0}]
    together = decode(config(0.5), [ask(f"r{at}", "why?", weights=each) for at, each in enumerate(given)])
    alone = [decode(config(weight), [ask(f"r{at}", "why?")]) for at, weight in enumerate((0.5, 0.0, 2.0))]
    for at, record in enumerate(alone):
        assert [token.token_id for token in together[f"r{at}"].tokens] == [
            token.token_id for token in record[f"r{at}"].tokens
        ]
        assert together[f"r{at}"].rewards == record[f"r{at}"].rewards
    assert together["r1"].payments == {"asked": 0.0, "worth": 0.0}


def test_a_row_that_is_too_long_for_the_model_fails_alone(tiny, pairs):
    principals = {"it": {"kind": "arm", "model": str(pairs("gpt2", seed=1, context=40)), "reference": "none"}}
    rows = [ask("short", "hi"), ask("long", "x y " * 40)]
    records = decode(config_of(tiny("llama"), principals, decoding=DECODING), rows)
    assert records["short"].error is None
    assert "context" in records["long"].error


def test_the_plan_says_what_it_costs_and_an_aligner_and_a_run_agree(tiny, pairs, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 5)
    principals = {"kind": {"kind": "prompted", "model": str(pairs(seed=1)), "principle": "be kind", "weight": 0.5}}
    config = job(prompts, tmp_path / "run", tiny(), principals=principals, decoding={"candidates": 20})
    prepared = prepare(config, NOWHERE)
    text = describe_plan(prepared.plan, plan_replica(config, prepared.models, NOWHERE))
    assert "kind is scored on text, its tokens are not the base's: 42 texts per row and step are tokenized" in text
    run_job(config, tmp_path)
    run_job(
        job(
            prompts,
            tmp_path / "two",
            tiny(),
            principals=principals,
            decoding={"candidates": 20},
            cluster={"slots": 2},
        ),
        tmp_path,
    )
    assert parts(tmp_path / "run") == parts(tmp_path / "two")
    with Aligner(str(tiny()), principals, max_new_tokens=8, agent_temperature=0.5, candidates=20) as aligner:
        [answer] = aligner.generate(["x"], ids=["r0"])
        [rewards] = aligner.score(["x"], [answer.text])
        if answer.finish_reason == "stop":
            assert rewards == pytest.approx(answer.rewards, abs=2e-3)
    import pyarrow.parquet as pq

    rows = [
        row for file in sorted((tmp_path / "run").glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()
    ]
    assert {row["row_id"]: row["response"] for row in rows}["r0"] == answer.text


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.usefixtures("ray_cluster")
def test_over_ray_models_with_other_tokens_write_the_bytes_of_one_process(tiny, pairs, judge, tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 7)
    principals = {
        "kind": {"kind": "prompted", "model": str(pairs(seed=1)), "principle": "be kind", "weight": 0.5},
        "judge": {"kind": "reward_model", "model": str(judge(pairs=True)), "interval": 2},
    }
    run_job(job(prompts, tmp_path / "one", tiny(), principals=principals), tmp_path)
    cluster = {"transport": "ray", "slots": 4}
    run_job(job(prompts, tmp_path / "two", tiny(), principals=principals, cluster=cluster), tmp_path)
    assert parts(tmp_path / "one") == parts(tmp_path / "two")


def test_an_answer_that_spells_a_special_token_of_the_other_model_stays_text():
    base, own = tiny_models.make_tokenizer(), tiny_models.make_pair_tokenizer()
    special = own.all_special_tokens[0]
    answer = base(f"a {special} b", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    [ids] = Retokeniser(base, own, frozenset(), None).encode([answer])
    assert not set(ids) & set(own.all_special_ids)
    assert own.decode(ids) == f"a {special} b"


def test_what_a_judged_answer_spells_is_no_special_token_without_a_chat_template_either():
    own = tiny_models.make_pair_tokenizer(chat_template=None)
    conversations = JudgedConversations(own, PromptTemplate(None), frozenset(own.all_special_tokens), None)
    ids = conversations.encode(JudgedAnswer(({"role": "user", "content": "why?"},), f"so{own.eos_token}."))
    assert own.eos_token_id not in ids
