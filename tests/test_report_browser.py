"""The report as a browser shows it: charts, tokens, themes, a phone, paper, and hostile data that stays text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from support.reports import ATTACK, GRID, add_evaluation, make_run, metrics_of

from pipeline.reporting.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder, num_rows=9, grid=GRID)
    add_evaluation(run, folder / "run")
    return Path(write_report(run)).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}); `make browser` installs one on Debian, as root")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The report, opened; it may say nothing to the console and ask for nothing."""
    with browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light") as context:
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [address]


def marks(page: Page, chart: str) -> int:
    """How many marks of a chart have an extent."""
    boxes = [mark.bounding_box() for mark in page.locator(f"{chart} .mark").all()]
    return sum(box is not None and box["width"] > 1 and box["height"] > 1 for box in boxes)


def test_every_chart_is_drawn(page):
    plots = page.locator(".plot").count()
    assert plots == page.locator(".plot > svg").count() == 14
    for index in range(plots):
        shapes = page.locator(".plot").nth(index).locator(".mark")
        assert shapes.count() > 0
        assert all((shape.bounding_box() or {"width": 0})["width"] > 1 for shape in shapes.all())
    assert marks(page, "#pareto") == 9
    assert page.locator("#pareto polyline").count() == 2  # the rule base has one point


def test_the_control_line_goes_through_the_mean_of_each_weight(browser, tmp_path):
    run = make_run(tmp_path, num_rows=3, grid=GRID)
    metrics = metrics_of(run)
    means = {0.0: [0.0, 2.0], 0.5: [3.0], 1.0: [5.0, 6.0]}
    points = [(weight, value) for weight, values in means.items() for value in values]
    metrics["points"] = [
        {
            "rule": "linear",
            "agent_temperature": 0.1,
            "weights": {"brief": w},
            "objectives": {"vader": v},
            "kl_per_token": 1,
        }
        for w, v in points
    ]
    (tmp_path / "run/_metrics.json").write_text(json.dumps(metrics))
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(Path(write_report(run)).as_uri())
        line = page.locator("#control polyline").get_attribute("points") or ""
        corners = [tuple(map(float, each.split(","))) for each in line.split()]
        centres = page.locator("#control .mark circle").evaluate_all(
            "all => all.map((each) => [+each.getAttribute('cx'), +each.getAttribute('cy')])"
        )
        expected: dict[float, list[float]] = {}
        for x, y in centres:
            expected.setdefault(x, []).append(y)
        assert len(corners) == 3
        assert corners == [(x, pytest.approx(sum(ys) / len(ys))) for x, ys in sorted(expected.items())]
        assert page.locator("#control .mark.behind").count() == 4  # the points that share a weight


def test_three_objectives_have_projections_and_parallel_coordinates(browser, tmp_path):
    run = make_run(tmp_path, num_rows=3, grid=GRID)
    metrics = metrics_of(run)
    metrics["objectives"] = ["a", "b", "c"]
    means = [(0.0, 2.0, 1.0), (1.0, 1.0, 3.0), (2.0, 0.0, 2.0)]
    metrics["points"] = [
        {"rule": rule, "agent_temperature": 0.1, "weights": {}, "objectives": dict(zip("abc", each, strict=True))}
        for rule, each in zip(("equilibrium", "linear (answer)", "base"), means, strict=True)
    ]
    (tmp_path / "run/_metrics.json").write_text(json.dumps(metrics))
    with browser.new_context() as context:
        page = context.new_page()
        said: list[str] = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(Path(write_report(run)).as_uri())
        lines = page.locator("#parallel .mark polyline:first-child").evaluate_all(
            "all => all.map((each) => each.getAttribute('points'))"
        )
        heights = [[float(corner.split(",")[1]) for corner in line.split()] for line in lines]
        low, high = heights[0][0], heights[2][0]  # 0 and 2 on the first axis, which is upside down in SVG
        assert [row[0] for row in heights] == pytest.approx([low, (low + high) / 2, high])
        assert [row[1] for row in heights] == pytest.approx([high, (low + high) / 2, low])
        assert [row[2] for row in heights] == pytest.approx([low, high, (low + high) / 2])
        titles = page.locator("#projections figcaption").all_text_contents()
        assert titles == ["a and b", "a and c", "b and c"]
        assert page.locator("#projections .mark").count() == 9
        page.locator("#rules input").first.uncheck()
        assert page.locator("#parallel .mark").count() == 2
        assert said == []


def test_bars_show_their_counts(page):
    data = json.loads(page.locator("#data").text_content() or "")
    for name in ("num_tokens", "kl_per_token"):
        chart = page.locator(f"[data-ridge='{name}']")
        for at, group in enumerate(data["charts"][name]["groups"]):
            counts = [int(text) for text in chart.locator(".mark").nth(at).locator("text.count").all_text_contents()]
            assert counts in ([each for each in group["counts"] if each], [max(group["counts"])])
    assert page.locator("text.count").count() > 10


def test_the_axis_of_residuals_has_powers_of_ten(page):
    axis = page.locator("[data-ridge='max_residual'] svg > text").all_text_contents()
    assert any("e\N{MINUS SIGN}" in label for label in axis)
    assert "0" not in axis


