import csv
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from tensorboardX import SummaryWriter

import optalr
from optalr.reading.monitoring import CSVWriter

TX = optalr.two_stage(
    optalr.scale_by_recorded_rate(0.5), optalr.scale_by_recorded_rate(0.25), optalr.switch_at(2)
)


def train(log, num_steps=4, scan=False):
    def step(carry, _=None):
        params, state = carry
        updates, state = TX.update(params, state, params)
        log(state, loss=jnp.sum(params**2))
        return (optax.apply_updates(params, updates), state), None

    carry = (jnp.ones(2), TX.init(jnp.ones(2)))
    if scan:
        carry, _ = jax.jit(lambda c: jax.lax.scan(step, c, length=num_steps))(carry)
    else:
        compiled = jax.jit(step)
        for _ in range(num_steps):
            carry, _ = compiled(carry)
    jax.effects_barrier()
    return carry


@pytest.mark.parametrize("scan", [False, True])
def test_csv_from_inside_jit_and_scan(scan, tmp_path):
    path = tmp_path / "run.csv"
    train(optalr.monitor(path), scan=scan)
    with path.open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["step"]))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["learning_rate"]) for row in rows] == [0.5, 0.5, 0.25, 0.25]
    assert [float(row["phase"]) for row in rows] == [0, 0, 1, 1]
    assert float(rows[0]["loss"]) == 2.0


def test_every_and_prefix_and_outside_jit():
    rows = []
    log = optalr.monitor(lambda step, row: rows.append((step, row)), every=2, prefix="opt/")
    _, state = train(log)
    log(state, 6, accuracy=0.5)
    log(state, 7)
    assert [step for step, _ in rows] == [2, 4, 6]
    assert rows[-1][1]["accuracy"] == 0.5
    assert rows[-1][1]["opt/learning_rate"] == 0.25


def test_tensorboard(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        train(optalr.monitor(writer))
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"learning_rate" in written
    assert b"phase" in written


def test_a_writer_like_clus():
    class Writer:
        def __init__(self):
            self.rows = []

        def write_scalars(self, step, scalars):
            self.rows.append((step, scalars))

    writer = Writer()
    train(optalr.monitor(writer, every=4))
    assert [(step, row["phase"]) for step, row in writer.rows] == [(4, 1.0)]


def test_csv_goes_on_after_a_resume_and_takes_new_columns(tmp_path):
    path = tmp_path / "run.csv"
    CSVWriter(path)(1, {"a": 1.0})
    again = CSVWriter(path)
    again(2, {"a": 2.0, "b": math.nan})
    again(3, {"b": 3.0})
    assert path.read_text().split() == ["step,a,b", "1,1.0,", "2,2.0,nan", "3,,3.0"]


def test_what_it_refuses():
    with pytest.raises(TypeError, match="writer must be"):
        optalr.monitor(3)
    with pytest.raises(ValueError, match="every"):
        optalr.monitor(print, every=0)
    with pytest.raises(TypeError, match="step is missing"):
        optalr.monitor(print)(optax.sgd(0.1).init(jnp.ones(2)))
