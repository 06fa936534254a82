"""docs/explorer in headless Chromium: its sliders, its plots, and its numbers against spoloss."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from helpers.pages import ROOT
from spoloss import DPO, SPO, MarginLoss, Squared, dpo_prob_grad, spo_prob_grad

EXPLORER = ROOT / "docs" / "explorer"
PAGE = (EXPLORER / "index.html").as_uri()
LOSSES = ("spo", "dpo", "squared")
MARGIN_PLOTS = ("value", "slope", "curvature")


def show(browser: WebDriver, width: int = 1200, height: int = 900, **settings: object) -> None:
    """Open the page at these settings."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(PAGE + "#" + "&".join(f"{name}={value}" for name, value in settings.items()))


def curves(browser: WebDriver, plot: str) -> dict[str, str]:
    """What a plot draws: the SVG path of each loss."""
    paths = browser.find_elements(By.CSS_SELECTOR, f"#{plot} path")
    return {path.get_attribute("class").split()[1]: path.get_attribute("d") for path in paths}


def row(browser: WebDriver, name: str) -> list[float]:
    """The numbers that the page shows for one loss."""
    cells = browser.find_elements(By.CSS_SELECTOR, f"#{name} td")
    return [float(cell.text.replace("Infinity", "inf")) for cell in cells]


@pytest.fixture
def page(browser: WebDriver) -> Iterator[WebDriver]:
    show(browser)
    yield browser
    errors = [entry["message"] for entry in browser.get_log("browser")]
    assert errors == []


# ------------------------------------------------------------------------------------ numbers


def curvature(loss: MarginLoss, margin: float, beta: float) -> float:
    at = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss.value(at, beta), at, create_graph=True)
    (second,) = torch.autograd.grad(slope, at)
    return second.item()


def by_rejected_probability(name: str, margin: float, settings: dict[str, Any]) -> float:
    """pi_ref * dl/dpi_l where the chosen answer and the reference have log-probability 0."""
    zero, rejected = np.zeros(1), np.array([-margin])
    if name == "squared":
        h = margin - settings["rewardGap"] / settings["beta"]
        return -2 * h * math.exp(margin)
    if name == "dpo":
        options = {"label_smoothing": settings["labelSmoothing"]}
        gradient = dpo_prob_grad(zero, rejected, zero, zero, beta=settings["beta"], **options)
    else:
        options = {"linear_below": settings["linearBelow"], "reward_gap": settings["rewardGap"]}
        gradient = spo_prob_grad(zero, rejected, zero, zero, beta=settings["beta"], **options)
    sign, log_abs = gradient.policy_rejected
    return (sign * np.exp(log_abs)).item()


def expected(margin: float, settings: dict[str, Any]) -> dict[str, list[float]]:
    beta, gap = settings["beta"], settings["rewardGap"]
    losses: dict[str, tuple[MarginLoss, float]] = {
        "spo": (SPO(settings["linearBelow"]), beta / gap),
        "dpo": (DPO(settings["labelSmoothing"]), beta),
        "squared": (Squared(), beta / gap),
    }
    h = np.float64(margin)
    return {
        name: [
            float(loss.value(h, b)),
            float(loss.slope(h, b)),
            curvature(loss, margin, b),
            by_rejected_probability(name, margin, settings),
        ]
        for name, (loss, b) in losses.items()
    }


SETTINGS = [
    {"beta": 0.1, "rewardGap": 1, "linearBelow": None, "labelSmoothing": 0},
    {"beta": 0.37, "rewardGap": 2.5, "linearBelow": -1.5, "labelSmoothing": 0.2},
    {"beta": 3, "rewardGap": 0.4, "linearBelow": 0.5, "labelSmoothing": 0.45},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: f"beta={settings['beta']}")
def test_the_numbers_under_the_cursor_are_those_of_spoloss(
    page: WebDriver, settings: dict[str, Any]
) -> None:
    guard = settings["linearBelow"]
    fragment = {**settings, "linearBelow": guard or -1, "guarded": str(guard is not None).lower()}
    for margin in (-40.0, -3.3, 0.0, 0.7, 4.0, 10.0, 38.5):
        show(page, **fragment, reach=50, margin=margin)
        for name, numbers in expected(margin, settings).items():
            assert row(page, name) == pytest.approx(numbers, rel=1e-6, abs=1e-14), (name, margin)


@pytest.mark.parametrize("factor", [4, 2.5])
def test_the_twins_are_those_of_spoloss(page: WebDriver, factor: float) -> None:
    for margin in (-6.0, 0.0, 11.0):
        # Settings that this part of the page leaves aside are not at their defaults.
        show(page, beta=0.2, factor=factor, margin=margin, rewardGap=2, labelSmoothing=0.3)
        h, scale, beta = np.float64(margin), 2 / factor, 0.2 * factor
        assert row(page, "twin-spo") == pytest.approx(
            [SPO().value(h, 0.2), SPO().slope(h, 0.2)], rel=1e-6, abs=1e-300
        )
        assert row(page, "twin-dpo") == pytest.approx(
            [scale * (DPO().value(h, beta) - math.log(2)), scale * DPO().slope(h, beta)], rel=1e-6
        )


