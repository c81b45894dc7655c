"""Metrics against values by hand, independent formulas and properties."""

from __future__ import annotations

import math
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cage.rule_names import RuleName
from pipeline.config.files import parse_as
from pipeline.config.units import Unit
from pipeline.config.variants import Variant
from pipeline.evaluation import summary
from pipeline.evaluation.bootstrap import resample
from pipeline.evaluation.config import BootstrapConfig, EvaluateConfig
from pipeline.evaluation.equal_kl import weighted_scores
from pipeline.evaluation.measurements import Measurements
from pipeline.evaluation.metrics import (
    default_reference,
    extent,
    front,
    gaps,
    hypervolume,
    interpolate_at,
    interval,
    inverted_generational_distance,
    is_monotone,
    monotone_share,
    on_front,
    resample_counts,
    spearman,
    weighted_means,
)
from pipeline.evaluation.notes import notes
from pipeline.evaluation.pairs import difference_at_equal_length
from pipeline.evaluation.panel import Panel
from pipeline.evaluation.reading import decimals, reading
from pipeline.evaluation.significance import deviation_of, student_p_value, t_p_value, widened

EQ, LINEAR, BASE = RuleName.EQUILIBRIUM, RuleName.LINEAR, RuleName.BASE
POINTS = np.array([(1, 2), (2, 1), (1.5, 1.5), (0.5, 0.5)], dtype=float)


def test_the_hypervolume_of_four_known_points():
    assert hypervolume(POINTS, np.zeros(2)) == pytest.approx(3.25)
    assert hypervolume(POINTS, np.array([1.0, 1.0])) == pytest.approx(0.25)  # points on the border span nothing
    assert hypervolume(POINTS, np.array([2.0, 2.0])) == 0


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_the_hypervolume_is_that_of_a_union_of_boxes(num_objectives):
    points = np.random.default_rng(3).uniform(-1, 2, (6, num_objectives))
    reference = np.full(num_objectives, -0.4)
    boxes = np.maximum(points - reference, 0)
    union = sum(  # inclusion and exclusion
        (-1) ** (size + 1) * np.prod(np.min(boxes[list(chosen)], axis=0))
        for size in range(1, len(boxes) + 1)
        for chosen in combinations(range(len(boxes)), size)
    )
    assert hypervolume(points, reference) == pytest.approx(union)


def test_the_front_its_gaps_and_the_default_reference():
    assert front(np.vstack([POINTS, POINTS[:1]])).tolist() == [[1, 2], [1.5, 1.5], [2, 1]]
    assert gaps(front(POINTS)).tolist() == [0.25, 0.25]
    assert gaps(POINTS[:1]) is None
    assert default_reference(POINTS).tolist() == pytest.approx([0.35, 0.35])


def test_metrics_of_fronts_against_their_definitions_and_moocore():
    import moocore

    generator = np.random.default_rng(5)
    points, others = generator.uniform(0, 1, (7, 3)), generator.uniform(0, 1, (9, 3))
    everything = np.vstack([points, others])
    best = front(everything)
    nearest = [min(math.dist(point, each) for each in points) for point in best]
    assert inverted_generational_distance(points, best) == pytest.approx(sum(nearest) / len(nearest))
    assert inverted_generational_distance(everything, best) == 0
    kept = moocore.is_nondominated(everything, maximise=True, keep_weakly=True)
    assert on_front(everything, everything).astype(bool).tolist() == kept.tolist()
    assert on_front(POINTS, POINTS).tolist() == [1, 1, 1, 0]
    assert extent(np.array([[0.0, 1, 0.5], [1, 0, 0.5]])) == pytest.approx(math.sqrt(2 / 3))
    assert extent(POINTS[:1]) == 0


def test_the_share_of_monotone_steps_by_hand():
    assert monotone_share(np.array([0, 0.5, 0.5, 1, 0.75]), np.array([1.0, 3, 5, 2, 3])) == pytest.approx(1 / 3)
    assert monotone_share(np.array([0.0, 1]), np.array([1.0, 1])) == 1
    assert monotone_share(np.array([1.0]), np.array([1.0])) is None


values = st.lists(st.integers(-3, 3).map(float), min_size=6, max_size=6)


@given(values, values)
def test_rank_correlation_agrees_with_scipy(first, second):
    ours = spearman(np.array(first), np.array(second))
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(stats.spearmanr(first, second).statistic)


