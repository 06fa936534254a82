"""The numbers that both wings take: what passes, and what is refused in which words."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from spoloss._options import check_head_options, check_nll_weight

RIGHT = {"softcap": None, "logit_scale": 1.0, "temperature": 1.0, "chunk_size": None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 30.0, "logit_scale": -0.5, "temperature": 2, "chunk_size": 1},
        {"softcap": np.float32(30.0), "logit_scale": np.int64(2), "chunk_size": np.int32(7)},
    ],
)
def test_what_passes(options: dict[str, Any]) -> None:
    check_head_options(**{**RIGHT, **options})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("temperature", 0.0, ValueError, "temperature must be positive and finite, got 0.0"),
        ("temperature", -1, ValueError, "temperature must be positive and finite, got -1"),
        ("temperature", math.nan, ValueError, "temperature must be positive and finite, got nan"),
        ("temperature", True, TypeError, "temperature must be a number, got bool"),
        ("temperature", np.ones(1), TypeError, "temperature must be a number, got ndarray"),
        ("softcap", 0.0, ValueError, "softcap must be positive and finite, got 0.0"),
        ("softcap", math.inf, ValueError, "softcap must be positive and finite, got inf"),
        ("softcap", "30", TypeError, "softcap must be a number, got str"),
        ("logit_scale", 0.0, ValueError, "logit_scale must be finite and not 0, got 0.0"),
        ("logit_scale", math.inf, ValueError, "logit_scale must be finite and not 0, got inf"),
        ("logit_scale", None, TypeError, "logit_scale must be a number, got NoneType"),
        ("chunk_size", 0, ValueError, "chunk_size must be a positive number of tokens, got 0"),
        ("chunk_size", 1.5, TypeError, "chunk_size must be an integer, got float"),
        ("chunk_size", True, TypeError, "chunk_size must be an integer, got bool"),
    ],
)
def test_what_is_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        check_head_options(**{**RIGHT, name: value})


def test_nll_weight() -> None:
    check_nll_weight(0.0)
    check_nll_weight(np.float64(2.0))
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"must be finite and not negative, got {value}"):
            check_nll_weight(value)
    for wrong in (True, None, np.ones(2)):
        with pytest.raises(TypeError, match=f"must be a number, got {type(wrong).__name__}"):
            check_nll_weight(wrong)
