"""The page of collect_results.py in a real browser, from file://: runs, search, sorting, side by side, hostile names."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import collect_results as script
from tests.collecting.runs import write_clustering

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "<script>alert('name')<script>"
DECODED = "image => { image.loading = 'eager'; return image.decode().then(() => image.naturalWidth > 0); }"
HOSTILE_LOG = "</script><script>alert('log')</script><img src=x onerror=alert('image')> & é \u2028 @DATA@"
LOSSES = ["0.3", "0.35", "0.4", "0.45", "0.5", "0.55", "10.5"]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None and os.environ.get("REQUIRE_BROWSER"):
        pytest.fail("no chromium found, and REQUIRE_BROWSER is set")
    if CHROMIUM is None:
        pytest.skip("needs a chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        # no sandbox: tests may run as root; what it opens are the files made here
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("a place") / "50% done #1"
    runs = root / "amortised_clustering"
    for kind in ("Swarm", "LSTM"):
        for seed in range(3):
            loss = 0.3 + 0.1 * seed + 0.05 * (kind == "LSTM")
            write_clustering(runs / f"-type.{kind}-seed.{seed}", loss, type=kind, seed=seed, seconds=138.249052542)
    hostile = write_clustering(runs / HOSTILE, 10.5, type="<b>bold</b> a=b", __proto__=3, toString="x" * 900)
    (hostile / "log").write_text(HOSTILE_LOG)
    (write_clustering(runs / "broken", 0.5) / "result.json").write_text("{")
    write_clustering(root / "other" / "1", 0.5, n_rows=1)
    (root / "other" / "1" / "result.json").write_text('{"script": "swarm_transformer", "test": {"bits": 3.5}}')
    assert script.main([str(root)]) == 0
    return root


@pytest.fixture(params=[1280])
def page(browser, root: Path, request: pytest.FixtureRequest) -> Iterator:
    """The page, `request.param` pixels wide. Errors, dialogs, requests and violations of the page's policy fail a test."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.set_default_timeout(10_000)
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((root / "index.html").as_uri())
    yield page
    page.close()
    assert not complaints and all(url.startswith("file://") for url in asked)


def names(page) -> list[str]:
    return page.locator("#runs td button").all_inner_texts()


def pick(page, experiment: str) -> None:
    page.locator("nav button", has_text=experiment).click()


def column(page, name: str) -> list[str]:
    heads = page.locator("#runs thead th").all_inner_texts()
    return [row.locator("td").nth(heads.index(name)).inner_text() for row in page.locator("#runs tbody tr").all()]


def test_every_run_is_shown(page) -> None:
    assert len(names(page)) == 9
    assert "9 runs" in page.inner_text("#summary") and "8 finished, 1 broken" in page.inner_text("#summary")
    assert sorted(column(page, "state")) == ["broken"] + ["finished"] * 8
    assert "result.json is damaged" in page.inner_text("#runs")
    assert sorted(column(page, "minutes")) == [*["1"] * 3, *["2.3"] * 6]  # rounded
    assert sorted(column(page, "value")) == sorted(["", *LOSSES, "3.5"])


def test_search(page) -> None:
    pick(page, "amortised_clustering")
    assert len(names(page)) == 8
    page.locator("#runs td", has_text="LSTM").get_by_text("LSTM", exact=True).first.click()  # a value: only runs with it
    assert names(page) == [f"-type.LSTM-seed.{seed}" for seed in range(3)] and "3 of 9" in page.inner_text("#count")
    page.get_by_label("search").fill("type=lstm seed.2")
    assert names(page) == ["-type.LSTM-seed.2"]
    page.reload()  # the view is in the address
    assert names(page) == ["-type.LSTM-seed.2"] and page.get_by_label("search").input_value() == "type=lstm seed.2"
    for words, n in (("type=lst", 0), ("damaged", 1), ("state=broken", 1), ("lr=0.01 oken", 1), ("", 8)):
        page.get_by_label("search").fill(words)
        assert len(names(page)) == n, words
    page.locator("#runs td", has_text="<b>bold</b> a=b").click()
    assert names(page) == [HOSTILE]


