import math

import numpy as np

from optalr.experiments.studies.series import column, trailing_mean


def test_a_column_has_a_gap_where_a_row_lacks_the_number():
    found = column([{"a": 1}, {"b": 2}], "a")
    assert found[0] == 1.0
    assert math.isnan(found[1])


def test_a_trailing_mean_is_over_fewer_values_at_the_start():
    values = np.array([1.0, 3.0, 5.0, 7.0])
    assert trailing_mean(values, 2).tolist() == [1.0, 2.0, 4.0, 6.0]
    assert trailing_mean(values, 1).tolist() == values.tolist()
    # A window longer than the run is the running mean.
    assert trailing_mean(values, 99).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert trailing_mean(values[:0], 2).tolist() == []