@pytest.mark.parametrize("width", [400, 1280])
def test_menus_show_their_whole_choice(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    menus = page.locator("select")
    assert menus.count() == 4
    for menu in menus.all():
        for at in range(menu.locator("option").count()):
            menu.select_option(index=at)
            wanted, given = menu.evaluate(
                "(menu) => { const probe = document.createElement('span');"
                " const style = getComputedStyle(menu); probe.style.font = style.font;"
                " probe.style.whiteSpace = 'pre';"
                " probe.style.position = 'absolute'; probe.textContent = menu.selectedOptions[0].textContent;"
                " document.body.append(probe); const wanted = probe.getBoundingClientRect().width;"
                " probe.remove();"
                " const edges = parseFloat(style.paddingLeft) + parseFloat(style.paddingRight);"
                " return [wanted, menu.clientWidth - edges]; }"
            )
            assert wanted <= given or given >= width - 80  # as wide as the page allows


def test_rules_objectives_and_temperatures_are_chosen(page):
    page.get_by_role("checkbox", name="linear").uncheck()
    assert marks(page, "#pareto") == 5
    page.select_option("#temperature", "0.5")
    assert marks(page, "#pareto") == 3  # two weight vectors of the equilibrium, and the base as ever
    assert page.locator("#differences .mark").count() == 2  # two metrics, less the rule that is hidden
    before = page.locator("#pareto svg").inner_html()
    page.select_option("#pareto-x", ATTACK)
    assert page.locator("#pareto svg").inner_html() != before
    assert page.locator("#pareto text.name").first.text_content() == f"{ATTACK} (vader)"
    page.locator("#intervals").check()
    assert page.locator("#pareto .mark line").count() == 6


def test_pointing_at_a_point_shows_its_numbers(page):
    page.locator("#pareto .mark").first.hover()
    tip = page.locator("#tip")
    assert tip.is_visible()
    shown = tip.inner_text()
    assert "equilibrium" in shown
    assert "vader\t0.54 (0.44 to 0.64)" in shown.replace("\n", "\t")  # cos 1, and a tenth around it
    page.keyboard.press("Escape")
    page.mouse.move(0, 0)
    assert tip.is_hidden()


def test_a_token_shows_who_paid_by_pointer_and_by_keys(page):
    page.emulate_media(reduced_motion="reduce")
    card = page.locator("#tokens .card").first
    cells = [row.locator("th, td").all_text_contents() for row in card.locator(".trace-table tbody tr").all()]
    tokens = card.locator(".trace .tok")
    assert tokens.count() == len(cells) > 1
    tokens.nth(1).hover()
    shown = page.locator("#tip").inner_text().replace("\n", "\t")
    assert f"brief paid\t{cells[1][3]}" in shown
    assert f"kind-1 paid\t{cells[1][4]}" in shown
    assert f"brief threshold\t{cells[1][5]}" in shown
    assert float(cells[1][3]) > 0
    assert "base probability\t4.98 % (\N{MINUS SIGN}3.000)" in shown
    assert "final probability\t36.8 % (\N{MINUS SIGN}1.000)" in shown
    page.mouse.move(0, 0)
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert f"brief paid\t{cells[1][3]}" in page.locator("#tip").inner_text().replace("\n", "\t")
    assert card.locator(".trace .tok[tabindex='0']").count() == 1


def test_payers_differ_in_colour_and_in_underline(page):
    styles = page.evaluate(
        "[...document.querySelectorAll('.legend .tok')].map((token) => {"
        " const style = getComputedStyle(token);"
        " return [style.backgroundColor, style.textDecorationLine + ' ' + style.textDecorationStyle]; })"
    )
    assert len({colour for colour, _ in styles}) == len({underline for _, underline in styles}) == 3


def test_data_is_text_and_never_runs(page):
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert page.get_by_text(f"a note {ATTACK}").count() == 1
    page.locator(".trace .tok").nth(1).hover()
    page.locator("#pareto .mark").first.hover()
    assert ATTACK in page.locator("#tip").inner_text()
    assert page.evaluate("window.hacked") is None


def test_a_script_that_slipped_in_would_be_blocked(browser, address, tmp_path):
    changed = tmp_path / "changed.html"
    report = Path(address.removeprefix("file://")).read_text()
    changed.write_text(report.replace("<main", "<script>window.hacked=1</script><main"))
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(changed.as_uri())
        assert page.locator("script").count() == 3
        assert page.evaluate("window.hacked") is None


def test_a_table_is_sorted_by_its_heads(page):
    head = page.locator("#points thead th:nth-child(5)").first
    assert head.inner_text() == "vader"
    cells = page.locator("#points tbody tr td:nth-child(5)")
    values = []
    for _ in range(2):
        head.get_by_role("button").click()
        values.append(cells.evaluate_all("cells => cells.map((cell) => +cell.dataset.value)"))
    assert values[0] == sorted(values[0], reverse=True)
    assert values[1] == values[0][::-1]
    assert head.get_attribute("aria-sort") == "ascending"


def test_a_theme_follows_the_system_until_it_is_chosen(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ground)
    assert light != dark
    page.get_by_role("button", name="Theme: auto").click()
    assert page.evaluate(ground) == light
    page.get_by_role("button", name="Theme: light").click()
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) == dark
    page.emulate_media(media="print")
    assert page.evaluate(ground) == light


def test_a_phone_scrolls_down_alone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_function("document.querySelector('#pareto svg').viewBox.baseVal.width < 360")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert marks(page, "#pareto") == 9
    page.locator("#tokens .trace .tok").nth(1).focus()
    box = page.locator("#tip").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360


def test_paper_shows_what_is_folded(page, tmp_path):
    folded = page.locator("#tokens .trace-table").first
    assert folded.is_hidden()
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert folded.is_visible()
    assert page.locator("#controls").get_by_text("equilibrium").is_visible()  # the legend stays
    assert page.locator("#temperature").is_hidden()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert folded.is_hidden()
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_without_javascript_every_number_is_there(browser, address):
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(address)
        assert page.get_by_text("The charts need JavaScript").is_visible()
        assert page.locator("#points details tbody tr").count() == 9
        assert page.locator("#theme").is_hidden()
