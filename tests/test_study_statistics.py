"""A study's statistics: against hand-computed values, other packages, and simulated studies whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.mixed_linear_model import MixedLM, VCSpec
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_effectsize

from vllava.verdicts.statistics import cohens_h, gain, holm, over_seeds

# --- by hand ----------------------------------------------------------------------------------------------------------


def test_a_figure_over_three_seeds_has_students_intervals():
    found = over_seeds([0.80, 0.82, 0.90])  # mean 0.84, standard deviation sqrt(0.0056 / 2), t(2) = 4.302653
    deviation = math.sqrt(0.0056 / 2)
    assert found.mean == pytest.approx(0.84)
    assert found.high - found.mean == pytest.approx(4.302653 * deviation / math.sqrt(3), rel=1e-6)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert found.next_high - found.mean == pytest.approx(4.302653 * deviation * math.sqrt(4 / 3), rel=1e-6)


def test_one_seed_has_a_figure_and_no_interval():
    found = over_seeds([0.8])
    assert found.mean == 0.8 and found.seeds == 1
    assert all(map(math.isnan, (found.low, found.high, found.next_low, found.next_high)))
    with pytest.raises(ValueError, match="no seed"):
        over_seeds([])


def test_a_gain_by_hand():
    """Two seeds, three questions: d = [[1, 0, 1], [1, 0, -1]].

    Means of seeds 2/3 and 0, of questions 1, 0, 0; all 1/3. Mean squares: seeds 3 * 2 * (1/3)^2 = 2/3, with 1 degree of
    freedom; questions 2 * (4/9 + 1/9 + 1/9) / 2 = 2/3; the rest: 4 - 2/3 - 4/3 - 6/9 = 4/3 over 2 = 2/3.
    """
    found = gain(np.array([[1, 1, 1], [1, 1, 0]]), np.array([[0, 1, 0], [0, 1, 1]]))
    assert found.value == pytest.approx(1 / 3)
    variance = (2 / 3 + 2 / 3 - 2 / 3) / 6
    freedom = (2 / 3) ** 2 / ((2 / 3) ** 2 * (1 / 1 + 1 / 2 + 1 / 2))
    assert found.freedom == pytest.approx(freedom) == pytest.approx(0.5)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 0.5) * math.sqrt(variance))
    assert found.p == pytest.approx(2 * stats.t.sf(1 / 3 / math.sqrt(variance), 0.5))
    assert (found.better, found.worse, found.seeds, found.questions) == (3, 1, 2, 3)
    assert found.over == "seeds and questions"
    assert found.by_seeds == 0  # whose mean square is no larger than that of the rest


def test_what_of_the_variance_is_by_seeds_by_hand():
    seeds_alone = gain(np.array([[1, 1], [0, 0]]), np.zeros((2, 2)))
    questions_alone = gain(np.array([[1, 0], [1, 0]]), np.zeros((2, 2)))
    assert (seeds_alone.by_seeds, questions_alone.by_seeds) == (1, 0)
    # d = [[1, 1, 1, 0], [0, 0, 0, 0]]: means of seeds 3/4 and 0, of questions 1/2, 1/2, 1/2, 0. Mean squares: seeds
    # 4 * 2 * (3/8)^2 = 9/8; questions 2 * (3 * (1/8)^2 + (3/8)^2) / 3 = 1/8, as that of the rest. So 1 of 9/8.
    both = gain(np.array([[1, 1, 1, 0], [0, 0, 0, 0]]), np.zeros((2, 4)))
    assert both.by_seeds == pytest.approx(8 / 9)
    assert math.isnan(gain(np.ones((1, 4)), np.zeros((1, 4))).by_seeds)


def test_with_one_seed_the_test_is_mcnemars_and_speaks_of_questions_alone():
    ours, others = np.array([[1] * 43 + [0] * 19 + [1] * 638]), np.array([[0] * 43 + [1] * 19 + [1] * 638])
    found = gain(ours, others)
    assert found.over == "questions" and found.seeds == 1
    assert found.p == pytest.approx(0.00311, abs=1e-4)  # as measured of united and separated_clip: 43 and 19, p 0.003
    assert found.value == pytest.approx(24 / 700)
    spread = math.sqrt((62 - 24**2 / 700) / 699 / 700)
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 699) * spread)


def test_effects_by_hand():
    found = gain(np.array([[1, 1, 1, 0]] * 2), np.array([[1, 0, 0, 0]] * 2))
    assert found.mended == pytest.approx(2 / 3)  # of three errors, one is left
    assert found.effect == pytest.approx(2 * math.asin(math.sqrt(0.75)) - 2 * math.asin(math.sqrt(0.25)))
    assert cohens_h(0.9, 0.8) == pytest.approx(proportion_effectsize(0.9, 0.8))


def test_holms_correction_by_hand():
    # in order 0.01 * 4, 0.02 * 3, 0.03 * 2 (not below the one before it), 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])


def test_a_test_that_could_not_be_made_counts_in_the_correction():
    first, second = holm([0.02, math.nan])
    assert first == pytest.approx(0.04) and math.isnan(second)


def test_systems_that_answer_the_same_do_not_differ():
    same = np.array([[1, 0, 1, 1]] * 3)
    found = gain(same, same)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_a_gain_of_every_seed_in_every_question_has_no_spread_and_the_p_of_its_questions():
    found = gain(np.ones((3, 5)), np.zeros((3, 5)))
    assert (found.value, found.low, found.high) == (1, 1, 1)
    assert found.p == pytest.approx(2 * 0.5**15)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((0, 3), (0, 3)), ((2, 0), (2, 0)), ((3,), (3,))])
def test_what_is_not_in_pairs_is_refused(shapes):
    with pytest.raises(ValueError, match="same questions"):
        gain(np.zeros(shapes[0]), np.zeros(shapes[1]))


# --- against other packages -------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)  # statsmodels takes its time
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_as_statsmodels_has_it(ps):
    assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])


def test_the_gain_is_that_of_a_mixed_model_fitted_by_reml():
    rng = np.random.default_rng(3)
    seeds, questions = 5, 16
    d = (
        0.3
        + rng.normal(0, 0.5, (seeds, 1))
        + rng.normal(0, 0.6, (1, questions))
        + rng.normal(0, 0.7, (seeds, questions))
    )
    found = gain(d, np.zeros_like(d) + 0.5)
    seed, question = (one.ravel() for one in np.indices(d.shape))
    parts = {"seed": np.eye(seeds)[seed], "question": np.eye(questions)[question]}
    spec = VCSpec(
        list(parts), [[[f"{name}{n}" for n in range(one.shape[1])]] for name, one in parts.items()],
        [[one] for one in parts.values()],
    )  # fmt: skip
    model = MixedLM(d.ravel() - 0.5, np.ones((d.size, 1)), np.ones(d.size), exog_vc=spec)
    fitted = model.fit(reml=True, method=["lbfgs"])
    assert fitted.fe_params[0] == pytest.approx(found.value, rel=1e-6)
    reach = (found.high - found.low) / 2
    assert reach / stats.t.ppf(0.975, found.freedom) == pytest.approx(float(fitted.bse_fe[0]), rel=1e-3)


@given(st.integers(2, 4), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_the_order_of_seeds_and_of_questions_does_not_matter_and_the_sides_mirror(seeds, questions, number):
    rng = np.random.default_rng(number)
    ours, others = (rng.integers(0, 2, (seeds, questions)) for _ in range(2))
    found = gain(ours, others)
    by_seed, by_question = rng.permutation(seeds), rng.permutation(questions)
    moved = gain(ours[by_seed][:, by_question], others[by_seed][:, by_question])
    assert (moved.value, moved.low, moved.p) == pytest.approx((found.value, found.low, found.p))
    mirrored = gain(others, ours)
    assert (mirrored.value, mirrored.low, mirrored.p) == pytest.approx((-found.value, -found.high, found.p))


# --- in simulation ----------------------------------------------------------------------------------------------------

BASE, HARD, OWN, NOISE = 1.0, 1.5, 0.5, 0.8  # log-odds: level; how questions differ, to both and to one; seeds in each


def simulated(rng, seeds, questions, more, of_seed):
    """Right or wrong [seeds, questions] of a system and of one that is not better by `more` log-odds."""
    hard, own = rng.normal(0, HARD, questions), rng.normal(0, OWN, questions) / 2

    def system(shift):
        odds = BASE + shift + hard + rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, NOISE, (seeds, questions))
        return (rng.random((seeds, questions)) < 1 / (1 + np.exp(-odds))).astype(float)

    return system(more + own), system(-own)


def true_gain(more, of_seed):
    rng = np.random.default_rng(9)
    hard, own = rng.normal(0, HARD, 400_000), rng.normal(0, OWN, 400_000) / 2

    def share(shift):
        odds = BASE + shift + hard + rng.normal(0, math.hypot(of_seed, NOISE), 400_000)
        return np.mean(1 / (1 + np.exp(-odds)))

    return share(more + own) - share(-own)


def crossed_bootstrap(ours, others, rng, times=150):
    """The interval of a bootstrap that draws seeds and questions anew, which is not what is used, and here is why."""
    d, found = ours - others, []
    for _ in range(times):
        seeds, questions = (rng.integers(count, size=count) for count in d.shape)
        found.append(d[seeds].mean(axis=0)[questions].mean())
    return np.quantile(found, [0.025, 0.975])


@pytest.mark.parametrize("seeds", [3, 5, 8])
@pytest.mark.parametrize(("more", "of_seed"), [(0.0, 0.1), (0.5, 0.1), (0.0, 0.5), (0.5, 0.5)])
def test_intervals_hold_the_truth_as_often_as_they_claim(seeds, more, of_seed):
    rng, truth = np.random.default_rng(1), true_gain(more, of_seed)
    found = [gain(*simulated(rng, seeds, 300, more, of_seed)) for _ in range(400)]
    held = np.mean([one.low <= truth <= one.high for one in found])
    assert held > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400)  # of 400
    if seeds > 3:  # and they are no wider than that needs; with three seeds they may be
        assert held < 0.995 or of_seed < 0.5


def test_no_difference_is_undecided_in_nineteen_of_twenty_studies_at_least():
    rng = np.random.default_rng(2)
    for of_seed in (0.0, 0.1, 0.5):
        wrong = np.mean([gain(*simulated(rng, 5, 300, 0.0, of_seed)).p < 0.05 for _ in range(400)])
        assert wrong < 0.05 + 3 * math.sqrt(0.95 * 0.05 / 400)


def test_a_true_difference_is_found_and_the_more_seeds_the_smaller_it_may_be():
    rng = np.random.default_rng(3)

    def power(seeds, more):
        return np.mean([gain(*simulated(rng, seeds, 700, more, 0.1)).p < 0.05 for _ in range(150)])

    assert power(5, 0.6) > 0.95  # of about eight points
    assert power(3, 0.3) < power(8, 0.3)


def test_a_bootstrap_over_few_seeds_is_too_sure_where_seeds_differ():
    rng, truth = np.random.default_rng(4), true_gain(0.5, 0.8)
    studies = [simulated(rng, 3, 300, 0.5, 0.8) for _ in range(200)]
    by_bootstrap = [crossed_bootstrap(*one, rng) for one in studies]
    by_model = [gain(*one) for one in studies]
    held = np.mean([low <= truth <= high for low, high in by_bootstrap])
    assert held < 0.90 < np.mean([one.low <= truth <= one.high for one in by_model])


def test_holm_keeps_a_study_of_seven_claims_without_any_truth_from_a_verdict():
    rng = np.random.default_rng(5)
    studies = [[gain(*simulated(rng, 5, 100, 0.0, 0.3)).p for _ in range(7)] for _ in range(200)]
    assert np.mean([min(ps) < 0.05 for ps in studies]) > 0.1  # without it, many would have one
    assert np.mean([min(holm(ps)) < 0.05 for ps in studies]) < 0.05 + 3 * math.sqrt(0.95 * 0.05 / 200)


def test_a_further_seed_falls_where_it_is_expected():
    rng = np.random.default_rng(6)
    for seeds in (3, 5):
        draws = rng.normal(0.85, 0.01, (2000, seeds + 1))
        spreads = [over_seeds(row[:-1]) for row in draws]
        held = [one.next_low <= new <= one.next_high for one, new in zip(spreads, draws[:, -1], strict=True)]
        means = [one.low <= 0.85 <= one.high for one in spreads]
        assert np.mean(held) == pytest.approx(0.95, abs=0.015) == pytest.approx(np.mean(means), abs=0.015)
