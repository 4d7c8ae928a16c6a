"""The report as one reads it: in a browser without network, at the width of a phone and of a desk, by day and by night."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from gandist.config_file import load_config
from gandist.errors import ReportError
from gandist.report import runs
from gandist.report.__main__ import main, write
from gandist.report.runs import read_runs
from gandist.tracking import run_folder
from tests.ranks import run_command

CHROMIUM = shutil.which("chromium")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="without Debian's chromium")
PHONE, DESK = 390, 1400
CLASSES = ["cat", "<b>dog</b> &", "</script><script>alert(1)</script>"]


def rows(path: Path, *content: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


def make_run(folder: Path, *overrides: str, shade: int = 0, seconds: float = 1.0) -> Path:
    """A run of three classes: 8 intervals of 1 kimg and `seconds` each, 4 sample grids, two evaluations and a best one."""
    (folder / "samples").mkdir(parents=True)
    config = load_config(None, ["data.num_classes=3", f"run_dir={folder}", *overrides])
    (folder / "config.yaml").write_text(config.to_yaml())
    losses = [2.0, 0.5, 1.5, float("nan"), 1.0, 0.25, 0.75, 0.5]
    rows(
        folder / "metrics.jsonl",
        *(
            {"step": 10 * k, "kimg": k, "loss/discriminator": loss, "lr/generator": 1e-3}
            | {"throughput/images_per_second": 1000 / seconds}
            for k, loss in enumerate(losses, 1)
        ),
    )
    for k in (2, 4, 6, 8):
        Image.new("L", (64, 64), shade + 20 * k).save(folder / "samples" / f"step-{10 * k:08d}.png")
    Image.new("L", (64, 64), 255).save(folder / "samples" / "real.png")
    made = {"seed": 0, "n_real": 1437, "n_fake": 2000, "extractor": "digits-judge"}
    evaluations = []
    for k, value in ((4, 9.0), (8, 3.0)):
        at = {"step": 10 * k, "kimg": k}
        evaluations += [
            {"metric": "eval/fd_classifier", "value": value, "spread": 0.5, **at, **made},
            {"metric": "eval/gan_test/per_class", **at, "value": [0.1, 0.2, 0.3125]},
            {"metric": "classification/per_class", **at, "precision": [1, 0.5, 0], "recall": [1, 1, 0], "f1": [1, 0.66, 0]},
            {"metric": "classification/confusion", **at, "value": [[k, 0, 0], [0, 5, 5], [0, 1, 1]]},
        ]
    evaluations.append({"metric": "best/fd_classifier", "value": 3.25, "step": 80, "kimg": 8, **made, "seed": 1})
    rows(folder / "evaluations.jsonl", *evaluations)
    rows(
        folder / "starts.jsonl",
        {
            "time": "2026-11-23T10:40:00+00:00",
            "command": f"torchrun --nproc_per_node=2 -m gandist.train run_dir={folder}",
            "world_size": 2,
            "device": "cpu",
            "versions": {"torch": "2.15.0"},
            "class_names": CLASSES,
            "data": {"train": 1437, "class_counts": [400, 500, 537]},
            "networks": {"generator": {"parameters": 108881, "flops": 5000000}},
        },
    )
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "first")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> tuple[Path, Path]:
    """Of one run, and of two that differ in two keys and in speed."""
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / "first")
    second = make_run(folder / "second", "loss.r1_gamma=0.125", "optimizer.betas=[0.5,0.9]", shade=60, seconds=2.0)
    main([str(first)])
    main([str(first), str(second), "--output", str(folder / "two.html")])
    return first / "report.html", folder / "two.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, path: Path, width: int = DESK, scheme: str = "light") -> Iterator[Page]:
    """The page. At the end: it asked for nothing but itself, and had nothing to complain of."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length")
    yield page
    page.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]


def curves(page: Page, metric: str) -> list[str]:
    """The lines that are drawn in the plot of a metric."""
    return page.eval_on_selector_all(
        f'[data-metric="{metric}"] .trace path.js-line', "lines => lines.map(line => line.getAttribute('d'))"
    )


