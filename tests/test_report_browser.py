"""The page in a real Chromium, from disk: what it loads, what a person can do, how it starts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import report_folders as make
from test_report_methods import named, run_of
from topd.methods import METHODS
from topd.report import write_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,800"
)
COUNT_PARSES = """
window.parses = 0;
const parse = JSON.parse;
JSON.parse = (...given) => { window.parses += 1; return parse(...given); };
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": COUNT_PARSES})
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """A thousand rollouts of 300 tokens, 250 prompts of four visits."""
    folder = tmp_path_factory.mktemp("big")
    return write_report(make.training(folder, rollouts=1000, length=300, prompts=250))


class Page:
    """What a person sees and does."""

    def __init__(self, driver: Any, path: Path, place: str = "") -> None:
        self.driver = driver
        driver.get("about:blank")
        driver.get_log("browser"), driver.get_log("performance")
        driver.get(path.as_uri() + place)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """As the page has it, shown or not."""
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def run(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        actions = webdriver.ActionChains(self.driver)
        for key in keys:
            actions.send_keys(key)
        actions.perform()

    def click(self, selector: str) -> None:
        self.all(selector)[0].click()

    def fill(self, name: str, text: str) -> None:
        """Type into a filter and wait until it has been applied."""
        field = self.driver.find_element(By.ID, name)
        self.run(
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            field,
            text,
        )
        self.driver.execute_async_script("setTimeout(arguments[0], 300)")

    def focused(self) -> str:
        return self.run("return document.activeElement.id || document.activeElement.tagName")

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        events = (json.loads(e["message"])["message"] for e in self.driver.get_log("performance"))
        return [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture
def page(browser, big) -> Page:
    return Page(browser, big, "#/forks/0")


# What it loads


@pytest.mark.parametrize("kind", ["training", "probe", "repair", "compare", "evaluation", "gate"])
def test_a_page_loads_nothing_but_itself_and_has_no_complaint(kind, browser, tmp_path):
    path = write_report(getattr(make, kind)(tmp_path))
    page = Page(browser, path)
    assert page.run("return document.documentElement.dataset.ready") == "true"
    for tab in page.all('[role="tab"]'):
        tab.click()
        shown = [p.get_attribute("id") for p in page.all('[role="tabpanel"]') if p.is_displayed()]
        assert shown == [tab.get_attribute("aria-controls")]
    assert [url for url in page.requests() if not url.startswith("data:")] == [path.as_uri()]
    assert page.complaints() == []


def test_scripts_that_are_not_the_page_s_own_do_not_run(page):
    page.run(
        "const s = document.createElement('script'); s.textContent = 'window.ran = true';"
        "document.body.append(s); const i = document.createElement('img'); i.src = 'http://127.0.0.1:9/x';"
        "document.body.append(i);"
    )
    assert page.run("return window.ran === undefined")
    assert any("Content Security Policy" in text for text in page.complaints())


def test_a_thousand_rollouts_start_from_their_index_alone(browser, big):
    """Only the list and the opened rollout are read; processor time stays under two seconds."""
    browser.execute_cdp_cmd("Performance.disable", {})
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    page = Page(browser, big)
    assert page.run("return window.parses") == 2  # what is said of the run, and the list
    page.click("#tab-forks")
    assert page.run("return window.parses") <= 6  # the rollout, and others of its prompt
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    spent = {metric["name"]: metric["value"] for metric in metrics}
    assert 0 < spent["TaskDuration"] < 2
    assert len(page.all("#rollouts li")) == 25
    assert page.text("#pages") == "page 1 of 40"


# A fork


def test_choosing_a_fork_shows_both_windows_threads_and_targets(page):
    page.click("#rollout .fork.real")
    assert page.text("#fork h3") == "◆ Candidate 1: real divergent point"
    assert page.text(".window.of-student .text") == " sum is two"
    assert page.text(".window.of-teacher .text") == " so the sum"
    assert len(page.all("path.thread")) == 3
    assert page.text(".side .target .word") == " two"
    assert page.text(".side .target") == " two75 % +1"
    assert "OT distance0.500" in page.text("#fork .facts")
    assert "token loss0.20 nats" in page.text("#fork .facts")
    assert page.run("return location.hash") == "#/forks/0/0"


def test_verdicts_differ_in_shape_and_words_not_only_in_colour(page):
    drawn = page.run(
        "return [...document.querySelectorAll('#rollout .fork')].map("
        "fork => getComputedStyle(fork, '::before').content)"
    )
    assert drawn[:2] == ['"◆1"', '"○2"']
    first, second, *_ = page.all("#rollout .fork")
    told = "Candidate 1, real divergent point, OT distance 0.500"
    assert first.get_attribute("aria-label").startswith(told)
    assert second.get_attribute("aria-label").startswith(
        "Candidate 2, false alarm, OT distance 0.100"
    )
    assert first.text in first.get_attribute("aria-label")  # as one says it to choose it


def test_a_thread_is_lit_with_its_two_tokens(page):
    page.click("#rollout .fork.real")
    row = page.all('.side.of-student li[data-i="1"]')[0]
    page.run("arguments[0].scrollIntoView()", row)
    webdriver.ActionChains(page.driver).move_to_element(row).perform()
    lit = page.all(".lit")
    assert len(lit) == 3
    assert {(e.get_attribute("data-i"), e.get_attribute("data-j")) for e in lit} == {
        ("1", "1"),
        ("1", None),
        (None, "1"),
    }


def test_a_token_tells_its_numbers(page):
    token = page.all('#rollout [data-at="3"]')[0]
    webdriver.ActionChains(page.driver).move_to_element(token).perform()
    assert page.text("#tip").split("\n") == [
        "token 3 of 300, id 3",
        "token loss 0.300 nats",
        "student: 60.7 % (log-prob -0.500 nats)",
        "teacher: 44.9 % (log-prob -0.800 nats)",
    ]


def test_loud_tokens_are_shaded_by_half_nats(page):
    shades = {
        at: page.all(f'#rollout [data-at="{at}"]')[0].get_attribute("class")
        for at in (0, 3, 10, 99)
    }
    assert [shades[at].split()[1] for at in shades] == ["h0", "h1", "h2", "h8"]


def test_the_same_prompt_is_shown_at_its_other_visits(page):
    assert [b.text for b in page.all(".visits .links button")] == [
        f"update {n}" for n in (0, 125, 250, 375)
    ]
    assert "share their first 4 tokens" in page.text(".visits .note")
    page.click("#rollout .fork.real")  # at token 2, inside the four that all visits share
    elsewhere = [b.text for b in page.all("#fork .elsewhere button")]
    assert elsewhere == ["update 125", "update 375"]
    page.click("#fork .elsewhere button")
    assert "update 125" in page.text("#rollout h2")


def test_a_chosen_fork_is_seen_where_no_teacher_scored_and_no_shading_is_spoken_of(
    browser, tmp_path
):
    """Its text had the colour of the paper, on the paper: the rule for tokens without shade won."""
    make.training(tmp_path, rollouts=1)
    row = {**make.rollout(0, 0, 0, range(9)), "teacher_logprobs": []}
    make.lines(tmp_path / "rollouts.jsonl", [row])
    page = Page(browser, write_report(tmp_path), "#/forks/0/0")
    ground = page.run(
        "return getComputedStyle(document.querySelector('[aria-pressed=true]')).backgroundColor"
    )
    assert ground == page.run("return getComputedStyle(document.body).color")
    assert "token loss" not in page.text("#fork .facts") + page.text(".legend")
    assert "candidate_loss2.5" in page.text("#fork .facts")


def test_tokens_of_an_environment_are_told_apart_from_the_student_s(browser, tmp_path):
    make.training(tmp_path, rollouts=1)
    row = make.rollout(0, 0, 0, range(9)) | {"replies": [[3, 5]]}
    make.lines(tmp_path / "rollouts.jsonl", [row])
    page = Page(browser, write_report(tmp_path), "#/forks/0")
    assert "9 tokens in 2 turns (7 by the student), ended by itself" in page.text("#rollout h2")
    assert "pale" not in page.text(".legend")  # no token counts less than once


def test_a_probe_s_rollouts_are_of_no_update(browser, tmp_path):
    page = Page(browser, write_report(make.probe(tmp_path)), "#/forks/0")
    assert "update" not in page.text("#rollouts") + page.text("#rollout h2")


def test_a_repair_shows_what_each_arm_makes_of_the_same_prefix(browser, tmp_path):
    page = Page(browser, write_report(make.repair(tmp_path)), "#/forks/1/0")
    arms = [arm.text for arm in page.all("#fork .arm")]
    assert arms == ["before OT distance 0.600", "opd OT distance 0.500", "topd OT distance 0.200"]


# Finding


def test_search_finds_and_marks_text(browser, tmp_path):
    words = [*make.WORDS[:-1], " unique<b>"]
    page = Page(browser, write_report(make.training(tmp_path, words=words, length=9)), "#/forks/0")
    wanted = [
        n
        for n, line in enumerate((tmp_path / "rollouts.jsonl").read_text().splitlines())
        if 9 in json.loads(line)["response_ids"]
    ]
    assert 0 < len(wanted) < 6
    page.fill("search", "Unique<B>")
    assert page.text("#count") == f"{len(wanted)} of 6 rollouts"
    assert [int(b.get_attribute("data-open")) for b in page.all("#rollouts button")] == wanted
    assert {hit.text.strip() for hit in page.all("#rollout .hit")} == {"unique<b>"}
    page.fill("search", "nowhere to be found")
    assert page.text("#count") == "0 of 6 rollouts"
    assert page.text("#rollout") == "No rollout passes the filters."


def test_filters_by_verdict_distance_and_prompt(page):
    page.fill("verdicts", "alarm")
    assert page.text("#count") == "500 of 1,000 rollouts"
    page.fill("low", "0.2")  # no false alarm is that far
    assert page.text("#count") == "0 of 1,000 rollouts"
    page.fill("verdicts", "real")
    page.fill("low", "1.49")  # 0.5 + n / 1000
    assert page.text("#count") == "10 of 1,000 rollouts"
    page.fill("high", "1.495")
    assert page.text("#count") == "6 of 1,000 rollouts"
    page.fill("low", "")
    page.fill("high", "")
    page.fill("prompt", "7")
    assert page.text("#count") == "4 of 1,000 rollouts"
    assert {b.text for b in page.all("#rollouts b")} == {"Prompt 7"}


def test_the_farthest_windows_come_first_if_asked(page):
    page.fill("order", "distance")
    assert page.all("#rollouts button")[0].get_attribute("data-open") == "999"


def test_pages_are_turned(page):
    page.click("#next-page")
    assert page.text("#pages") == "page 2 of 40"
    assert page.all("#rollouts button")[0].get_attribute("data-open") == "25"
    assert page.all("#next-page")[0].is_enabled()


# Keyboard


def test_everything_is_reached_by_keyboard_alone(browser, big):
    page = Page(browser, big)
    page.press(Keys.TAB)
    assert page.focused() == "tab-overview"
    page.press(Keys.ARROW_RIGHT)
    assert page.focused() == "tab-forks"
    page.press("j")  # a tab has the focus: the viewer's keys wait
    page.press(Keys.TAB, Keys.TAB)
    assert page.focused() == "search"
    page.press(*"sum is")
    page.driver.execute_async_script("setTimeout(arguments[0], 300)")
    page.press(Keys.ENTER)
    assert page.focused() == "rollout"
    page.press("j", "j", "k")
    assert page.run("return location.hash") == "#/forks/1"
    page.press(Keys.ENTER)
    assert page.run("return location.hash") == "#/forks/1/0"
    assert page.focused() == "fork"
    page.press(Keys.ESCAPE)
    assert page.run("return location.hash") == "#/forks/1"
    assert page.run("return document.activeElement.dataset.fork") == "0"
    page.press("j", "n", "n")
    assert page.run("return location.hash") == "#/forks/2/1"
    page.press("p")
    assert page.run("return location.hash") == "#/forks/2/0"
    page.press("/")
    assert page.focused() == "search"
    page.press("j")  # a letter like any other here
    assert page.run("return document.getElementById('search').value") in ("j", "sum isj")
    page.press(Keys.ESCAPE)
    assert page.focused() == "rollout"


def test_the_focus_can_be_seen(page):
    page.press(Keys.TAB)
    outline = page.run("return getComputedStyle(document.activeElement).outlineWidth")
    assert float(outline.removesuffix("px")) >= 2


# Looks


def test_dark_and_light_follow_the_system_until_chosen(page):
    def paper(scheme: str) -> str:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        return page.run("return getComputedStyle(document.body).backgroundColor")

    light, dark = paper("light"), paper("dark")
    assert light != dark
    page.click("#theme")
    assert (page.text("#theme"), paper("dark"), paper("light")) == ("Theme: light", light, light)
    page.click("#theme")
    assert (page.text("#theme"), paper("light"), paper("dark")) == ("Theme: dark", dark, dark)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme, page):
    """At least 4.5 to 1 (WCAG AA) for body, notes, marks, and tokens at every shade."""
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )

    def luminance(colour: list[float]) -> float:
        parts = [c / 255 for c in colour[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: list[float], other: list[float]) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    colours = page.run(
        "const probe = document.createElement('i'); document.body.append(probe);"
        "const read = name => { probe.style.color = `var(--${name})`;"
        "  return getComputedStyle(probe).color.match(/\\d+/g).map(Number); };"
        "return Object.fromEntries(arguments[0].map(n => [n, read(n)]))",
        ["paper", "card", "ink", "soft", "vermilion", "blue"],
    )
    for name in ("ink", "soft", "vermilion", "blue"):
        for ground in ("paper", "card"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    names = [*(f"h{n}" for n in range(9)), *(f"c{n}" for n in range(1, 5))]
    shades = page.run(
        "const box = document.querySelector('#rollout .text');"
        "return arguments[0].map(name => {"
        "  const token = document.createElement('span'); token.className = `t ${name}`;"
        "  box.append(token); return getComputedStyle(token).backgroundColor; })",
        names,
    )
    for name, shade in zip(names, shades, strict=True):
        *colour, alpha = (*(float(x) for x in re.findall(r"[\d.]+", shade)), 1.0)[:4]
        mixed = [alpha * c + (1 - alpha) * p for c, p in zip(colour, colours["paper"], strict=True)]
        assert contrast(colours["ink"], mixed) >= 4.5, name
    assert len(set(shades)) == len(names)


def test_a_narrow_screen_does_not_scroll_sideways(page):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False},
    )
    page.click("#rollout .fork.real")
    width = page.run("return document.documentElement.scrollWidth")
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 390


