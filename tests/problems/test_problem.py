import dataclasses

import pytest

from cbp_jax.problems import slowly_changing_regression


def test_an_unknown_loss_is_refused():
    problem = slowly_changing_regression()
    assert dataclasses.replace(problem, loss="softmax_cross_entropy").loss == "softmax_cross_entropy"
    with pytest.raises(ValueError, match="loss must be one of softmax_cross_entropy, squared_error; got 'l2'"):
        dataclasses.replace(problem, loss="l2")