def table(page: Page, selector: str) -> list[list[str]]:
    return page.eval_on_selector(selector, "table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText))")


@in_browser
def test_every_curve_is_drawn_and_follows_the_controls(browser: Browser, reports) -> None:
    loss = "loss/discriminator"
    with opened(browser, reports[0]) as page:
        plots = page.eval_on_selector_all(".plot", "plots => plots.map(plot => plot.dataset.metric)")
        assert plots == ["eval/fd_classifier", loss, "lr/generator", "throughput/images_per_second"]
        for metric in plots:
            assert [line.startswith("M") and len(line) > 5 for line in curves(page, metric)] == [True], metric

        linear = curves(page, loss)
        page.check("#log")
        assert len(logarithmic := curves(page, loss)) == 1
        assert logarithmic != linear
        page.uncheck("#log")
        assert curves(page, loss) == linear

        page.fill("#smoothing", "0.9")
        raw, smooth = curves(page, loss)
        assert raw != smooth
        drawn = page.eval_on_selector(f'[data-metric="{loss}"]', "plot => plot.data.map(trace => [...trace.y])")
        assert drawn[0] == [2.0, 0.5, 1.5, None, 1.0, 0.25, 0.75, 0.5]
        assert drawn[1][3] is None
        assert drawn[1][:2] == pytest.approx([2.0, (0.9 * 2.0 + 0.5) / 1.9])

        rates = page.eval_on_selector('[data-metric="lr/generator"]', "plot => plot.layout.yaxis.range")
        assert rates == [0, 0.002], "a constant curve can be read"

        page.check("input[value=hours]")
        axis = page.eval_on_selector(f'[data-metric="{loss}"]', "plot => [...plot.data[0].x]")
        assert axis == pytest.approx([k / 3600 for k in range(1, 9)], rel=1e-5)
        assert page.text_content(f'[data-metric="{loss}"] .xtitle') == "hours"


@in_browser
def test_the_slider_goes_through_the_samples(browser: Browser, reports) -> None:
    with opened(browser, reports[0]) as page:
        seen = []
        for position in range(4):
            page.fill("#moment", str(position))
            page.wait_for_function("document.querySelector('img.grid').naturalWidth == 64")
            seen.append((page.get_attribute("img.grid", "src"), page.inner_text("figcaption .when")))
        assert [when for _, when in seen] == [f"step {10 * k}, kimg {k}" for k in (2, 4, 6, 8)]
        assert len({source for source, _ in seen}) == 4
        assert page.eval_on_selector("img.real", "image => image.naturalWidth") == 64


@in_browser
def test_values_and_classes_are_told_in_full(browser: Browser, reports) -> None:
    with opened(browser, reports[0]) as page:
        assert table(page, "#made") == [
            ["metric", "value", "kimg", "generated", "real", "extractor", "seed"],
            ["eval/fd_classifier", "3.0000 ± 0.5000", "8", "2,000", "1,437", "digits-judge", "0"],
        ]
        assert table(page, "#best")[1][:2] == ["best/fd_classifier", "3.2500"]
        head, *per_class = table(page, ".per-class")
        assert head == ["class", "training images", "gan_test", "precision", "recall", "f1"]
        assert [row[0] for row in per_class] == CLASSES
        assert per_class[2][1:] == ["537", "0.3125", "0", "0", "0"]
        assert page.eval_on_selector(".confusion", "plot => plot.data[0].z") == [[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]]
        assert page.locator(".confusion .hm image").count() == 1
        counts = page.eval_on_selector_all(".confusion .heatmap-label", "texts => texts.map(text => text.textContent)")
        assert sorted(counts) == sorted(map(str, [8, 0, 0, 0, 5, 5, 0, 1, 1]))
        assert "<b>dog</b> &" in page.eval_on_selector_all(
            ".confusion .ytick text", "texts => texts.map(text => text.textContent)"
        )
        text = page.inner_text("body")
        assert "108,881 parameters" in text
        assert "torchrun --nproc_per_node=2 -m gandist.train run_dir=" in text
        page.click("summary")
        assert "discriminator_lr: 0.001" in page.inner_text("details pre")