def test_sorting_and_keyboard(page) -> None:
    pick(page, "amortised_clustering")
    head = page.locator("#runs thead button", has_text="cross entropy").first
    head.click()
    assert column(page, "cross entropy") == [*LOSSES, ""]  # as numbers; the broken run has none, and comes last
    assert page.locator("#runs th[aria-sort=ascending]").inner_text() == "cross entropy"
    page.keyboard.press("Enter")
    assert column(page, "cross entropy") == [*reversed(LOSSES), ""]
    page.get_by_label("show -type.Swarm-seed.1").focus()
    page.keyboard.press("Space")
    assert page.get_by_label("show -type.Swarm-seed.1").is_checked()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the name beside it: that run alone
    assert page.locator("#runs input:checked").count() == 1 and "One run" in page.inner_text("#shown")


def test_the_table_over_seeds_and_the_papers_figure(page) -> None:
    pick(page, "amortised_clustering")
    assert any("Swarm" in row and "0.4 ± 0.1" in row for row in page.locator("#groups tr").all_inner_texts())
    assert page.locator("#pictures img").evaluate(DECODED)


@pytest.mark.parametrize("page", [390, 1280], indirect=True)
def test_two_runs_side_by_side(page) -> None:
    pick(page, "amortised_clustering")
    for kind in ("Swarm", "LSTM"):
        page.get_by_label(f"show -type.{kind}-seed.1").check()
    assert "2 runs side by side" in page.inner_text("#shown")
    cards = page.locator("#cards article")
    assert [card.locator("div", has_text="type").inner_text() for card in cards.all()] == ["type\nSwarm", "type\nLSTM"]
    assert "bs" not in page.inner_text("#cards") and "bs 20" in page.inner_text("#same")
    assert cards.nth(0).locator("pre").bounding_box()["y"] == cards.nth(1).locator("pre").bounding_box()["y"]  # in line
    curves = page.get_by_label("val_loss over").locator("path")
    first = curves.nth(0).get_attribute("d")
    assert curves.count() == 2 and first != curves.nth(1).get_attribute("d") and "NaN" not in first
    page.get_by_label("axis of the curves").select_option("minutes")
    page.get_by_label("logarithmic").check()
    assert curves.nth(0).get_attribute("d") not in (first, None)
    images = page.locator("#shown img")
    assert images.count() == 4 and all(image.evaluate(DECODED) for image in images.all())
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    assert all(svg.bounding_box()["width"] > 100 for svg in page.locator("#charts svg").all())
    page.reload()
    assert "2 runs side by side" in page.inner_text("#shown") and page.get_by_label("logarithmic").is_checked()
    page.get_by_role("button", name="clear").click()
    assert not page.locator("#shown").is_visible() and not page.locator("#runs input:checked").count()


@pytest.mark.parametrize("page", [390, 1280], indirect=True)
def test_one_run_whose_names_and_logs_are_text(page) -> None:
    page.get_by_role("button", name=HOSTILE).click()
    assert page.inner_text("#cards h3").strip() == HOSTILE and page.locator("#shown img").count() == 2
    assert page.locator("#shown pre").text_content() == HOSTILE_LOG and page.locator("b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    with page.expect_navigation():
        page.locator("#shown a", has_text="args.json").click()
    assert '"type": "<b>' in page.locator("pre").text_content()


def test_addresses_that_name_nothing(page, root: Path) -> None:
    page.goto((root / "index.html").as_uri() + "#experiment=gone&run=gone&run=other/1&axis=toString&sort=gone&descending=x")
    page.reload()
    assert len(names(page)) == 9 and "One run" in page.inner_text("#shown")


def test_a_watched_page_reloads_itself_as_it_stands(browser, tmp_path: Path) -> None:
    collection = script.Collection(tmp_path, tmp_path)
    write_clustering(tmp_path / "amortised_clustering" / "first.part", 0.5)
    collection.write(1)
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    page.get_by_label("show first").check()
    (tmp_path / "amortised_clustering" / "first.part").rename(tmp_path / "amortised_clustering" / "first")
    write_clustering(tmp_path / "amortised_clustering" / "second", 0.6)
    collection.write(1)
    page.get_by_label("show second").wait_for()
    assert page.get_by_label("show first").is_checked() and "reloads itself" in page.inner_text("#summary")
    page.close()
