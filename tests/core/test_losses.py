"""The loss objects against 60-digit arithmetic, autograd, differences and closed forms."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import checks, wrong
from helpers.backends import BACKENDS, Backend
from helpers.oracles import LOSSES, Oracle, spo
from spoloss import DPO, SPO

NAMES = list(LOSSES)
DTYPES = [np.float32, np.float64]


def dense(dtype: type, limit: float) -> np.ndarray:
    """Where the losses bend, overflow and vanish; and a decade grid over the dtype's range."""
    info = np.finfo(dtype)
    decades = np.logspace(np.log10(float(info.tiny)), np.log10(float(info.max)) - 0.1, 60)
    points = [
        np.linspace(-limit, limit, 501),
        np.linspace(-3.0, 3.0, 301),
        decades,
        -decades,
        [0.0],
    ]
    return np.concatenate(points).astype(dtype)


def margins(dtype: type) -> st.SearchStrategy[np.ndarray]:
    width = 32 if dtype is np.float32 else 64
    everywhere = st.floats(width=width, allow_nan=False, allow_infinity=False)
    nearby = st.floats(-100.0, 100.0, width=width)
    lists = st.lists(everywhere | nearby, min_size=1, max_size=12)
    # Repeated to one length, as JAX compiles every operation anew when the length changes.
    return lists.map(lambda values: np.resize(np.array(values, dtype=dtype), 12))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_range_on_a_grid(name: str, dtype: type, backend: Backend) -> None:
    loss, oracle = LOSSES[name]
    grid = dense(dtype, 95.0 if dtype is np.float32 else 740.0)
    checks.check_range(loss, oracle, backend, grid, beta=1.0)
    checks.check_range(loss, oracle, backend, grid[::5], beta=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_range_anywhere(name: str, dtype: type) -> None:
    loss, oracle = LOSSES[name]

    @given(
        margins(dtype),
        st.sampled_from(checks.BETAS),
        st.sampled_from(["numpy", "torch", "jax", "mlx"]),
    )
    def run(values: np.ndarray, beta: float, backend: str) -> None:
        checks.check_range(loss, oracle, BACKENDS[backend], values, beta)

    run()


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name: str) -> None:
    loss, oracle = LOSSES[name]
    checks.check_torch_autograd(loss, oracle)
    checks.check_jax_grad(loss, oracle)
    checks.check_mlx_grad(loss, oracle)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "mlx"])
def test_no_nan_at_infinity(name: str, library: str) -> None:
    checks.check_no_nan_at_infinity(LOSSES[name][0], BACKENDS[library])


def test_objects_are_plain_values() -> None:
    for loss, _ in LOSSES.values():
        assert pickle.loads(pickle.dumps(loss)) == loss
        assert hash(loss) == hash(pickle.loads(pickle.dumps(loss)))


@pytest.mark.parametrize("x0", [1.0, 2.0, float("nan"), float("inf"), -700.0])
def test_linear_below_out_of_range(x0: float) -> None:
    with pytest.raises(ValueError, match=r"linear_below must lie in \(-700, 1\), got"):
        SPO(linear_below=x0)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, float("nan")])
def test_label_smoothing_out_of_range(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\), got"):
        DPO(label_smoothing=smoothing)


def test_parameters_must_be_numbers() -> None:
    with pytest.raises(TypeError, match="linear_below must be a number or None, got str"):
        SPO(linear_below="-1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="label_smoothing must be a number, got NoneType"):
        DPO(label_smoothing=None)  # type: ignore[arg-type]


def _range(loss: object, dtype: type, backend: str = "numpy", beta: float = 1.0) -> None:
    checks.check_range(loss, spo, BACKENDS[backend], dense(dtype, 60.0), beta)


def _with_oracle(check: object, oracle: Oracle = spo) -> object:
    return lambda loss: check(loss, oracle)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("check", "loss"),
    [
        (functools.partial(_range, dtype=np.float32), wrong.FlippedSign()),
        (functools.partial(_range, dtype=np.float32, beta=0.1), wrong.LostBeta()),
        (functools.partial(_range, dtype=np.float64), wrong.SinglePrecision()),
        (functools.partial(_range, dtype=np.float64, backend="torch"), wrong.SinglePrecision()),
        (functools.partial(_range, dtype=np.float64), wrong.WrongPolynomial()),
        (functools.partial(_range, dtype=np.float32), wrong.Clamped()),
        (_with_oracle(checks.check_torch_autograd), wrong.StrayDetach()),
        (_with_oracle(checks.check_torch_autograd), wrong.LostBeta()),
        (_with_oracle(checks.check_torch_autograd), wrong.WrongPolynomial()),
        (_with_oracle(checks.check_jax_grad), wrong.StrayDetach()),
        (_with_oracle(checks.check_jax_grad), wrong.LostBeta()),
        (_with_oracle(checks.check_mlx_grad), wrong.StrayDetach()),
        (_with_oracle(checks.check_mlx_grad), wrong.LostBeta()),
        *(
            (functools.partial(checks.check_no_nan_at_infinity, backend=b), wrong.Naive())
            for b in (BACKENDS["numpy"], BACKENDS["torch"], BACKENDS["jax"], BACKENDS["mlx"])
        ),
    ],
)
def test_every_check_catches_a_wrong_loss(check: object, loss: object) -> None:
    with pytest.raises(AssertionError):
        check(loss)  # type: ignore[operator]
