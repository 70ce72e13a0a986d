"""What of a quantity is drawn: gaps, smoothing, and peaks that survive however many points there are."""

import numpy as np
import pytest

from pretrain.errors import InputError
from pretrain.history.series import Series

NAN = float("nan")


def series(*y):
    return Series(np.arange(1.0, len(y) + 1), np.array(y, np.float64))


def test_values_by_step_and_null_is_a_gap():
    lines = [{"step": 2, "loss": 1.5}, {"step": 3, "eval/top1": 1}, {"step": 4, "loss": None}]
    found = Series.of(lines, "loss", scale=8)
    assert found.x.tolist() == [16, 32]
    np.testing.assert_array_equal(found.y, [1.5, NAN])
    assert found.known.x.tolist() == [16]


def test_a_value_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="loss is 'low' in a line; a number would be right"):
        Series.of([{"step": 1, "loss": 1.0}, {"step": 2, "loss": "low"}], "loss")


def test_smoothing_has_no_bias_and_keeps_gaps():
    constant = series(*[3.0] * 200)
    np.testing.assert_allclose(constant.smoothed().y, 3.0)
    assert constant.span == 4
    y = np.full(100, 1.0)
    y[10], y[50] = NAN, 5.0
    smooth = series(*y).smoothed().y  # weight 1/2
    assert np.isnan(smooth[10])
    assert np.isfinite(np.delete(smooth, 10)).all()
    assert smooth[50] == pytest.approx(3.0)
    assert smooth[51] == pytest.approx(2.0)
    assert series(1.0, 9.0).smoothed().y.tolist() == [1.0, 9.0], "few points are not smoothed"


def test_columns_keep_every_extreme():
    rng = np.random.default_rng(0)
    y = rng.normal(size=300_000)
    y[123_456], y[234_567] = 99.0, -77.0
    found = Series(np.arange(1.0, len(y) + 1), y).columns(0, len(y), 1000)
    assert (np.nanmax(found.most), np.nanmin(found.least)) == (99.0, -77.0)
    assert found.x[np.nanargmax(found.most)] == pytest.approx(123_457, abs=300)
    np.testing.assert_allclose(found.mean[:5], [part.mean() for part in np.split(y, 1000)[:5]], atol=0.02)


def test_columns_without_a_number_are_gaps():
    found = Series(np.array([1.0, 9.0]), np.array([2.0, NAN])).columns(0, 10, 2)
    np.testing.assert_array_equal(found.mean, [2.0, NAN])
    np.testing.assert_array_equal(found.most, [2.0, NAN])


def test_steps_that_do_not_follow_each_other_are_not_joined():
    # 3 to 5 were taken back, later 4 to 6, later 90 and 91
    found = Series(np.array([3.0, 4, 5, 4, 5, 6, 90, 91]), np.arange(8.0)).parted()
    np.testing.assert_array_equal(found.x, [3, 4, 5, NAN, 4, 5, 6, NAN, 90, 91])
