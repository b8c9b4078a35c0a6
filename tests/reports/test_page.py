"""The page in a browser: it says what the arrays hold, filters, obeys keys, runs no text."""

import colorsys
import itertools
import math

import numpy as np
import pytest
from browsing import cpu_seconds, wait_for_rollouts
from rollout_records import HOSTILE, VALUES, record

from spark_jax.reports import page
from spark_jax.reports.benchmarks import Table
from spark_jax.reports.page import Line, Page, Panel, Rollout, Section
from spark_jax.rewards.monitor import Alarm

LINES = (
    Line("a", (1, 2, 3), (0.25, 0.5, None), (0.125, None, None), (0.375, None, None)),
    Line("b", (2, 4), (1.0, 2.0)),
)
MOST_BANDS = MOST_ALARMS = 6
PANELS = (Panel("reward", LINES), Panel("entropy", LINES[1:]))
TABLE = Table("Stage <I>", ("method", "N"), (("stage I: x", ""), ("single", "0.5")), ("A note.",))


@pytest.fixture(scope="module")
def made():
    return record(groups=4, size=4)


@pytest.fixture(scope="module")
def file(made, tmp_path_factory):
    whole = Page(
        title="runs & <b>more</b>",
        facts=("two runs", "seed 0"),
        sections=(
            Section("RL", ("a", "b"), (Panel("reward", LINES), Panel("entropy", LINES[1:]))),
        ),
        tables=(TABLE,),
        alarms={"a, seed 0": [Alarm("step_inflation", 3, 5, 2, 0.5, 0.3)], "b": []},
        rollouts=(Rollout("a, step 1", record(groups=1)), Rollout("a, step 7", made)),
    )
    return page.write(tmp_path_factory.mktemp("page") / "page.html", whole)


@pytest.fixture(scope="module")
def opened(browser, file):
    with browser(file, tab="rollouts") as page:
        yield page


@pytest.fixture
def tab(opened):
    """The second rollouts of the page, as they come."""
    opened.mouse.move(5, 5)
    opened.reload()
    wait_for_rollouts(opened)
    choose(opened, "Rollouts", "1")
    opened.wait_for_selector(".problems li:nth-child(4)")
    return opened


def choose(tab, menu, value):
    tab.select_option(f"select[aria-label='{menu}']", value)


def texts(tab, selector):
    return tab.locator(selector).all_inner_texts()


def shown_problem(tab):
    return tab.inner_text(".problem h3")


def tooltip(tab):
    return {
        row.get_attribute("data-value"): row.locator("td").nth(1).inner_text()
        for row in tab.locator("#tip tr").all()
    }


# --- tokens --------------------------------------------------------------------------------------


def test_hovering_shows_the_numbers_of_the_arrays(tab, made):
    values = made.split_values()
    for card, token in itertools.product((0, 3), (0, 5, 11)):
        tab.hover(f".card:nth-child({card + 1}) .token >> nth={token}")
        shown = tooltip(tab)
        assert list(shown) == list(VALUES)
        for name, text in shown.items():
            assert float(text) == pytest.approx(values[card][name][token], rel=5e-4)
        response = made.responses[card]
        assert tab.inner_text("#tip pre") == f'"{response.tokens[token]}"'
        assert f"token {token + 1} of {len(response.tokens)}" in tab.inner_text("#tip .where")
    tab.mouse.move(5, 5)
    assert tab.is_hidden("#tip")


def test_tokens_are_coloured_by_the_chosen_value(tab, made):
    """The side of 0 and the share of the group's largest number."""
    assert tab.input_value("select[aria-label='Colour tokens by']") == "masked_step"  # trained with
    values = made.split_values()[:4]
    for name in ("global_step", "logprob"):
        choose(tab, "Colour tokens by", name)
        largest = max(np.abs(row[name]).max() for row in values)
        for token in range(0, 12, 3):
            style = tab.locator(".card:nth-child(2) .token").nth(token).get_attribute("style")
            value = values[1][name][token]
            assert ("positive" if value > 0 else "negative") in style
            share = round(abs(value) / largest * 85)
            assert any(f"{share + near}%" in style for near in (-1, 0, 1))
        assert tab.locator("#tip, .scale").first.is_visible()
        assert f"{largest:.4g}" in tab.inner_text(".scale")