# ------------------------------------------------------------------------------------- curves


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
    plots = ("slope", "vanishing") if slider == "linearBelow" else ("value", "slope", "vanishing")
    before = {plot: curves(page, plot) for plot in plots}
    for _ in range(8):
        page.find_element(By.ID, slider).send_keys(Keys.ARROW_RIGHT)
    after = {plot: curves(page, plot) for plot in plots}
    for plot in plots:
        assert set(before[plot]) == set(LOSSES)
        # linear_below acts at negative margins alone, and there the rejected answer gains.
        expect = set() if (slider, plot) == ("linearBelow", "vanishing") else moved
        changed = {name for name in LOSSES if before[plot][name] != after[plot][name]}
        assert changed == expect, plot


def test_linear_below_acts_only_where_it_is_switched_on(page: WebDriver) -> None:
    before = curves(page, "value")
    page.find_element(By.ID, "guarded").click()
    assert curves(page, "value")["spo"] != before["spo"]
    page.find_element(By.ID, "guarded").click()
    assert curves(page, "value") == before


def test_the_factor_moves_the_scaled_dpo_alone(page: WebDriver) -> None:
    before = curves(page, "twin-value")
    page.find_element(By.ID, "factor").send_keys(Keys.PAGE_UP)
    after = curves(page, "twin-value")
    assert after["spo"] == before["spo"]
    assert after["dpo"] != before["dpo"]


def test_a_curve_passes_through_its_number(page: WebDriver) -> None:
    show(page, beta=0.1, reach=30, margin=10)
    zero = float(
        page.find_element(By.CSS_SELECTOR, "#value line.zero[x1='46']").get_attribute("y1")
    )
    unit = page.execute_script(
        "return [...document.querySelectorAll('#value .grid text')]"
        ".find((t) => t.textContent === '1').getAttribute('y') - 4"
    )
    circle = page.find_element(By.CSS_SELECTOR, "#value circle.spo")
    drawn = (zero - float(circle.get_attribute("cy"))) / (zero - unit)
    assert drawn == pytest.approx(-1 / math.e, abs=1e-3)


# ------------------------------------------------------------------------------------- cursor


def test_a_click_in_a_plot_moves_the_cursor(page: WebDriver) -> None:
    for plot in MARGIN_PLOTS:
        show(page, reach=20, margin=-20)
        picture = page.find_element(By.CSS_SELECTOR, f"#{plot} > svg")
        frame = page.find_element(By.CSS_SELECTOR, f"#{plot} .window")
        width = float(frame.get_attribute("width"))
        centre = float(frame.get_attribute("x")) + width / 2 - picture.size["width"] / 2
        ActionChains(page).move_to_element_with_offset(
            picture, round(centre + width / 4), 0
        ).click().perform()
        margin = float(page.find_element(By.ID, "at-margin").text)
        assert margin == pytest.approx(10, abs=40 / width)


def test_every_setting_is_reached_and_moved_by_keyboard(page: WebDriver) -> None:
    show(page, guarded="true")
    reached = {}
    page.find_element(By.TAG_NAME, "body").click()
    for _ in range(30):
        ActionChains(page).send_keys(Keys.TAB).perform()
        element = page.switch_to.active_element
        if element.get_attribute("type") == "range":
            before = element.get_attribute("aria-valuetext")
            element.send_keys(Keys.ARROW_UP)
            reached[element.get_attribute("id")] = element.get_attribute("aria-valuetext") != before
    settings = ("beta", "rewardGap", "linearBelow", "labelSmoothing", "reach", "margin", "factor")
    assert reached == dict.fromkeys(settings, True)


def test_the_address_keeps_the_settings(page: WebDriver) -> None:
    page.find_element(By.ID, "beta").send_keys(Keys.PAGE_UP)
    address = page.current_url
    numbers = row(page, "squared")
    show(page)
    assert row(page, "squared") != numbers
    page.get("about:blank")
    page.get(address)
    assert row(page, "squared") == numbers


# --------------------------------------------------------------------------------------- page


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_nothing_sticks_out_sideways(page: WebDriver, width: int) -> None:
    show(page, width=width)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


def test_dark_where_the_reader_wants_it(page: WebDriver) -> None:
    colours = set()
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        script = "return getComputedStyle(document.body).backgroundColor"
        colours.add((scheme, page.execute_script(script)))
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colours == {("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 30)")}


def test_the_page_is_small_and_loads_nothing_from_elsewhere(page: WebDriver) -> None:
    assert sum(path.stat().st_size for path in EXPLORER.iterdir()) < 300_000
    script = "return [...document.querySelectorAll('[src], link')].map((e) => e.src || e.href)"
    loaded = page.execute_script(script)
    assert len(loaded) == 5  # style, three scripts, and an empty icon
    assert all(url.startswith((EXPLORER.as_uri(), "data:")) for url in loaded)
    for path in EXPLORER.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|\burl\(|@import|\bfetch\(|XMLHttpRequest", text), path.name