def test_control_is_monotone_when_means_never_fall():
    assert is_monotone(np.array([0, 0.5, 1, 0.5]), np.array([1.0, 3, 2, 1])) is True
    assert is_monotone(np.array([0, 0.5, 1, 0.5]), np.array([1.0, 3, 2, 2])) is False
    assert is_monotone(np.array([1.0, 1.0]), np.array([1.0, 3])) is None


def test_curves_are_straight_between_points_given_in_any_order():
    found = interpolate_at(np.array([0.5, 2.0]), np.array([3.0, 0.0, 1.0]), np.array([[8.0, 0], [0, 3], [4, 1]]))
    assert found.tolist() == [[2, 2], [6, 0.5]]


def test_resampled_means_have_the_standard_error_of_the_mean():
    scores = np.random.default_rng(0).normal(5, 2, (1, 400))
    counts = resample_counts(400, 2000, seed=1)
    means = weighted_means(scores, counts)[:, 0]
    assert means[0] == pytest.approx(scores.mean())
    assert np.std(means[1:]) == pytest.approx(scores.std() / 20, rel=0.1)
    low, high = interval(means[1:], 0.95)
    assert (high - low) / 2 == pytest.approx(1.96 * scores.std() / 20, rel=0.1)
    assert (counts.sum(1) == 400).all()
    assert (resample_counts(400, 2000, seed=1) == counts).all()


def test_samples_of_a_prompt_are_resampled_with_it():
    """The variance is that of the prompts' means, and (N - 1) / N of that within a prompt, by N."""
    generator = np.random.default_rng(3)
    per_prompt, num_prompts = 4, 200
    scores = generator.normal(0, 1, (num_prompts, 1)) + generator.normal(0, 3, (num_prompts, per_prompt))
    counts = resample_counts(num_prompts, 3000, seed=2, per_prompt=per_prompt)
    by_prompt = counts.reshape(-1, num_prompts, per_prompt).sum(2)
    assert (by_prompt[1:].sum(1) == num_prompts * per_prompt).all()
    assert set(np.unique(by_prompt[1:] % per_prompt)) == {0}  # a prompt is drawn as a whole
    means = weighted_means(scores.reshape(1, -1), counts)[1:, 0]
    within = scores.var(1).mean()
    expected = (scores.mean(1).var() + within / per_prompt) / num_prompts
    assert means.var() == pytest.approx(expected, rel=0.1)
    assert (resample_counts(9, 50, seed=2, per_prompt=1) == resample_counts(9, 50, seed=2)).all()


def test_a_prompt_without_a_score_does_not_count():
    means = weighted_means(np.array([[1.0, np.nan, 4.0]]), np.array([[1.0, 1, 1], [0, 3, 0], [2, 0, 1]]))
    assert means[[0, 2], 0].tolist() == [2.5, 2.0]
    assert math.isnan(means[1, 0])


def resampled(variants, scores_by_judge, kl, reference=None, judges=None, tokens=None, bootstrap=200):
    shape = np.shape(kl)
    numbers = {name: np.ones(shape) for name in ("num_tokens", "covered_mass", "max_residual", "num_unsolved")}
    numbers["answer_tokens"] = np.ones(shape) if tokens is None else tokens
    data = Measurements(
        variants=tuple(variants),
        row_ids=tuple(str(at) for at in range(shape[1])),
        scores_by_judge={name: np.array(scores, dtype=float) for name, scores in scores_by_judge.items()},
        numbers={**numbers, "kl_per_token": np.array(kl, dtype=float)},
        num_left_out=0,
        num_answers=shape[0] * shape[1],
    )
    judges = judges or {name: name for name in scores_by_judge}
    return resample(data, judges, reference, BootstrapConfig(samples=bootstrap))


def notes_of(samples, *others):
    tree = {
        "input": {"path": "x", "prompt": "p"}, "output": {"path": "y"}, "base": "m",
        "principals": {name: {"kind": "prompted", "principle": "be kind"} for name in ("a", *others)},
        "evaluation": {"judges": {"a": {"kind": "length"}}, "objectives": {"a": "a"}},
    }  # fmt: skip
    return notes(parse_as(EvaluateConfig, tree), Panel({}, {}, Path(), ""), {}, samples)


def two_rules():
    """Equilibrium and linear at two weight vectors and the base; two prompts, two objectives."""
    vectors = [{"a": 3.0, "b": 1.0}, {"a": 0.0, "b": 2.0}]
    variants = [Variant(rule, 0.1, vector) for rule in (LINEAR, EQ) for vector in vectors]
    a = [[1, 3], [0, 0], [4, 4], [1, 1], [0, 2]]
    b = [[0, 0], [4, 4], [1, 1], [3, 5], [2, 2]]
    kl = [[1, 1], [2, 2], [0.5, 0.5], [1, 1], [0, 0]]
    return resampled([*variants, Variant(BASE, 0.1, vectors[0])], {"a": a, "b": b}, kl)