def test_steps_carry_their_verdicts_and_whether_they_are_true(tab, made):
    for g, response in enumerate(made.responses[:4]):
        steps = tab.locator(f".card:nth-child({g + 1}) .step")
        assert steps.count() == 4
        for k, (verdict, truth) in enumerate(
            zip(response.verdicts, response.step_labels, strict=True)
        ):
            classes = steps.nth(k).get_attribute("class").split()
            assert classes[1] == {1: "correct", -1: "incorrect", 0: "unjudged"}[verdict]
            assert ("mistaken" in classes) == (verdict != 0 and (verdict > 0) != truth)


def test_badges_tell_reward_verdict_truth_checks_and_flags(tab, made):
    for g, response in enumerate(made.responses[:4]):
        badges = texts(tab, f".card:nth-child({g + 1}) .badge")
        assert badges[:4] == [
            f"#{g + 1}",
            f"reward {response.reward:g}",
            "verdict Yes" if response.overall else "verdict No",
            "✓ right" if response.correct else "✗ wrong",
        ]
        kept = response.checks["nothing_after_answer"]
        assert f"{'✓' if kept else '✗'} nothing after answer" in badges
        assert ("✗ cut off" in badges) == (not response.finished)
        alarms = [f"⚠ {flag.replace('_', ' ')}" for flag in response.flags]
        assert [badge for badge in badges if badge.startswith("⚠")] == alarms


def test_verifications_open_on_a_click_the_chosen_one_first(tab, made):
    response = made.responses[1]
    tab.click(".card:nth-child(2) .step >> nth=0")
    rows = tab.locator("#verifications tbody tr")
    assert rows.count() == 3
    assert rows.nth(0).get_attribute("aria-selected") == "true"
    assert tab.inner_text("#verifications pre") == response.verifications[0].text
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    assert cells[0][-2:] == ["single", ""]
    assert cells[1][-2:] == ["step consistency", ""]
    assert cells[2][1] == "–"
    assert cells[2][-1] == "malformed step"
    assert cells[1][2] == "0.25"
    signs = ["✓" if verdict else "✗" for verdict in response.verifications[0].verdicts]
    assert cells[0][3:7] == signs
    rows.nth(2).click()
    assert tab.inner_text("#verifications pre") == "no sense"
    tab.keyboard.press("Escape")
    assert tab.is_hidden("#verifications")


# --- filters and keyboard ------------------------------------------------------------------------


def judged_against(response):
    return any(
        v != 0 and (v > 0) != truth
        for v, truth in zip(response.verdicts, response.step_labels, strict=True)
    )


KINDS = {
    ("Reward", "reward above 0"): lambda r: r.reward > 0,
    ("Reward", "reward 0"): lambda r: r.reward == 0,
    ("Verdict disagreement", "Yes for a wrong answer"): lambda r: r.overall and not r.correct,
    ("Verdict disagreement", "No for a right answer"): lambda r: not r.overall and r.correct,
    ("Verdict disagreement", "overall against its own steps"): lambda r: (
        r.overall == any(v < 0 for v in r.verdicts)
    ),
    ("Verdict disagreement", "a step against the truth"): judged_against,
    ("Hacking alarms", "any alarm"): lambda r: bool(r.flags),
    ("Hacking alarms", "verdict gaming"): lambda r: "verdict_gaming" in r.flags,
}


def test_filters_show_exactly_what_they_say(tab, made):
    for (menu, kind), holds in KINDS.items():
        wanted = [[i for i, r in enumerate(g.responses) if holds(r)] for g in made.groups]
        problems = [g.problem_id for g, rows in zip(made.groups, wanted, strict=True) if rows]
        count = sum(map(len, wanted))
        assert 0 < count < 16, kind  # or the test would show nothing
        choose(tab, menu, kind)
        assert f"{len(problems)} of 4 problems, {count} of 16" in tab.inner_text(".count")
        assert f"{kind} ({count})" in texts(tab, f"select[aria-label='{menu}'] option")
        seen = []
        for problem in problems:
            assert shown_problem(tab) == problem
            seen.append([int(text[1:]) - 1 for text in texts(tab, ".badge.number")])
            tab.keyboard.press("ArrowRight")
        assert seen == [rows for rows in wanted if rows]
        tab.locator(f"select[aria-label='{menu}']").select_option(index=0)