# Every method and every kind of run


@contextmanager
def looked_at(driver: Any, width: int, scheme: str) -> Iterator[None]:
    """In a window of this width, on a system that is light or dark."""
    sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    yield
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def fits(page: Page, *, width: int) -> bool:
    """Whether no tab of the page is wider than the screen, with a fork chosen if there is one."""
    found = []
    for tab in page.all('[role="tab"]'):
        tab.click()
        found.append(page.run("return document.documentElement.scrollWidth") <= width)
    if forks := page.all("#rollout .fork"):
        page.click("#tab-forks")
        forks[0].click()
        found.append(page.run("return document.documentElement.scrollWidth") <= width)
    return all(found) and bool(found)


@pytest.mark.parametrize(
    "kind", [*METHODS, "warmstart", "probe", "repair", "compare", "eval", "gate"]
)
def test_every_page_fits_its_screen_and_says_what_the_records_say(kind, browser, tmp_path):
    """Wide and narrow, light and dark. Of a method, every sentence that guidance.jsonl asks for."""
    folder, records = tmp_path / "run", []
    if kind in METHODS:
        records = run_of(kind, folder)
    elif kind == "warmstart":
        make.training(folder)
        make.lines(
            folder / "metrics.jsonl",
            [{"step": n, "loss": 1.0, "forward_kl": 0.3 / n} for n in (1, 2)],
        )
    else:
        getattr(make, {"eval": "evaluation"}.get(kind, kind))(folder)
    path = write_report(folder)
    place = "#/forks/0" if (folder / "rollouts.jsonl").exists() else ""
    page = Page(browser, path, place)
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
        with looked_at(browser, width, scheme):
            assert fits(page, width=width), (width, scheme)
    for number, record in enumerate(records):
        page = Page(browser, path, f"#/forks/{number}")
        shown = " ".join(page.text("#rollout").split())
        for piece in named(record):
            assert piece in shown.replace("weighted", "count")
        assert ("Soft targets at" in shown) == bool(record["targets"])
        learns = "the student learns" in shown or "as well, on the rollout's own" in shown
        assert learns == bool(record["branches"])
    assert page.complaints() == []


