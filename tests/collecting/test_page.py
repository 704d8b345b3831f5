"""The page of collect_results.py in a real browser, from file://: runs, filters, sorting, side by side, hostile names."""

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
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("a place") / "50% done #1"
    runs = place / "amortised_clustering"
    for kind in ("Swarm", "LSTM"):
        for seed in range(3):
            write_clustering(
                runs / f"-type.{kind}-seed.{seed}", 0.3 + 0.1 * seed + 0.05 * (kind == "LSTM"), type=kind, seed=seed
            )
    hostile = write_clustering(runs / HOSTILE, 10.5, type="<b>bold</b>", __proto__=3)
    (hostile / "log").write_text(HOSTILE_LOG)
    (write_clustering(runs / "broken", 0.5) / "result.json").write_text("{")
    write_clustering(place / "other" / "1", 0.5, n_rows=1)
    (place / "other" / "1" / "result.json").write_text('{"script": "swarm_transformer", "test": {"bits": 3.5}}')
    assert script.main([str(place)]) == 0
    return place


@pytest.fixture
def page(browser, place: Path) -> Iterator:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(10_000)
    complaints, asked = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((place / "index.html").as_uri())
    yield page
    page.close()
    assert not complaints and all(url.startswith("file://") for url in asked)


def names(page) -> list[str]:
    return page.locator("#runs td.name button").all_inner_texts()


def pick(page, experiment: str) -> None:
    page.locator("#experiments button", has_text=experiment).click()


def column(page, name: str) -> list[str]:
    heads = page.locator("#runs thead th").all_inner_texts()
    return [row.locator("td").nth(heads.index(name)).inner_text() for row in page.locator("#runs tbody tr").all()]


def test_every_run_is_shown(page) -> None:
    assert (
        len(names(page)) == 9
        and "9 runs" in page.inner_text("#summary")
        and "8 finished, 1 broken" in page.inner_text("#summary")
    )
    assert sorted(column(page, "state")) == ["broken"] + ["finished"] * 8
    assert "result.json is damaged" in page.inner_text("#runs")


def test_filters(page) -> None:
    pick(page, "amortised_clustering")
    assert len(names(page)) == 8
    page.get_by_label("type", exact=True).select_option(label="LSTM")
    assert names(page) == [f"-type.LSTM-seed.{seed}" for seed in range(3)] and "3 of 9" in page.inner_text("#count")
    page.get_by_label("search").fill("seed.2")
    assert names(page) == ["-type.LSTM-seed.2"]
    page.reload()  # what is chosen is in the address
    assert names(page) == ["-type.LSTM-seed.2"] and page.get_by_label("search").input_value() == "seed.2"
    pick(page, "all")
    page.get_by_label("search").fill("")
    page.get_by_label("state").select_option("broken")
    assert names(page) == ["broken"]


def test_sorting(page) -> None:
    pick(page, "amortised_clustering")
    head = page.locator("#runs thead button", has_text="cross entropy").first
    head.click()
    losses = ["0.3", "0.35", "0.4", "0.45", "0.5", "0.55", "10.5"]  # as numbers; the broken run has none, and comes last
    assert column(page, "cross entropy") == [*losses, ""]
    assert page.locator("#runs th[aria-sort=ascending]").inner_text() == "cross entropy"
    head.click()
    assert column(page, "cross entropy") == [*reversed(losses), ""]
    page.locator("#runs thead button", has_text="seed").click()
    assert column(page, "seed") == ["0"] * 4 + ["1", "1", "2", "2"]


def test_sorting_of_different_figures(page) -> None:
    page.locator("#runs thead button", has_text="first figure").click()
    shown = [text.strip() for text in column(page, "first figure")]
    assert shown == [*(f"cross entropy {loss}" for loss in (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 10.5)), "test bits 3.5", ""]


def test_keyboard(page) -> None:
    pick(page, "amortised_clustering")
    page.get_by_label("show -type.Swarm-seed.1").focus()
    page.keyboard.press("Space")
    assert page.get_by_label("show -type.Swarm-seed.1").is_checked()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the name beside it: that run alone
    assert page.locator("#runs input:checked").count() == 1 and "One run" in page.inner_text("#shown")
    page.locator("#runs thead button", has_text="seed").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.locator("th[aria-sort=descending]").inner_text() == "seed"


