"""docs/explorer in headless Chromium: its numbers against spoloss, its sliders, its plots."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from selenium import webdriver
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from helpers.pages import ROOT
from spoloss import DPO, SPO, MarginLoss, Squared, dpo_prob_grad, spo_prob_grad

EXPLORER = ROOT / "docs" / "explorer"
PAGE = (EXPLORER / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """Skips where no browser is installed; under CI a missing one is a failure."""
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((path for name in names if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = "needs Chromium and ChromeDriver (apt-get install chromium chromium-driver)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless", "--disable-gpu", "--no-first-run"):
        options.add_argument(flag)
    if os.geteuid() == 0:  # Chromium's sandbox refuses to run as root
        options.add_argument("--no-sandbox")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser: WebDriver) -> Iterator[WebDriver]:
    show(browser)
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def show(browser: WebDriver, **settings: object) -> None:
    """Open the page at these settings."""
    browser.get(PAGE + "#" + "&".join(f"{name}={value}" for name, value in settings.items()))


def curves(browser: WebDriver, plot: str) -> dict[str, str]:
    """What a plot draws: the SVG path of each loss."""
    paths = browser.find_elements(By.CSS_SELECTOR, f"#{plot} path")
    return {path.get_attribute("class").split()[1]: path.get_attribute("d") for path in paths}


def row(browser: WebDriver, name: str) -> list[float]:
    """The numbers that the page shows for one loss."""
    cells = browser.find_elements(By.CSS_SELECTOR, f"#{name} td")
    return [float(cell.text.replace("Infinity", "inf")) for cell in cells]


def curvature(loss: MarginLoss, margin: float, beta: float) -> float:
    at = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss.value(at, beta), at, create_graph=True)
    (second,) = torch.autograd.grad(slope, at)
    return second.item()


def by_rejected_probability(name: str, margin: float, settings: dict[str, Any]) -> float:
    """pi_ref * dl/dpi_l where the chosen completion and the reference have log-probability 0."""
    beta, gap = settings["beta"], settings["rewardGap"]
    if name == "squared":
        return -2 * (margin - gap / beta) * math.exp(margin)
    zero, rejected = np.zeros(1), np.array([-margin])
    if name == "dpo":
        grad, options = dpo_prob_grad, {"label_smoothing": settings["labelSmoothing"]}
    else:
        grad, options = spo_prob_grad, {"linear_below": settings["linearBelow"], "reward_gap": gap}
    sign, log_abs = grad(zero, rejected, zero, zero, beta=beta, **options).policy_rejected
    return (sign * np.exp(log_abs)).item()


SETTINGS = [
    {"beta": 0.1, "rewardGap": 1, "linearBelow": None, "labelSmoothing": 0},
    {"beta": 0.37, "rewardGap": 2.5, "linearBelow": -1.5, "labelSmoothing": 0.2},
    {"beta": 3, "rewardGap": 0.4, "linearBelow": 0.5, "labelSmoothing": 0.45},
]


@pytest.mark.parametrize("targets", [-14.0, -3.3, 0.0, 0.7, 1.0, 4.0, 14.5])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: f"beta={settings['beta']}")
def test_the_numbers_under_the_cursor_are_those_of_spoloss(
    page: WebDriver, settings: dict[str, Any], targets: float
) -> None:
    guard, beta = settings["linearBelow"], settings["beta"]
    margin = targets * settings["rewardGap"] / beta
    fragment = {**settings, "linearBelow": guard or -1, "guarded": str(guard is not None).lower()}
    show(page, **fragment, reach=300, margin=margin)
    losses: dict[str, tuple[MarginLoss, float]] = {
        "spo": (SPO(guard), beta / settings["rewardGap"]),
        "dpo": (DPO(settings["labelSmoothing"]), beta),
        "squared": (Squared(), beta / settings["rewardGap"]),
    }
    h = np.float64(margin)
    for name, (loss, scale) in losses.items():
        numbers = [
            float(loss.value(h, scale)),
            float(loss.slope(h, scale)),
            curvature(loss, margin, scale),
            by_rejected_probability(name, margin, settings),
        ]
        assert row(page, name) == pytest.approx(numbers, rel=1e-6, abs=1e-14), name


def test_the_twins_are_those_of_spoloss(page: WebDriver) -> None:
    # Settings that this part of the page leaves aside are not at their defaults.
    show(page, beta=0.2, factor=2.5, margin=11, rewardGap=2, labelSmoothing=0.3)
    h, scale, beta = np.float64(11), 2 / 2.5, 0.2 * 2.5
    spo = [SPO().value(h, 0.2), SPO().slope(h, 0.2)]
    dpo = [scale * (DPO().value(h, beta) - math.log(2)), scale * DPO().slope(h, beta)]
    assert row(page, "twin-spo") == pytest.approx(spo, rel=1e-6)
    assert row(page, "twin-dpo") == pytest.approx(dpo, rel=1e-6)


@pytest.mark.parametrize(
    ("slider", "moved"),
    [
        ("beta", {"spo", "dpo", "squared"}),
        ("rewardGap", {"spo", "squared"}),
        ("linearBelow", {"spo"}),
        ("labelSmoothing", {"dpo"}),
    ],
)
def test_a_slider_moves_the_curves_that_depend_on_it(
    page: WebDriver, slider: str, moved: set[str]
) -> None:
    show(page, guarded="true")
    before = curves(page, "slope")
    page.find_element(By.ID, slider).send_keys(Keys.ARROW_RIGHT * 8)
    after = curves(page, "slope")
    assert {name for name in ("spo", "dpo", "squared") if before[name] != after[name]} == moved


def test_the_address_keeps_the_settings(page: WebDriver) -> None:
    page.find_element(By.ID, "beta").send_keys(Keys.PAGE_UP)
    address, numbers = page.current_url, row(page, "squared")
    show(page)
    assert row(page, "squared") != numbers
    page.get("about:blank")
    page.get(address)
    assert row(page, "squared") == numbers


def test_the_page_loads_nothing_from_elsewhere() -> None:
    for path in EXPLORER.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|\burl\(|@import|\bfetch\(|XMLHttpRequest", text), path.name
