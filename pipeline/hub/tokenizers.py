"""Make sure that all models of a run read and write the same tokens, and find what ends an answer."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import ModelFacts, as_ids
from pipeline.hub.sources import ModelSource
from pipeline.hub.tokenizer_facts import TokenizerFacts
from pipeline.hub.weight_files import LocalTree, read_json

GENERATION_CONFIG = "generation_config.json"
NUM_SHOWN = 5


def compare_tokenizers(
    base: TokenizerFacts,
    other: TokenizerFacts,
    base_name: str,
    other_name: str,
    *,
    ends: Container[int] = (),
) -> dict[int, str]:
    """Check that two tokenizers give every id the same token, and find the ids that answers have to do without.

    A model's own embedding may be larger than its tokenizer (padding); that is no difference. Nor are tokens that
    were added to one of the two, behind all others, where answers do not need them: those of the other are none that
    the base could draw, those of the base must be special tokens that end no answer. Mostly it is a padding token.

    Args:
        base: of the base.
        other: of the principal's model.
        base_name: for messages.
        other_name: for messages.
        ends: ids that end an answer.

    Returns:
        The tokens that only one of them has, by id. They come after all others.

    Raises:
        ConfigurationError: with the number of differing ids and the first few, as both spell them.
    """
    masked, faults = _compare(base, other, base_name, other_name, ends)
    if faults:
        raise ConfigurationError(
            f"{base_name} and {other_name} do not share a vocabulary ({len(base.token_by_id):,} and "
            f"{len(other.token_by_id):,} tokens): {'; '.join(faults)}. Principals are paid by token, so every model "
            "of a run needs the same tokens"
        )
    return masked


def why_tokens_differ(
    base: TokenizerFacts, other: TokenizerFacts, base_name: str, other_name: str, *, ends: Container[int] = ()
) -> str | None:
    """What keeps two tokenizers from being taken as the same, as `compare_tokenizers` says it; None: nothing."""
    return "; ".join(_compare(base, other, base_name, other_name, ends)[1]) or None


def _compare(
    base: TokenizerFacts, other: TokenizerFacts, base_name: str, other_name: str, ends: Container[int]
) -> tuple[dict[int, str], list[str]]:
    """The tokens by id that only one of them has, where answers can do without these, and otherwise the faults."""
    tokens, others = base.token_by_id, other.token_by_id
    both = tokens.keys() & others.keys()
    differing = sorted(token_id for token_id in both if tokens[token_id] != others[token_id])
    only_base, only_other = sorted(tokens.keys() - both), sorted(others.keys() - both)
    unneeded = {token_id for token_id in base.special_tokens.values() if token_id not in ends}
    is_served = (
        not differing
        and unneeded.issuperset(only_base)
        and other.added_ids.issuperset(only_other)
        and all(token_id > max(both, default=-1) for token_id in (*only_base, *only_other))
    )
    if is_served:
        only_one = (*only_base, *only_other)
        return {token_id: (tokens if token_id in tokens else others)[token_id] for token_id in only_one}, []
    faults = []
    if differing:
        shown = ", ".join(f"{i} ({tokens[i]!r} / {others[i]!r})" for i in differing[:NUM_SHOWN])
        faults.append(f"{len(differing):,} of {len(both):,} ids differ: {shown}{_rest(differing)}")
    if only_base:
        faults.append(f"only {base_name} has {listed_tokens(only_base, tokens)}")
    if only_other:
        faults.append(f"only {other_name} has {listed_tokens(only_other, others)}")
    return {}, faults


def share_tokens(base: TokenizerFacts, other: TokenizerFacts) -> bool:
    """Whether two tokenizers give every id the same token."""
    return base.token_by_id == other.token_by_id


def stop_token_ids(source: ModelSource, tokenizer: TokenizerFacts, facts: ModelFacts) -> frozenset[int]:
    """Ids that end an answer: of the generation configuration, the model's configuration and the tokenizer.

    Raises:
        ConfigurationError: the generation configuration states something else than ids.
    """
    tree = LocalTree(Path(source.path))
    found = facts.eos_token_ids | as_ids(tokenizer.eos_token_id)
    if GENERATION_CONFIG in tree.sizes:
        stated = read_json(tree, GENERATION_CONFIG).get("eos_token_id")
        if not all(type(each) is int for each in (stated if isinstance(stated, list) else [stated or 0])):
            raise ConfigurationError(
                f"{source.name}: eos_token_id of {GENERATION_CONFIG} must be a whole number or a list of them; got "
                f"{stated!r:.80}"
            )
        found |= as_ids(stated)
    return found


def special_stop_ids(stop: Sequence[str], tokenizer: TokenizerFacts) -> frozenset[int]:
    """Ids of the stop strings that are special tokens: these are no part of an answer's text, and not found in it.

    Raises:
        ConfigurationError: a stop string has a special token beside other text.
    """
    special = tokenizer.special_tokens
    for text in stop:
        if text not in special and (mixed := [token for token in special if token and token in text]):
            raise ConfigurationError(
                f"decoding.stop: {text!r} has the special token {max(mixed, key=len)!r} beside other text, and would "
                "never be found; give the token alone"
            )
    return frozenset(special[text] for text in stop if text in special)


def listed_tokens(ids: Sequence[int], tokens: Mapping[int, str]) -> str:
    """The number of some ids and the first of them, with their tokens."""
    noun = "id" if len(ids) == 1 else "ids"
    return f"{len(ids):,} {noun}: " + ", ".join(f"{i} ({tokens[i]!r})" for i in ids[:NUM_SHOWN]) + _rest(ids)


def _rest(ids: Sequence[int]) -> str:
    return ", ..." if len(ids) > NUM_SHOWN else ""