@in_browser
def test_two_runs_are_compared(browser: Browser, reports) -> None:
    with opened(browser, reports[1]) as page:
        assert page.eval_on_selector_all("h1 .run", "names => names.map(name => name.innerText)") == ["first", "second"]
        assert len(curves(page, "loss/discriminator")) == 2
        legend = page.eval_on_selector_all(
            '[data-metric="loss/discriminator"] .legendtext', "all => all.map(one => one.textContent)"
        )
        assert legend == ["first", "second"]
        assert table(page, "#final") == [
            ["metric", "first", "second"],
            ["eval/fd_classifier", "3.0000 ± 0.5000", "3.0000 ± 0.5000"],
        ]
        assert table(page, "#differences") == [
            ["differs", "first", "second"],
            ["loss.r1_gamma", "0.0", "0.125"],
            ["optimizer.betas", "0.0, 0.9", "0.5, 0.9"],
        ]
        assert page.locator("#differences .differs").count() == 2
        page.check("input[value=hours]")
        ends = page.eval_on_selector('[data-metric="lr/generator"]', "plot => plot.data.map(trace => trace.x.at(-1))")
        assert ends[1] == pytest.approx(2 * ends[0], rel=1e-5)
        pictures = page.eval_on_selector_all("img.grid", "images => images.map(image => image.src)")
        assert len({*pictures}) == 2
        assert page.locator("img.real").count() == 1, "the same real images are shown once"