@pytest.mark.parametrize(("ids", "answer"), [([1, 2, 3], True), ([], False)])
def test_only_an_answer_that_is_there_was_not_written_by_the_student(
    ids, answer, browser, tmp_path
):
    """Neither has log-probs: one that the student imitates, and a rollout of no token."""
    make.training(tmp_path, rollouts=1)
    row = {**make.rollout(0, 0, 0, ids), "logprobs": []}
    make.lines(tmp_path / "rollouts.jsonl", [row])
    make.lines(tmp_path / "guidance.jsonl", [])
    page = Page(browser, write_report(tmp_path), "#/forks/0")
    assert ("did not write this" in page.text("#rollout")) == answer


# Untrusted text


def test_hostile_text_runs_nothing_and_is_shown(browser, tmp_path):
    path = make.training(tmp_path, words=make.HOSTILE, length=len(make.HOSTILE))
    page = Page(browser, write_report(path), "#/forks/0/0")
    shown = page.text("#rollout > .text")
    assert "<script>alert(1)</script>" in shown
    assert "<img src=x onerror=" in shown
    assert "⟨U+202E⟩gnp.exe" in shown
    assert "(100,000 characters)" in shown
    for script in ("openRollout(1, 0)", "openRollout(2, 0)", "showTab('settings')"):
        page.run(script)
    assert page.all("img, iframe, object, embed") == []
    assert "owned" not in page.driver.title
    assert page.complaints() == []