def test_filters_together_and_the_rest_of_a_group(tab, made):
    choose(tab, "Reward", "reward above 0")
    choose(tab, "Verdict disagreement", "Yes for a wrong answer")
    both = [r for r in made.responses if r.reward > 0 and r.overall and not r.correct]
    assert f"{len(both)} of 16 responses" in tab.inner_text(".count")
    assert tab.locator(".card").count() < 4
    tab.click("button.rest")
    assert tab.locator(".card").count() == 4
    tab.click("button.rest")
    assert tab.locator(".card").count() < 4
    tab.click("button.rest")
    choose(tab, "Reward", "any reward")
    assert tab.locator(".card").count() < 4  # another choice, another problem: matches alone


def test_kinds_without_a_response_cannot_be_chosen(browser, tmp_path):
    made = record(groups=1, size=1, verifications=0)
    with browser(write(tmp_path, made), tab="rollouts") as tab:
        assert tab.locator("option", has_text="verifications that differ (0)").is_disabled()
        assert tab.locator(".card footer").count() == 0


def test_keys_move_between_problems_and_choose(tab):
    for key, place in (
        ("ArrowRight", 1), ("j", 2), ("ArrowRight", 3), ("ArrowRight", 3), ("k", 2),
        ("Home", 0), ("ArrowLeft", 0), ("End", 3),
    ):  # fmt: skip
        tab.keyboard.press(key)
        assert shown_problem(tab) == f"problem-{place}"
        assert f"{place + 1} / 4" in tab.inner_text(".move")
        assert tab.locator(".problems button[aria-current=true]").count() == 1
    menu = tab.locator("select[aria-label='Reward']")
    menu.focus()
    menu.select_option("reward above 0")
    menu.select_option("any reward")
    tab.keyboard.press("ArrowRight")  # between problems, not in the menu that was used
    assert shown_problem(tab) == "problem-1"
    assert menu.input_value() == "any reward"
    tab.keyboard.press("End")
    tab.keyboard.press("2")
    assert tab.input_value("select[aria-label='Colour tokens by']") == "selective"
    tab.keyboard.press("v")
    assert tab.is_visible("#verifications")
    tab.keyboard.press("ArrowLeft")  # the dialog is in front
    assert shown_problem(tab) == "problem-3"
    tab.keyboard.press("Escape")
    tab.click(".problems li:nth-child(2) button")
    assert shown_problem(tab) == "problem-1"


# --- curves, tables, alarms ----------------------------------------------------------------------


def test_curves_tables_and_alarms(browser, file):
    with browser(file) as tab:
        assert tab.title() == tab.inner_text("h1") == "runs & <b>more</b>"
        assert tab.inner_text("#facts") == "two runs · seed 0"
        assert texts(tab, ".alarms li") == [
            "⚠ a, seed 0: step inflation at 2 steps from 3 to 5: 0.5 > 0.3 (more steps per "
            "response, and no accuracy to show for it)"
        ]
        assert tab.locator(".panel canvas").count() == 2
        assert texts(tab, ".panel h3") == ["reward", "entropy"]
        tab.click("[data-tab=tables]")
        assert tab.inner_text("h2") == "Stage <I>"
        assert texts(tab, "#tables tbody tr.section") == ["stage I: x"]
        assert texts(tab, "#tables td") == ["single", "0.5"]
        assert tab.inner_text(".notes") == "A note."
        assert tab.is_hidden("#curves")
        tab.reload()
        assert tab.is_visible("#tables")


