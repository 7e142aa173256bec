"""The page in a real browser: Debian's chromium, driven by playwright, without a network."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankwise.report import html
from rankwise.runs.store import Store
from rankwise.settings import RunConfig
from runs import finish_with_curves, one_answer, write_lines, write_runs

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no chromium on the path; on Debian: apt install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'`${x}` $x_{ & 名前 🙂 \u202eback" + "y" * 300
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods, of which the head has no parameters; one row of a single seed, so without an interval."""
    folder = write_runs(tmp_path_factory.mktemp("runs") / "quickstart")
    store = Store(folder)
    config = RunConfig(task="stdlib-module", method={"name": "full"}, learning_rate=1e-4, train_rows=4800)
    finish_with_curves(store, config, 0.65, parameters=22_713_216)
    failed = store.create(RunConfig(task="stdlib-module", seed=9), "x")
    (failed / "error.txt").write_text("out of memory\n\nTraceback\n", encoding="utf-8")
    return html.write(folder)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every text that a run may hold is hostile."""
    folder = tmp_path_factory.mktemp("hostile") / "runs"
    write_runs(folder, seeds=(0, 1), title=HOSTILE)
    for result in folder.glob("*/result.json"):
        content = json.loads(result.read_text())
        content |= {"task": HOSTILE, "model": HOSTILE, "notes": [HOSTILE]}
        content["options"] = {**content["options"], HOSTILE: HOSTILE, "rank": content["options"].get("rank")}
        content["splits"]["evaluation"][0] |= {"name": HOSTILE, "note": HOSTILE}
        content["answers"] = [one_answer(HOSTILE, split=HOSTILE, majority=HOSTILE)]
        result.write_text(json.dumps(content))
        (result.parent / "env.json").write_text(json.dumps({HOSTILE: HOSTILE}))
        wrong = [{"idx": row, "texts": [HOSTILE, HOSTILE], "true": 0, "given": 1, "confidence": 0.9} for row in (0, 1)]
        said = {"split": HOSTILE, "classes": [HOSTILE, f"{HOSTILE}2"], "confusion": [[0, 1, 2], [1, 1, 7]]}
        (result.parent / "answers.json").write_text(json.dumps([{**said, "wrong": wrong}]))
        ranks = [{"step": step, "ranks": {f"layer.{HOSTILE}.0.q": step, "layer.1.q": 4}} for step in (0, 10, 20)]
        write_lines(result.parent / "ranks.jsonl", ranks)
    failed = Store(folder).create(RunConfig(task={"name": "x" + HOSTILE.replace("/", "")[:80]}, seed=9), "x")
    (failed / "error.txt").write_text(HOSTILE, encoding="utf-8")
    about = Store(folder).experiment()
    tables = {"tables": ["sora/glue"], "differs": HOSTILE, "changed": [HOSTILE]}
    (folder / "experiment.yaml").write_text(yaml.safe_dump({**about, "published": tables}), encoding="utf-8")
    return html.write(folder)


class Watched:
    """A page in a tab of its own, and all that it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, place: str = "", **options: Any) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.context = browser.new_context(**{"viewport": DESK, **options})
        self.context.route("**/*", self._refuse)
        self.tab = self.context.new_page()
        self.tab.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.tab.goto(f"{path.as_uri()}{place}")

    def _refuse(self, route: Any) -> None:
        if route.request.url.startswith("file:") and route.request.is_navigation_request():
            route.continue_()
        else:
            self.asked.append(route.request.url)
            route.abort()

    def __enter__(self) -> Any:
        return self.tab

    def __exit__(self, kind: object, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert self.complaints == [] and self.asked == []


def column(tab: Any, place: int) -> list[str]:
    return tab.locator("table.sortable").first.locator(f"tbody tr > :nth-child({place + 1})").all_inner_texts()


def heads(tab: Any) -> Any:
    return tab.locator("table.sortable").first.locator("thead th")


def test_a_click_on_a_head_sorts_by_it_and_another_turns_it_round(browser: Any, report: Path) -> None:
    with Watched(browser, report) as tab:
        names = [name.split("\n")[0].strip() for name in heads(tab).all_inner_texts()]
        final = names.index("final")
        written = column(tab, 0)
        heads(tab).nth(final).get_by_role("button").click()
        assert column(tab, final) == ["0", "331,776", "331,776", "22,713,216"]
        assert [heads(tab).nth(place).get_attribute("aria-sort") for place in range(len(names))] == [
            "ascending" if place == final else None for place in range(len(names))
        ]
        heads(tab).nth(final).get_by_role("button").click()
        assert column(tab, final) == ["22,713,216", "331,776", "331,776", "0"]
        assert heads(tab).nth(final).get_attribute("aria-sort") == "descending"
        heads(tab).nth(0).get_by_role("button").click()
        assert column(tab, 0) == sorted(written)
        assert heads(tab).nth(final).get_attribute("aria-sort") is None


def test_scores_sort_as_numbers_and_empty_cells_come_last_either_way(browser: Any, report: Path) -> None:
    with Watched(browser, report) as tab:
        names = [name.split("\n")[0].strip() for name in heads(tab).all_inner_texts()]
        for name, empty in (("accuracy", 0), ("95 % interval", 1)):
            for turned in (False, True):
                heads(tab).nth(names.index(name)).get_by_role("button").click()
                cells = column(tab, names.index(name))
                full = cells[: len(cells) - empty]
                assert cells[len(full) :] == [""] * empty and all(full)
                firsts = [float(cell.split()[0]) for cell in full]
                assert firsts == sorted(firsts, reverse=turned)
        cost = tab.locator("table.sortable").nth(1)
        cost.get_by_role("button", name="time of a run").click()
        assert cost.locator("thead th[aria-sort]").count() == 1


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_sorts_too(browser: Any, report: Path, key: str) -> None:
    with Watched(browser, report) as tab:
        first = heads(tab).nth(0).get_by_role("button")
        first.focus()
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.closest('th').cellIndex") == 1
        tab.keyboard.press(key)
        assert heads(tab).nth(1).get_attribute("aria-sort") == "ascending"
        firsts = [float(cell.split()[0]) for cell in column(tab, 1)]
        assert firsts == sorted(firsts)
        assert tab.evaluate("document.activeElement.closest('th').cellIndex") == 1, "focus stays where it was"


def test_a_seed_leads_to_its_run_and_opens_it(browser: Any, report: Path) -> None:
    with Watched(browser, report) as tab:
        assert tab.locator("details.run[open]").count() == 0
        link = tab.locator("table.sortable").first.locator("a", has_text="2").first
        anchor = str(link.get_attribute("href"))
        for _ in range(2):  # the second time the address is the same already
            link.click()
            run = tab.locator(anchor)
            playwright.expect(run).to_have_attribute("open", "")
            playwright.expect(run.locator("summary")).to_be_in_viewport()
            assert "seed 2: accuracy 0." in run.locator("summary").inner_text()
            assert run.locator("svg polyline").count() == 2
            run.evaluate("details => { details.open = false; scrollTo(0, 0); }")
    with Watched(browser, report, anchor) as tab:
        playwright.expect(tab.locator(anchor)).to_have_attribute("open", "")


def test_every_picture_can_be_decoded_and_no_address_leads_nowhere(browser: Any, report: Path) -> None:
    with Watched(browser, report) as tab:
        widths = tab.evaluate("Promise.all([...document.images].map(async i => (await i.decode(), i.naturalWidth)))")
        assert len(widths) >= 9 and min(widths) > 100
        links = tab.evaluate("[...document.links].map(link => link.getAttribute('href'))")
        assert links and all(link.startswith("#") for link in links)
        assert tab.evaluate("[...document.links].every(link => document.getElementById(link.hash.slice(1)))")


@pytest.mark.parametrize("which", ["report", "hostile"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_nothing_sticks_out_of_the_screen(
    browser: Any, request: pytest.FixtureRequest, which: str, size: dict[str, int]
) -> None:
    with Watched(browser, request.getfixturevalue(which), viewport=size) as tab:
        tab.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        assert tab.evaluate("document.documentElement.scrollWidth") <= size["width"]
        tables = tab.locator("table").evaluate_all("all => all.every(each => each.closest('.scroll'))")
        assert tables, "a wide table scrolls inside its box"


def test_no_word_of_a_heading_is_broken_on_a_phone(browser: Any, report: Path) -> None:
    """A column as narrow as its numbers would have its heading in single letters."""
    with Watched(browser, report, viewport=PHONE) as tab:
        broken = tab.evaluate(
            """() => [...document.querySelectorAll("thead th")].filter(th => {
                const range = document.createRange(), walk = document.createTreeWalker(th, NodeFilter.SHOW_TEXT)
                for (let text; (text = walk.nextNode()); )
                    for (const word of text.data.matchAll(/\\S+/g)) {
                        range.setStart(text, word.index)
                        range.setEnd(text, word.index + word[0].length)
                        if (new Set([...range.getClientRects()].map(each => each.top)).size > 1) return true
                    }
            }).map(th => th.textContent)"""
        )
    assert broken == []


def test_no_name_becomes_markup_or_a_script(browser: Any, hostile: Path) -> None:
    with Watched(browser, hostile) as tab:
        assert tab.title().startswith("<script>alert(1)</script>")
        assert HOSTILE.replace("\u202e", "") in tab.locator("h1").inner_text().replace("\u202e", "")
        assert tab.locator("script").count() == 1 and tab.locator("img[src='x']").count() == 0
        for text in tab.locator("table.sortable").first.locator("tbody td").all_text_contents():
            assert text == HOSTILE
        heads(tab).nth(1).get_by_role("button").click()
        tab.locator("a[href^='#run-']").first.click()
        playwright.expect(tab.locator("details.run[open]")).to_have_count(1)


def test_the_policy_of_the_page_lets_no_other_script_run_and_nothing_be_fetched(browser: Any, report: Path) -> None:
    watched = Watched(browser, report)
    watched.tab.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            const image = document.createElement("img");
            image.src = "https://example.org/x.png";
            document.body.append(script, image);
        }"""
    )
    watched.tab.wait_for_function("document.images[document.images.length - 1].complete")
    assert watched.tab.evaluate("window.ran") is None and watched.asked == []
    assert len(watched.complaints) >= 2 and all("Content Security Policy" in each for each in watched.complaints)
    watched.context.close()


def test_without_a_script_the_tables_are_plain_tables(browser: Any, report: Path) -> None:
    with Watched(browser, report, java_script_enabled=False) as tab:
        assert tab.locator("button").count() == 0
        assert column(tab, 0) == ["full", "head", "lora rank=4", "simplex-lora rank=4"]
        playwright.expect(tab.locator("table").first).to_be_visible()
        tab.locator("details.run summary").first.click()
        playwright.expect(tab.locator("details.run .facts").first).to_be_visible()


CONTRAST = """
() => {
    const parse = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => {
        const [r, g, b] = parse(colour).map(c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (parse(colour)[3] !== 0) return colour;
        }
    };
    const poor = [];
    for (const element of document.querySelectorAll("h1, h2, h3, p, li, a, th, td, dt, dd, summary, pre, span")) {
        const style = getComputedStyle(element), back = behind(element);
        if (!element.innerText || !back.startsWith("rgb")) continue;
        const [one, other] = [light(style.color), light(back)].sort((a, b) => b - a);
        const contrast = (one + .05) / (other + .05);
        if (contrast < 4.5) poor.push(`${element.tagName} ${element.className} ${contrast}`);
    }
    return poor;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Any, report: Path, scheme: str) -> None:
    with Watched(browser, report, color_scheme=scheme) as tab:
        tab.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        back = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") == (scheme == "light")
        assert tab.evaluate(CONTRAST) == []
        shown = tab.locator("figure img").first
        assert shown.evaluate("image => getComputedStyle(image).backgroundColor") == "rgb(255, 255, 255)"