def test_the_table_over_seeds_and_the_papers_figure(page) -> None:
    pick(page, "amortised_clustering")
    rows = page.locator("#groups tbody tr").all_inner_texts()
    assert any("Swarm" in row and "0.4 ± 0.1" in row for row in rows)
    assert page.locator("#overview img").evaluate(DECODED)


def test_two_runs_side_by_side(page) -> None:
    pick(page, "amortised_clustering")
    for kind in ("Swarm", "LSTM"):
        page.get_by_label(f"show -type.{kind}-seed.1").check()
    assert "2 runs side by side" in page.inner_text("#shown")
    table = page.locator(".differences")
    assert table.locator("tbody tr", has_text="type").first.locator("td").all_inner_texts() == ["Swarm", "LSTM"]
    assert "bs" not in table.inner_text() and "bs 20" in page.locator("#shown details").first.text_content()  # the same in both
    chart = page.locator(".chart", has_text="val_loss")
    first = chart.locator("path").nth(0).get_attribute("d")
    assert (
        chart.locator("path").count() == 2 and first != chart.locator("path").nth(1).get_attribute("d") and "NaN" not in first
    )
    page.get_by_label("axis of the curves").select_option("minutes")
    page.get_by_label("logarithmic").check()
    assert page.locator(".chart", has_text="val_loss").locator("path").nth(0).get_attribute("d") != first
    page.locator(".chart svg").first.hover()
    assert "at" in page.locator(".readout").first.inner_text()
    for name in ("metrics.png", "samples.png"):
        assert page.locator("#pictures h2", has_text=name).count() == 1
    page.locator("#pictures").scroll_into_view_if_needed()
    images = page.locator("#pictures img")
    assert images.count() == 4 and all(image.evaluate(DECODED) for image in images.all())
    page.reload()
    assert "2 runs side by side" in page.inner_text("#shown") and page.get_by_label("logarithmic").is_checked()
    page.get_by_role("button", name="clear").click()
    assert not page.locator("#shown").is_visible() and not page.locator("#runs input:checked").count()


def test_one_run(page) -> None:
    page.get_by_role("button", name="-type.Swarm-seed.0").click()
    assert "One run" in page.inner_text("#shown") and "it ends" in page.inner_text("#logs pre")
    with page.expect_navigation():
        page.locator("#shown a", has_text="args.json").click()
    assert '"type": "Swarm"' in page.content()


def test_names_and_logs_are_text(page) -> None:
    """Whatever a run is called: the fixture has dialogs, errors and violations of the page's policy fail the test."""
    page.get_by_role("button", name=HOSTILE).click()
    assert page.inner_text("#shown .differences thead").strip() == HOSTILE
    assert page.locator("#logs pre").text_content() == HOSTILE_LOG
    assert page.locator("#pictures img").count() == 2
    pick(page, "amortised_clustering")
    page.get_by_label("type", exact=True).select_option(label="<b>bold</b>")
    assert names(page) == [HOSTILE] and page.locator("#runs b").count() == 0


def test_addresses_that_name_nothing(page, place: Path) -> None:
    page.goto(
        (place / "index.html").as_uri()
        + "#experiment=gone&run=gone&run=other/1&axis=toString&o.__proto__=1&sort=gone&state=gone"
    )
    page.reload()
    assert len(names(page)) == 9 and "One run" in page.inner_text("#shown")


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(browser, place: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844})
    chosen = "&".join(f"run=amortised_clustering/-type.{kind}-seed.0" for kind in ("Swarm", "LSTM"))
    page.goto((place / "index.html").as_uri() + f"#experiment=amortised_clustering&{chosen}")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert all(box["width"] > 100 for box in (chart.bounding_box() for chart in page.locator(".chart svg").all()))
    page.close()


def test_a_watched_page_reloads_itself_as_it_stands(browser, tmp_path: Path) -> None:
    collection = script.Collection(tmp_path, tmp_path)
    write_clustering(tmp_path / "amortised_clustering" / "first.part", 0.5)
    collection.write(1)
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    page.get_by_label("show first").check()
    page.locator("#logs summary").click()
    (tmp_path / "amortised_clustering" / "first.part").rename(tmp_path / "amortised_clustering" / "first")
    write_clustering(tmp_path / "amortised_clustering" / "second", 0.6)
    collection.write(1)
    page.get_by_label("show second").wait_for()
    assert page.get_by_label("show first").is_checked() and "reloads itself" in page.inner_text("#summary")
    assert page.get_by_label("show first").is_checked() and not page.locator("#logs pre").is_visible()
    page.close()