def test_a_curve_says_its_numbers_and_intervals(browser, file):
    """At step 1 one run has a value and an interval; where a run has none, its nearest is said."""
    with browser(file) as tab:
        plot = tab.locator(".panel .u-over").first
        box = plot.bounding_box()
        tab.mouse.move(box["x"] + 2, box["y"] + 30)
        said = texts(tab, ".panel >> nth=0 >> .readout div")
        assert said[0] == "step 1"
        assert "a: 0.25 [0.125, 0.375]" in said
        tab.mouse.move(box["x"] + box["width"] - 2, box["y"] + 30)
        said = texts(tab, ".panel >> nth=0 >> .readout div")
        assert (said[0], said[-1]) == ("step 4", "b: 2")
        assert tab.locator(".readout:visible").count() == 1
        tab.click(".legend.shared button >> nth=1")
        tab.mouse.move(box["x"] + box["width"] - 4, box["y"] + 32)
        assert "b: 2" not in texts(tab, ".panel >> nth=0 >> .readout div")


def test_bands_hide_neither_the_lines_nor_each_other(browser, tmp_path):
    """Those of many lines are not drawn until few are shown, and none stretches the picture."""
    lines = [
        Line(f"r{i}", (1, 2), (0.5, 0.6), (-3.0 - i, -3.0), (4.0, 4.0 + i))
        for i in range(MOST_BANDS + 1)
    ]
    section = Section("RL", [line.label for line in lines], [Panel("reward", lines, note="seeds")])
    file = page.write(tmp_path / "page.html", Page("many", sections=[section]))
    with browser(file) as tab:

        def tinted():  # pixels of one band over nothing
            return tab.evaluate(
                "() => { const c = document.querySelector('.panel canvas');"
                "const copy = new OffscreenCanvas(c.width, c.height).getContext('2d');"
                "copy.drawImage(c, 0, 0);"
                "const all = copy.getImageData(0, 0, c.width, c.height).data;"
                "return all.filter((value, i) => i % 4 == 3 && value == 0x2e).length }"
            )

        assert (
            tab.inner_text(".panel .note")
            == f"seeds; bands where {MOST_BANDS} lines or fewer are shown"
        )
        assert tinted() < 10  # the edge of a letter
        for i in range(MOST_BANDS):
            tab.click(f".legend button >> text=r{i}")
        tab.wait_for_timeout(200)
        assert tinted() > 100
        low, high = tab.evaluate("shownRange([0.5, 0.6], [-3, 4])")
        assert 0.4 < low < 0.5
        assert 0.6 < high < 0.7
        low, high = tab.evaluate("shownRange([0.5, 0.6], [0.49, 0.61])")
        assert 0.48 < low < 0.49
        assert 0.61 < high < 0.62


@pytest.mark.parametrize("number", [MOST_ALARMS, MOST_ALARMS + 1])
def test_many_alarms_are_folded(browser, tmp_path, number):
    alarms = {f"run {i}": [Alarm("step_inflation", i, i, 1, 0.5, 0.3)] for i in range(number)}
    file = page.write(tmp_path / "page.html", Page("alarms", alarms=alarms))
    with browser(file) as tab:
        if number > MOST_ALARMS:
            assert not tab.is_visible(".alarms li >> nth=0")
            tab.click(f"summary >> text=⚠ {number} alarms of the monitor, in {number} runs")
        assert len(texts(tab, ".alarms li")) == number
        assert tab.is_visible(".alarms li >> nth=0")


def test_an_empty_page_says_so(browser, tmp_path):
    with browser(page.write(tmp_path / "page.html", Page("empty"))) as tab:
        assert "nothing to show yet" in tab.inner_text("#message")
        assert tab.locator("#tabs button").count() == 0


# --- safety, size, colours -----------------------------------------------------------------------


def write(folder, *records, **fields):
    entries = tuple(Rollout(f"step {i}", made) for i, made in enumerate(records))
    return page.write(folder / "page.html", Page("a run", rollouts=entries, **fields))


