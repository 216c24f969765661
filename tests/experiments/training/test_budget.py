import pytest

from optalr.experiments.configs.config import from_table
from optalr.experiments.errors import ExperimentError
from optalr.experiments.training.budget import scale_to_budget

CONFIG = from_table(
    {
        "train": {"epochs": 160},
        "data": {"fraction": 0.5},
        "schedule": {"name": "steps", "at_epochs": [80, 120]},
        "method": {"name": "tso_alra", "switch_at_epochs": 40, "update_every": 50},
        "tune": {"method.switch_at_epochs": [20, 40], "method.learning_rate": [0.1]},
        "record": {"checkpoint_every": 10},
    }
)


def test_epochs_examples_and_milestones_shrink_together():
    small = scale_to_budget(CONFIG, 0.01)
    assert small.train.epochs == 16
    assert small.data.fraction == pytest.approx(0.05)
    assert small.schedule.options["at_epochs"] == [8.0, 12.0]
    assert small.method.options["switch_at_epochs"] == 4.0
    assert small.tune == {"method.switch_at_epochs": [2.0, 4.0], "method.learning_rate": [0.1]}
    assert small.record.checkpoint_every == 1
    assert small.method.options["update_every"] == 50
    assert small.method.learning_rate == CONFIG.method.learning_rate


def test_a_budget_of_one_changes_nothing():
    assert scale_to_budget(CONFIG, 1.0).train == CONFIG.train
    assert scale_to_budget(CONFIG, 1.0).method == CONFIG.method


def test_milestones_keep_their_place_when_epochs_are_rounded():
    small = scale_to_budget(CONFIG, 0.0001)  # 1.6 epochs, rounded to 2
    assert small.train.epochs == 2
    assert small.schedule.options["at_epochs"] == [1.0, 1.5]


@pytest.mark.parametrize("budget", [0.0, -1.0, 2.0, float("nan")])
def test_a_budget_outside_its_range_is_refused(budget):
    with pytest.raises(ExperimentError, match="--budget must lie in"):
        scale_to_budget(CONFIG, budget)