def test_rules_by_hand():
    rules = summary.by_rule(two_rules(), {})
    # means: linear (2, 0), (0, 4); equilibrium (4, 1), (1, 4); base (1, 2): each objective is between 0 and 4
    assert rules["linear"]["mip"] == pytest.approx((0.75 * 0.5 + 0 + 1) / 2)
    assert rules["equilibrium"]["mip"] == pytest.approx((0.75 * 1 + 0.25 * 0.25 + 1) / 2)
    assert rules["base"]["mip"] == pytest.approx((0.75 * 0.25 + 0.25 * 0.5 + 0.5) / 2)
    # the second point of each rule has weights (0, 1): its first principal asks for nothing
    assert rules["equilibrium"]["worst_principal"] == pytest.approx((0.25 + 1) / 2)
    assert rules["linear"]["worst_principal"] == pytest.approx((0 + 1) / 2)
    assert rules["base"]["worst_principal"] == pytest.approx((0.25 + 0.5) / 2)
    # the reference point is (-0.4, -0.4), the best mean of each objective 4
    assert rules["equilibrium"]["normalised_hypervolume"] == pytest.approx((2 * 4.4 * 1.4 - 1.4**2) / 4.4**2)
    reference = -0.4
    assert rules["base"]["hypervolume"] == pytest.approx((1 - reference) * (2 - reference))
    assert rules["equilibrium"]["hypervolume"] == pytest.approx(
        (4 - reference) * (1 - reference) + (1 - reference) * 3
    )
    # CAGE's public evaluation: the lowest means less 1, and objectives from 0 to 1 above 0
    assert rules["equilibrium"]["published_hypervolume"] == pytest.approx(5 * 2 + 2 * 3)
    assert rules["equilibrium"]["unit_hypervolume"] == pytest.approx(1 * 0.25 + 0.25 * 0.75)
    assert rules["equilibrium"]["spread"] == pytest.approx(0.75)
    assert rules["equilibrium"]["pareto_share"] == 1
    assert rules["equilibrium"]["inverted_generational_distance"] == 0
    assert rules["linear"]["pareto_share"] == 0
    # the front is (1, 0.25), (0.25, 1); linear has (0.5, 0), (0, 1)
    distance = (math.hypot(0.5, 0.25) + 0.25) / 2
    assert rules["linear"]["inverted_generational_distance"] == pytest.approx(distance)
    # the second principal has all weight at one point, and 1/4 at the other: its objective falls from 1 to 1/4
    assert rules["equilibrium"]["regret"] == pytest.approx(0.75)
    assert rules["linear"]["regret"] == pytest.approx(1.0)
    assert rules["base"]["regret"] is None
    assert rules["equilibrium"]["sparsity"] == pytest.approx(0.75**2 * 2)
    assert rules["equilibrium"]["kl_per_token"] == pytest.approx(0.75)


def test_wins_are_counted_by_prompt_at_equal_temperature_and_weights():
    wins = {(row["rule"], row["against"], row["objective"]): row for row in summary.win_rates(two_rules())}
    row = wins["equilibrium", "linear", "b"]
    assert (row["wins"], row["ties"], row["losses"]) == (3, 0, 1)
    row = wins["equilibrium", "base", "a"]  # every variant of the other rule meets the base
    assert (row["wins"], row["ties"], row["losses"]) == (3, 0, 1)
    assert ("linear", "equilibrium", "a") not in wins


def test_control_by_hand():
    control = {(row["rule"], row["objective"]): row for row in summary.control(two_rules())}
    assert len(control) == 4
    assert all(row["spearman"] == 1 and row["is_monotone"] for row in control.values())
    assert control["equilibrium", "a"]["sparsity"] == pytest.approx(0.75**2)
    # only the second principal has all weight at a point: it falls from 1 to 1/4, by the sum from 1 to 0
    assert [control[rule, "b"]["regret"] for rule in ("equilibrium", "linear")] == pytest.approx([0.75, 1.0])
    assert control["equilibrium", "a"]["regret"] is control["equilibrium", "a"]["regret_interval"] is None
    low, high = control["equilibrium", "b"]["regret_interval"]
    assert low <= 0.75 <= high