def test_texts_of_models_are_shown_and_never_run(browser, tmp_path):
    hostile = record(groups=1, size=2, text=lambda b, t: HOSTILE if t else "`${alert(1)}`")
    path = write(
        tmp_path, hostile,
        facts=(HOSTILE,), tables=(Table(HOSTILE, (HOSTILE, ""), ((HOSTILE, HOSTILE),)),),
        sections=(Section(HOSTILE, (), (Panel(HOSTILE, (Line(HOSTILE, (1,), (1.0,)),)),)),),
    )  # fmt: skip
    source = path.read_text()
    assert HOSTILE not in source
    assert source.count("</script>") == 3  # data of the page, of its rollouts, and the scripts
    with browser(path, tab="rollouts") as tab:
        assert tab.inner_text(".card .token >> nth=1") == HOSTILE
        tab.hover(".card .token >> nth=1")
        assert "window.hacked" in tab.inner_text("#tip pre")
        for name in ("curves", "tables"):
            tab.click(f"[data-tab={name}]")
        assert tab.evaluate("window.hacked") is None
        assert tab.locator("img").count() == 0


def test_what_is_missing_is_shown_as_missing(browser, tmp_path):
    made = record(groups=1, size=1)
    made.values["cpr"][0] = np.nan
    with browser(write(tmp_path, made), tab="rollouts") as tab:
        tab.hover(".card .token >> nth=0")
        assert tooltip(tab)["cpr"] == "–"


@pytest.mark.parametrize("groups", [25, pytest.param(125, marks=pytest.mark.slow)])
def test_a_thousand_rollouts_stay_small_and_open_at_once(browser, tmp_path, groups):
    """200 tokens each with seven numbers. Measured: 4.6 MB, under a second on one busy core."""
    many = record(groups=groups, size=8, tokens=200, verifications=1)
    path = write(tmp_path, many)
    assert path.stat().st_size < 6e6 * groups / 125
    with browser(path, tab="rollouts") as tab:
        assert cpu_seconds(tab) < 3
        assert tab.locator(".problems li").count() == groups
        before = cpu_seconds(tab)
        for _ in range(10):
            tab.keyboard.press("ArrowRight")
        assert shown_problem(tab) == "problem-10"
        assert cpu_seconds(tab) - before < 2
        assert tab.locator(".token").count() < 8 * 210  # one problem at a time


def test_the_same_page_is_the_same_file(made):
    once, again = (page.render(Page("x", rollouts=(Rollout("r", made),))) for _ in range(2))
    assert once == again


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_in_both_schemes_and_without_colour_vision(browser, file, scheme):
    with browser(file, tab="rollouts", scheme=scheme) as tab:
        colours = schemes_colours(tab)
        assert (luminance(colours["--paper"]) > 0.5) == (scheme == "light")
        for name in ("--ink", "--faint", "--good", "--bad"):
            assert contrast(colours[name], colours["--paper"]) >= 4.5, name
            assert contrast(colours[name], colours["--raised"]) >= 4.5, name
        for side in ("--positive", "--negative"):  # under text, at most 85 %
            shaded = 0.85 * np.array(colours[side]) + 0.15 * np.array(colours["--paper"])
            assert contrast(colours["--ink"], shaded) >= 4.5, side
        for pair in (("--good", "--bad"), ("--positive", "--negative")):
            one, other = (np.array(colours[name]) for name in pair)
            for seen in DEFICIENCIES.values():
                assert hue_apart(seen @ one, seen @ other), pair
        tab.click("#theme")
        assert (luminance(schemes_colours(tab)["--paper"]) > 0.5) == (scheme != "light")


# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB.
DEFICIENCIES = {
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
}  # fmt: skip


def schemes_colours(tab):
    """name → linear RGB of the page's colours as they are now."""
    names = (
        "--paper",
        "--raised",
        "--ink",
        "--faint",
        "--good",
        "--bad",
        "--positive",
        "--negative",
    )
    found = {name: tab.evaluate(f"variable('{name}')") for name in names}
    return {
        name: [linear(int(part) / 255) for part in text[4:-1].split(",")]
        for name, text in found.items()
    }


def linear(channel):
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def luminance(colour):
    return float(np.dot([0.2126, 0.7152, 0.0722], colour))


def contrast(one, other):
    """WCAG 2's ratio; 4.5 is what text needs."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def hue_apart(one, other):
    """Whether two colours are still a blue and a yellow-brown: far apart in hue."""
    hues = [colorsys.rgb_to_hsv(*np.clip(colour, 0, 1))[0] for colour in (one, other)]
    return abs(math.remainder(hues[0] - hues[1], 1)) > 0.25