@in_browser
@pytest.mark.parametrize("which", [0, 1], ids=["one", "two"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_scrolls_sideways(browser: Browser, reports, which: int, width: int) -> None:
    with opened(browser, reports[which], width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        right = page.eval_on_selector_all(
            "figure, .plot svg", "all => Math.max(...all.map(one => one.getBoundingClientRect().right))"
        )
        assert right <= width


@in_browser
def test_the_scheme_of_the_system_is_followed(browser: Browser, reports) -> None:
    look = """() => [
        getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector('.plot .xtick text')).fill,
        getComputedStyle(document.querySelector('.plot path.js-line')).stroke,
    ]"""
    with opened(browser, reports[0], scheme="dark") as page:
        dark = page.evaluate(look)
    with opened(browser, reports[0]) as page:
        light = page.evaluate(look)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(f"dark => JSON.stringify(({look})()) === JSON.stringify(dark)", arg=dark)
    assert all(day != night for day, night in zip(light, dark, strict=True))
    brightness = [sum(map(int, each[0].strip("rgb()").split(","))) for each in (light, dark)]
    assert brightness[0] > 600 > 150 > brightness[1]


@in_browser
def test_a_run_that_has_just_begun(browser: Browser, run_dir: Path) -> None:
    for name in ("evaluations.jsonl", "starts.jsonl"):
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "samples")
    first, *_ = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text(first + '{"step": 20, "kimg": 2, "loss/disc')
    main([str(run_dir)])
    with opened(browser, run_dir / "report.html", PHONE) as page:
        assert page.eval_on_selector('[data-metric="loss/discriminator"]', "plot => [...plot.data[0].y]") == [2.0]
        assert page.locator('[data-metric="loss/discriminator"] .point').count() == 1, "one value is a dot, as it is no line"
        text = page.inner_text("body")
        assert "Nothing was evaluated yet." in text
        assert "first has no samples yet." in text
        assert f"python -m gandist.train --config {run_dir}/config.yaml" in text


def test_hours_count_no_pauses_and_bridge_unknown_rates(run_dir: Path) -> None:
    rate = "throughput/images_per_second"
    rows(
        run_dir / "metrics.jsonl",
        {"step": 1, "kimg": 36.0},
        {"step": 2, "kimg": 72.0, rate: 10.0},
        {"step": 3, "kimg": 108.0, rate: float("nan")},
        {"step": 4, "kimg": 144.0, rate: 20.0},
    )
    (run,) = read_runs([run_dir])
    assert run.hours == pytest.approx([1.0, 2.0, 3.0, 3.5])
    assert run.curves()[rate]["hours"] == pytest.approx([2.0, 3.0, 3.5])
    rows(run_dir / "metrics.jsonl", {"step": 1, "kimg": 36.0})
    assert read_runs([run_dir])[0].hours is None


def test_many_and_large_pictures_are_thinned_out(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "samples")
    (run_dir / "samples").mkdir()
    for step in range(1, 201):
        Image.new("L", (8, 8), step).save(run_dir / "samples" / f"step-{step:08d}.png")
    Image.effect_noise((2000, 3000), 100).save(run_dir / "samples" / "step-00000200.png")
    (run,) = read_runs([run_dir])
    steps = [grid.step for grid in run.grids]
    assert len(steps) == 40
    assert (steps[0], steps[-1]) == (1, 200)
    assert {b - a for a, b in pairwise(steps)} == {5, 6}
    assert [grid.kimg for grid in run.grids] == pytest.approx([step / 10 for step in steps]), "as well after the last metrics"
    assert run.grids[0].source.startswith("data:image/png;")
    assert run.grids[-1].source.startswith("data:image/jpeg;")
    main([str(run_dir)])
    assert "40 of 200 pictures" in (run_dir / "report.html").read_text()


def test_runs_of_one_name_are_told_apart_and_none_is_read_twice(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    assert [run.name for run in read_runs([a, b, a / ".." / "run"])] == [str(a / ".." / "run"), str(b)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: shutil.rmtree(run), "is no run: there is no config.yaml in it"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics yet"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1'), "has no metrics yet"),
        (lambda run: (run / "config.yaml").write_text("a: [\n"), "config.yaml is not valid YAML"),
        (lambda run: (run / "samples" / "step-00000080.png").write_bytes(bytes(2_000_000)), "step-00000080.png is damaged"),
    ],
)
def test_what_is_wrong_with_a_run_is_said(run_dir: Path, spoil, message: str) -> None:
    spoil(run_dir)
    with pytest.raises(ReportError, match=message):
        main([str(run_dir)])
    assert not list(run_dir.glob("report*"))


def test_a_damaged_line_is_skipped(run_dir: Path, capsys) -> None:
    for name, line in (("metrics.jsonl", '{"step": 1}'), ("evaluations.jsonl", "[]")):
        (run_dir / name).write_text(f"{line}\n\0\0\n{(run_dir / name).read_text()}")
    main([str(run_dir)])
    out = capsys.readouterr().out
    assert re.findall(r"warning: \S+/(\S+), line (\d), is damaged and skipped", out) == [
        ("metrics.jsonl", "1"),
        ("metrics.jsonl", "2"),
        ("evaluations.jsonl", "1"),
        ("evaluations.jsonl", "2"),
    ]
    assert (run_dir / "report.html").exists()


def test_the_command_fails_in_one_line_and_leaves_nothing(run_dir: Path) -> None:
    (run_dir / "report.html").mkdir()
    before = sorted(run_dir.iterdir())
    result = run_command(sys.executable, "-X", "importtime", "-m", "gandist.report", str(run_dir))
    *imports, error = result.stderr.splitlines()
    assert result.returncode == 1
    assert error == f"error: {run_dir / 'report.html'} cannot be written: Is a directory"
    assert all(line.startswith("import time:") for line in imports)
    assert not any(line.split()[-1] == "torch" for line in imports)
    assert sorted(run_dir.iterdir()) == before


def test_a_report_replaces_the_one_before_only_when_whole(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        write(report, "after" * 100_000 + "\ud800")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
    with pytest.raises(ReportError, match="No such file or directory"):
        write(tmp_path / "missing" / "report.html", "")


def test_names_are_those_that_training_writes() -> None:
    for name in ("METRICS", "EVALUATIONS", "STARTS", "SAMPLES", "REAL"):
        assert getattr(runs, name) == getattr(run_folder, name)


def test_older_configurations_are_shown_as_they_are(run_dir: Path) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config | {"a_key_of_old": "<i>&amp;</i>"}))
    main([str(run_dir)])
    assert "a_key_of_old: &lt;i&gt;&amp;amp;&lt;/i&gt;" in (run_dir / "report.html").read_text()