def test_regret_is_told_for_each_principal():
    vectors = [{"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 1.0}]
    variants = [Variant(LINEAR, 0.1, vector) for vector in vectors]
    samples = resampled(variants, {"a": [[4, 4], [3, 3], [0, 0]], "b": [[0, 0], [2, 2], [8, 8]]}, np.ones((3, 2)))
    assert {row["objective"]: row["regret"] for row in summary.control(samples)} == {"a": 0.25, "b": 0.75}
    assert summary.by_rule(samples, {})["linear"]["regret"] == pytest.approx(0.5)


def test_a_lead_on_every_prompt_is_clear_however_much_prompts_differ():
    prompts = np.random.default_rng(0).normal(0, 5, 12)
    variants = [Variant(rule, 0.1, {"a": 1.0}) for rule in (EQ, LINEAR)]
    samples = resampled(variants, {"a": [prompts + 0.1, prompts]}, np.ones((2, 12)))
    [point, _] = summary.points(samples)
    assert point["intervals"]["a"][0] < prompts.mean() < point["intervals"]["a"][1]
    [mip] = [row for row in summary.differences(samples, {}) if row["metric"] == "mip"]
    assert mip["interval"] == pytest.approx([mip["difference"]] * 2)
    assert mip["p"] == mip["p_adjusted"] == 2**-11  # 12 prompts
    assert mip["prompts_for_this_difference"] == 6  # with fewer no p value is below 5 %
    assert reading([mip], 0.95) == [
        "By mean inner product, equilibrium is better than linear (+1.000, +1.000 to +1.000) (95% intervals)."
    ]


def test_weights_and_scores_that_differ_by_rounding_alone_are_equal():
    """0.1 + 0.2 + 0.7 is not 1 in floating point: weights of one level stay one level, and points that tie tie."""
    counts = [(a, b, 10 - a - b) for a in range(11) for b in range(11 - a)]
    vectors = [dict(zip("abc", (each / 10 for each in count), strict=True)) for count in counts]
    # a falls within each level of its own weight where b's weight rises, and rises between levels
    scores = [[count[0] - 0.05 * count[1]] * 2 for count in counts]
    samples = resampled([Variant(LINEAR, 0.1, each) for each in vectors], {"a": scores, "b": scores, "c": scores},
                        np.ones((len(counts), 2)))  # fmt: skip
    first = summary.control(samples)[0]
    assert (first["is_monotone"], first["monotone_share"]) == (True, 1.0)
    assert [len(np.unique(samples.weights_VM[:, at])) for at in range(3)] == [11, 11, 11]
    variants = [Variant(rule, 0.1, {"a": 1.0}) for rule in (EQ, LINEAR)]
    tied = resampled(variants, {"a": [[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]}, np.ones((2, 3)))
    assert [rule["pareto_share"] for rule in summary.by_rule(tied, {}).values()] == [1.0, 1.0]


def test_a_principal_that_no_judge_measures_is_not_alone_where_it_has_weight():
    vectors = [{"a": 0.5, "b": 0, "c": 0.5}, {"a": 0.5, "b": 0.5, "c": 0}, {"a": 1, "b": 0, "c": 0}]
    variants = [Variant(LINEAR, 0.1, vector) for vector in vectors]
    samples = resampled(variants, {"a": [[4, 4], [1, 1], [3, 3]], "b": [[0, 0], [1, 1], [0, 0]]}, np.ones((3, 2)))
    assert samples.regrets(range(3))[0] == pytest.approx((3 - 1) / 3)
    assert np.isnan(samples.regrets(range(2))[0])


def test_an_estimate_that_is_not_there_has_no_interval():
    """Ranges of KL that overlap in some samples alone: what these say is no comparison of the data."""
    generator = np.random.default_rng(0)
    ours, theirs = (np.sort(generator.normal(0, 0.3, 8)) for _ in range(2))
    variants = [Variant(rule, each, {"a": 1.0}) for rule in (EQ, LINEAR) for each in (0.3, 0.1)]
    kl = np.stack([ours - ours.mean() + 1, ours - ours.mean() + 2, theirs[::-1] - theirs.mean() + 2.001, theirs + 9])
    samples = resampled(variants, {"a": generator.normal(0, 1, (4, 8))}, kl)
    scores = weighted_scores(samples)
    assert np.isnan(scores["linear"][0])
    assert np.isfinite(scores["linear"]).any()
    assert summary.by_rule(samples, scores)["linear"]["equal_kl_interval"] is None
    differences = summary.differences(samples, scores)
    [row] = [row for row in differences if row["metric"] == "equal_kl"]
    assert (row["difference"], row["interval"], row["p"]) == (None, None, None)
    assert not any("At equal KL" in sentence for sentence in reading(differences, 0.95))


def test_weight_vectors_that_share_no_kl_are_counted():
    variants = [Variant(rule, each, {"a": w}) for rule in (EQ, LINEAR) for w in (1.0, 2.0) for each in (0.3, 0.1)]
    kl = np.repeat(np.array([1, 2, 1, 2, 1.5, 3, 4, 5.0])[:, None], 7, axis=1)
    samples = resampled(variants, {"a": np.random.default_rng(0).normal(0, 1, (8, 7))}, kl)
    [found] = [note for note in notes_of(samples) if "At equal KL, rules" in note]
    assert "compared at 1 of 2 weight vectors" in found


def test_objectives_that_say_nothing_are_noted():
    variants = [Variant(rule, 0.1, {"a": 1.0, "b": 1.0}) for rule in (EQ, LINEAR)]
    samples = resampled(variants, {"a": [[1, 2], [3, 4]], "b": [[5, 5], [5, 5]]}, np.ones((2, 2)))
    found = notes_of(samples, "b")
    assert any("The judge b tells nothing apart: every mean of b is 5, which counts as 0" in note for note in found)
    assert any("so that all hypervolumes are 0" in note for note in found)
    given = resampled(variants[:1], {"a": [[1, 2]]}, np.ones((1, 2)), reference={"a": 2.0})
    assert any("so that all hypervolumes are 0" in note for note in notes_of(given))
    lone = notes_of(resampled(variants, {"a": [[1, 2], [3, 4]]}, np.ones((2, 2))), "b", "c")
    assert not any("hypervolumes are 0" in note or "tells nothing" in note for note in lone)
    assert any("No judge measures b, c (evaluation.objectives): all metrics are of a alone" in note for note in lone)
    assert not any("No judge measures" in note for note in found)


def test_empty_answers_are_counted():
    variants = [Variant(rule, 0.1, {"a": 1.0}) for rule in (EQ, LINEAR)]
    samples = resampled(variants, {"a": [[1, 2], [3, 4]]}, np.ones((2, 2)))
    assert not any("no text" in note for note in notes_of(samples))
    samples.data.numbers["empty"] = np.array([[0.0, 0.0], [1.0, 1.0]])
    assert any(note.startswith("2 answers have no text (linear 2). Judges") for note in notes_of(samples))
    assert summary.by_rule(samples, {})["linear"]["empty"] == 1


def test_p_values_and_ties_are_the_same_in_any_unit():
    """Hypervolumes are products, and probabilities of whole answers may be as small."""
    generator = np.random.default_rng(6)
    scores = generator.normal(0, 1, (2, 2, 30)) + np.array([0.2, 0.0])[:, None]
    variants = [Variant(rule, 0.1, {"a": 1.0, "b": 1.0}) for rule in (EQ, LINEAR)]
    found = []
    for scale in (1.0, 1e-9, 1e-15):
        samples = resampled(variants, {"a": scale * scores[0], "b": scale * scores[1]}, np.ones((2, 30)))
        rows = summary.differences(samples, {})
        wins = [(row["wins"], row["ties"], row["losses"]) for row in summary.win_rates(samples)]
        found.append(([row["p"] for row in rows], wins))
    assert 0.001 < found[0][0][0] < 1
    for p_values, wins in found[1:]:
        assert p_values == pytest.approx(found[0][0], rel=1e-3)
        assert wins == found[0][1]
    weights = np.array([0.0, 1.0, 2.0])
    assert monotone_share(weights, np.array([3e-15, 2e-15, 4e-15])) == 0.5
    assert is_monotone(weights, np.array([3e-15, 2e-15, 4e-15])) is False
    assert is_monotone(weights, np.zeros(3)) is True


def test_small_differences_are_shown_with_their_digits():
    row = {"rule": "equilibrium", "against": "linear", "metric": "hypervolume", "difference": 2.5e-6}
    [said] = reading([{**row, "interval": [1e-6, 4e-6], "p_adjusted": 0.001}], 0.95)
    assert "better than linear (+0.00000250, +0.00000100 to +0.00000400)" in said
    assert [decimals(0.5, None), decimals(-0.0123), decimals(-0.0099), decimals(1e-17), decimals()] == [3, 3, 5, 3, 3]


def test_one_prompt_makes_no_rule_better():
    variants = [Variant(rule, 0.1, {"a": 1.0}) for rule in (EQ, LINEAR)]
    [mip] = [
        row
        for row in summary.differences(resampled(variants, {"a": [[3.0], [1.0]]}, np.ones((2, 1))), {})
        if row["metric"] == "mip"
    ]
    assert mip["difference"] == 1
    assert (mip["p"], mip["p_adjusted"], mip["prompts_for_this_difference"]) == (None,) * 3
    assert "is not distinguishable from linear" in reading([mip], 0.95)[0]


@settings(max_examples=30)
@given(st.lists(st.integers(-4, 4).map(float), min_size=2, max_size=7))
def test_no_p_value_is_below_that_of_all_signs_that_prompts_could_have(lead):
    """The exact test: of all ways to swap two systems by prompt, the share with as large a difference."""
    signs = np.array(list(product((1, -1), repeat=len(lead))))
    exact = (abs(signs @ np.array(lead)) >= abs(sum(lead)) - 1e-9).mean()
    smallest = 2.0 ** (1 - len(lead))
    assert exact >= smallest
    variants = [Variant(rule, 0.1, {"a": 1.0}) for rule in (EQ, LINEAR)]
    samples = resampled(variants, {"a": [lead, [0.0] * len(lead)]}, np.ones((2, len(lead))), bootstrap=100)
    for row in summary.differences(samples, {}):
        assert row["p"] >= smallest


@pytest.mark.parametrize("freedom", [1, 2, 5, 39, 999, 100_000])
def test_the_tail_of_students_t_agrees_with_scipy(freedom):
    for t in (0.0, 0.3, 2.0, -8.0, 40.0):
        assert student_p_value(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-8)
    low = stats.norm.cdf(-stats.t.ppf(0.975, freedom) * math.sqrt((freedom + 1) / freedom))
    assert widened(0.95, freedom + 1) == pytest.approx(1 - 2 * low, rel=1e-6)


@pytest.mark.parametrize("num_prompts", [6, 12, 30])
def test_of_rules_that_are_alike_one_in_twenty_differs_and_intervals_hold_the_truth(num_prompts):
    """Prompts of a normal distribution: p below 5 % in 5 % of evaluations, and 0 in 95 % of the intervals."""
    generator = np.random.default_rng(8)
    variants = [Variant(rule, 0.1, {"a": 1.0}) for rule in (EQ, LINEAR)]
    false, held, times = 0, 0, 300
    for _ in range(times):
        scores = generator.normal(0, 1, (2, num_prompts))
        samples = resampled(variants, {"a": scores}, np.ones((2, num_prompts)), bootstrap=200)
        lead_S = samples.means_SVM[:, 0, 0] - samples.means_SVM[:, 1, 0]
        deviation = deviation_of(lead_S[1:], num_prompts)
        false += t_p_value(lead_S[0], deviation, num_prompts) < 0.05
        low, high = samples.interval(lead_S)
        held += low <= 0 <= high
    assert false / times == pytest.approx(0.05, abs=0.03)
    assert held / times == pytest.approx(0.95, abs=0.03)


def test_a_lead_on_each_of_few_prompts_shows_nothing_and_on_enough_of_them_does():
    variants = [Variant(rule, 0.1, {"a": 1.0}) for rule in (EQ, LINEAR)]
    for num_prompts, is_shown in ((2, False), (5, False), (6, True)):
        scores = [[1.0] * num_prompts, [0.0] * num_prompts]
        samples = resampled(variants, {"a": scores}, np.ones((2, num_prompts)))
        [mip] = [row for row in summary.differences(samples, {}) if row["metric"] == "mip"]
        assert mip["p"] == 2.0 ** (1 - num_prompts)
        assert ("is better than" in reading([mip], 0.95)[0]) == is_shown
        assert (mip["smallest_difference_to_find"] is not None) == is_shown
        assert any("give more prompts" in note for note in notes_of(samples)) == (not is_shown)


def test_metrics_of_fronts_have_intervals_by_prompt():
    """Prompts that agree leave no interval; otherwise each sample has fronts of its own."""
    entry = summary.by_rule(two_rules(), {})["linear"]
    names = ("spread", "inverted_generational_distance", "pareto_share", "sparsity")
    for name in names:
        assert entry[f"{name}_interval"][0] <= entry[name] <= entry[f"{name}_interval"][1]
    assert entry["spread_interval"][0] < entry["spread_interval"][1]  # its first point goes from (1, 0) to (3, 0)
    alike = resampled(
        [Variant(rule, 0.1, {"a": weight, "b": 1 - weight}) for rule in (EQ, LINEAR) for weight in (0.2, 0.8)],
        {"a": [[1, 1], [3, 3], [0, 0], [2, 2]], "b": [[3, 3], [1, 1], [2, 2], [0, 0]]},
        np.ones((4, 2)),
    )
    for entry in summary.by_rule(alike, {}).values():
        assert all(entry[f"{name}_interval"] == [entry[name]] * 2 for name in names)


def test_metrics_of_fronts_by_sample_are_those_of_the_samples_means():
    samples = two_rules()
    found = samples.front_metrics([0, 1])
    for at in (0, 1, 57, 200):
        points = samples.normalised(samples.means_SVM[at])
        best = front(points)
        assert found["spread"][at] == extent(front(points[:2]))
        assert found["pareto_share"][at] == on_front(points[:2], points).mean()
        assert found["inverted_generational_distance"][at] == inverted_generational_distance(points[:2], best)


@pytest.mark.parametrize(
    ("temperatures", "has_base", "says"),
    [
        ({EQ: (0.3,), LINEAR: (0.3,)}, True, "with one agent temperature the curve of equilibrium, linear is"),
        ({EQ: (0.3, 0.1), LINEAR: (0.3,)}, True, "with one agent temperature the curve of linear is"),
        ({EQ: (0.3, 0.1), LINEAR: (0.3, 0.1)}, True, None),
        ({EQ: (0.3,), LINEAR: (0.3,)}, False, None),  # there is no comparison at equal KL
    ],
)
def test_a_straight_line_from_the_base_is_noted(temperatures, has_base, says):
    variants = [Variant(rule, each, {"a": 1.0}) for rule, of_rule in temperatures.items() for each in of_rule]
    variants += [Variant(BASE, 0.3, {"a": 1.0})] * has_base
    kl_V = np.array([1.0 / each.agent_temperature if each.rule is not BASE else 0.0 for each in variants])
    samples = resampled(variants, {"a": np.sqrt(kl_V)[:, None] + np.arange(9)}, np.repeat(kl_V[:, None], 9, axis=1))
    found = [note for note in notes_of(samples) if "straight line" in note]
    assert len(found) == (says is not None)
    if says is not None:
        assert says in found[0]
        assert "below the true curve" in found[0]
        assert found[0].endswith("give grid.agent_temperatures several.")


def test_differences_say_how_many_prompts_they_take_and_are_adjusted_by_metric():
    """Against the test of a mean of differences: its deviation over prompts, and 2.8 of its standard errors."""
    generator = np.random.default_rng(4)
    variants = [Variant(rule, 0.1, {"a": 1.0}) for rule in (EQ, LINEAR, RuleName.MIXTURE)]
    scores = generator.normal(0, 1, (3, 60)) + np.array([[0.3], [0.0], [0.2]])
    samples = resampled(variants, {"a": scores}, np.ones((3, 60)), bootstrap=2000)
    rows = [row for row in summary.differences(samples, {}) if row["metric"] == "mip"]
    span = samples.high_M[0] - samples.low_M[0]
    [row] = [row for row in rows if (row["rule"], row["against"]) == ("equilibrium", "linear")]
    lead = (scores[0] - scores[1]) / span
    wanted = (2.8016 * lead.std(ddof=1) / lead.mean()) ** 2 + 1.92
    assert row["prompts_for_this_difference"] == pytest.approx(wanted, rel=0.1)
    error = lead.std(ddof=1) / math.sqrt(60)
    assert row["p"] == pytest.approx(2 * stats.t.sf(abs(lead.mean()) / error, 59), rel=0.3)
    assert t_p_value(0.3, 2.0, 100) == pytest.approx(2 * stats.t.sf(1.5, 99))
    assert row["smallest_difference_to_find"] == pytest.approx(2.8016 * lead.std(ddof=1) / math.sqrt(58), rel=0.05)
    ordered = sorted(rows, key=lambda each: each["p"])
    expected = np.maximum.accumulate([min(1.0, each["p"] * (3 - at)) for at, each in enumerate(ordered)])
    assert [each["p_adjusted"] for each in ordered] == pytest.approx(expected.tolist())


def test_rules_on_one_curve_are_equal_at_equal_kl_however_far_they_go():
    kl = {EQ: (0.2, 1.0), LINEAR: (0.6, 3.0)}
    variants = [Variant(rule, temperature, {"a": 1.0}) for rule in kl for temperature in (0.3, 0.1)]
    variants.append(Variant(BASE, 0.3, {"a": 1.0}))
    kl_V = np.array([*kl[EQ], *kl[LINEAR], 0.0])
    noise = np.random.default_rng(1).normal(0, 1, 9)
    samples = resampled(variants, {"a": 2 * kl_V[:, None] + noise}, np.repeat(kl_V[:, None], 9, axis=1))
    differences = {
        row["metric"]: row
        for row in summary.differences(samples, weighted_scores(samples))
        if row["against"] == "linear"
    }
    assert differences["mip"]["difference"] < -0.1
    assert differences["equal_kl"]["difference"] == pytest.approx(0, abs=1e-9)
    rows = summary.equal_kl(samples)
    assert sorted({row["kl_per_token"] for row in rows}) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert all(row["objectives"]["a"] == pytest.approx(2 * row["kl_per_token"] + noise.mean()) for row in rows)


def test_at_equal_length_a_lead_that_is_length_alone_is_gone_and_another_stays():
    """Against least squares with an intercept for each two variants and one slope, by numpy."""
    generator = np.random.default_rng(2)
    variants = [Variant(rule, tau, {"a": 1.0, "b": 3.0}) for rule in (EQ, LINEAR) for tau in (0.1, 0.3)]
    tokens = generator.integers(5, 40, (4, 30)).astype(float)
    tokens[:2] += 12
    a = 0.2 * tokens + generator.normal(0, 1, (4, 30))
    b = a[::-1] + np.array([[1.0], [1.0], [0.0], [0.0]])
    samples = resampled(variants, {"a": a, "b": b}, np.ones((4, 30)), tokens=tokens)
    found = difference_at_equal_length(samples, "equilibrium", "linear")
    span = samples.high_M - samples.low_M
    lead = (0.25 * (a[:2] - a[2:]) / span[0] + 0.75 * (b[:2] - b[2:]) / span[1]).ravel()
    longer = (tokens[:2] - tokens[2:]).ravel()
    design = np.stack([longer, np.repeat([1.0, 0.0], 30), np.repeat([0.0, 1.0], 30)], axis=1)
    for sample in (0, 1, 7):
        weight = np.sqrt(np.tile(samples.counts_SA[sample], 2))
        fitted = np.linalg.lstsq(design * weight[:, None], lead * weight, rcond=None)[0]
        assert found[sample] == pytest.approx(fitted[1:].mean())
    same = resampled(variants, {"a": 0.2 * tokens, "b": 0.2 * tokens}, np.ones((4, 30)), tokens=tokens)
    rows = {row["metric"]: row for row in summary.differences(same, {}) if row["agent_temperature"] is None}
    assert rows["mip"]["difference"] > 0.1
    assert rows["equal_length"]["difference"] == pytest.approx(0, abs=1e-9)


def test_units_are_compared_at_equal_kl_two_by_two():
    """Games over answers reach little KL: they do not narrow what games over tokens are compared at."""
    kl = {("equilibrium", Unit.TOKEN): 1.0, ("linear", Unit.TOKEN): 2.0, ("linear", Unit.ANSWER): 0.1}
    variants = [Variant(RuleName(rule), 0.1, {"a": 1.0}, unit) for rule, unit in kl]
    variants.append(Variant(BASE, 0.1, {"a": 1.0}))
    kl_V = np.array([*kl.values(), 0.0])
    samples = resampled(variants, {"a": np.repeat(2 * kl_V[:, None], 5, 1)}, np.repeat(kl_V[:, None], 5, 1))
    scores = weighted_scores(samples)
    assert set(scores) == {"equilibrium", "linear"}  # one rule over answers has none to be compared with
    found = {
        (row["rule"], row["against"]) for row in summary.differences(samples, scores) if row["metric"] == "equal_kl"
    }
    assert found == {("equilibrium", "linear"), ("linear", "linear (answer)")}
    assert scores["linear"][0] == pytest.approx(samples.normalised(np.array([2 * 0.625]))[0])


def test_the_reference_point_can_be_given():
    variants = [Variant(EQ, 0.1, {"a": 1.0})]
    samples = resampled(variants, {"a": [[1.0, 3.0]]}, np.ones((1, 2)), reference={"a": -1.0})
    assert summary.by_rule(samples, {})["equilibrium"]["hypervolume"] == 3
    assert summary.by_rule(samples, {})["equilibrium"]["mip"] == 0  # nothing varies
