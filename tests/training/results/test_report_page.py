"""The report page: complete in itself, right about what differs and who is ahead, safe from names, clear on faults."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_runs import DIGITS, add_evaluation, make_history, make_run

from training import cli
from training.results.comparison import format_comparison, write_comparison
from training.results.history import History, read_metrics
from training.results.report import write_report
from training.results.report.__main__ import main
from training.results.report.charts import Chart, Line, chart_svg, cut_above
from training.results.report.curves import phases_of, time_parts
from training.results.report.settings import differing_settings

pytestmark = pytest.mark.timeout(120)
VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements in order as (tag, attributes), and the text of the page, without its style."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.parts: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write(*runs: Path) -> Page:
    return Page(write_report(runs))


def rows(page: Page) -> list[list[str]]:
    """The rows of all tables, as the texts of their cells."""
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page.source)]
    return [[re.sub(r"<[^>]*>", "", cell).strip() for cell in row] for row in cells]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs: as the recipe is, and with SAM off, MixUp's alpha and the seed changed."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = ("algorithms.sam=null", "algorithms.mixup.alpha=0.7", "seed=3")
    fast = make_history(top1=0.8, seconds=1.0)
    return make_run(folder / "as_it_is"), make_run(folder / "changed", *overrides, history=fast)


class TestPage:
    def test_needs_nothing_else(self, pair):
        add_evaluation(pair[0])
        page = write(*pair)
        attributes = [(tag, name, value or "") for tag, given in page.elements for name, value in given.items()]
        assert not [one for one in attributes if "//" in one[2] and not one[2].startswith("data:image/png;base64,")]
        assert not [one for one in attributes if one[1] in ("src", "href") and not one[2].startswith(("data:", "#"))]
        style = re.findall(r"<style>(.*?)</style>", page.source, flags=re.DOTALL)
        assert len(style) == 1
        assert not re.search(r"url\(|@import|//", style[0])
        assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base"}
        ids = [given["id"] for _, given in page.elements if "id" in given]
        assert len(ids) == len(set(ids))
        targets = {value.removeprefix("#") for _, name, value in attributes if name == "href"}
        assert targets <= set(ids)

    def test_shows_what_the_run_was(self, pair):
        page = write(pair[0])
        for text in ("85.00 %", "12.0 s", "12,345", "blurpool, channels_last, label_smoothing", "as_it_is"):
            assert text in page.text.replace("_ ", "_"), text
        assert ["1–3", "16", "64", "0.4 → 0.4", "6.0 s", "611", "80.00 %"] in rows(page)
        assert ["4–6", "32", "64", "0.4 → 0.4", "6.0 s", "206", "85.00 %"] in rows(page)
        assert ["training, epochs 1–3 at 16 px", "6.0 s", "30.0 %"] in rows(page)
        assert ["start, evaluation, checkpoints", "8.0 s", "40.0 %"] in rows(page)
        assert len(page.all("svg")) == 8
        assert "Settings that differ" not in page.text
        assert "progressive_resizing:" in page.text or '"progressive_resizing"' in page.text  # the recipe

    def test_charts_are_named_and_described(self, pair):
        page = write(*pair)
        ids = {given.get("id") for _, given in page.elements}
        for svg in page.all("svg"):
            assert svg["role"] == "img"
            assert set(str(svg["aria-labelledby"]).split()) <= ids
        assert "Top-1 accuracy (%) by epoch. A training: 10.00 % at first, 60.00 % at the end" in page.text
        assert "B 75.00 %" in page.text  # the label of a line

    def test_two_runs_side_by_side(self, pair):
        page = write(*pair)
        table = rows(page)
        assert ["algorithms.sam", "A on rho 0.1, adaptive false, interval 4, perturbation global", "B off"] in table
        assert ["algorithms.mixup.alpha", "A 0.2", "B 0.7"] in table
        assert ["seed", "A 0", "B 3"] in table
        assert sum(row[0].startswith(("algorithms.", "data.", "model.", "optimizer.")) for row in table if row) == 2
        assert ["top-1", "85.00 % best", "75.00 %"] in table
        assert ["training time", "12.0 s", "6.0 s best"] in table
        verdict = format_comparison({n: json.loads((r / "summary.json").read_text()) for n, r in zip(
            ("as_it_is", "changed"), pair, strict=True)}).splitlines()[-1]  # fmt: skip
        assert verdict in page.text

    def test_takes_the_labels_of_its_own_comparison_only(self, pair, tmp_path):
        summaries = {
            label: json.loads((run / "summary.json").read_text())
            for label, run in zip(("speed-ups on", "all off"), pair, strict=True)
        }
        histories = {
            label: History(read_metrics(run / "metrics.csv")) for label, run in zip(summaries, pair, strict=True)
        }
        write_comparison(histories, summaries, pair[0])
        try:
            assert "'speed-ups on' is ahead of 'all off' in top-1" in write(*pair).text
            other = make_run(tmp_path / "other")
            assert "'as_it_is' is ahead" in write(pair[0], other).text or "Top-1 is equal" in write(pair[0], other).text
            assert "speed-ups on" not in write(pair[0], other).text
        finally:
            (pair[0] / "compare.json").unlink()

    def test_three_runs(self, pair, tmp_path):
        page = write(*pair, make_run(tmp_path / "third", history=make_history(top1=0.95)))
        assert "Highest top-1: 'third' (90.00 %)." in page.text
        assert "Shortest training: 'changed' (6.0 s)." in page.text
        assert ["seed", "A 0", "B 3", "C 0"] in rows(page)

    def test_runs_of_one_name_are_told_apart_by_their_folders(self, tmp_path):
        one, two = make_run(tmp_path / "a" / "same"), make_run(tmp_path / "b" / "same")
        assert f"{tmp_path}/a/same" in write(one, two).text.replace("/ ", "/").replace("_ ", "_")

    def test_times_of_different_machines_do_not_compare(self, pair, tmp_path):
        gpu = make_run(tmp_path / "gpu", hardware={"gpus": {"H200": 8}})
        assert "different machines" in write(pair[0], gpu).text
        assert "different machines" not in write(*pair).text


class TestEvaluation:
    def test_is_embedded(self, tmp_path):
        run = make_run(tmp_path / "run")
        add_evaluation(run)
        page = write(run)
        images = page.all("img")
        assert [image["alt"] for image in images] == [
            "Confusion matrix: true class by predicted class, run", "Mistakes, the most confident first, run",
            "Calibration: accuracy by confidence, run", "Accuracy by image size, run",
        ]  # fmt: skip
        table = rows(page)
        assert ["top-1", "97.21 %"] in table
        assert ["checkpoint", "best.pt (averaged weights)"] in table
        assert ["eight", "91.23 %", "99.00 %", "35", "three"] in table
        assert ["16", "95.13 %", "n/a", "0.3000"] in table
        assert ["calibration error", "1.23 %"] in table
        assert "3 more are in evaluation.json" in page.text
        assert "evaluate.py" not in page.text

    def test_of_nulls(self, tmp_path):
        run = make_run(tmp_path / "run")
        add_evaluation(
            run, **dict.fromkeys(("images", "classes", "top1", "loss", "sizes", "worst_classes", "mistakes"))
        )
        assert ["top-1", "n/a"] in rows(write(run))

    def test_one_size_is_not_a_comparison_of_sizes(self, tmp_path):
        run = make_run(tmp_path / "run")
        add_evaluation(run, sizes=[{"image_size": 20, "top1": 0.9721, "top5": None, "loss": 0.21}])
        page = write(run)
        assert len(page.all("img")) == 3
        assert "By image size" not in page.text

    def test_is_asked_for_where_it_is_missing(self, tmp_path):
        run = make_run(tmp_path / "a run")
        assert f"python evaluate.py '{run}'" in write(run).text


def test_names_cannot_inject_anything(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>$\\frac{a}$ & \"quoted\" 'too'"
    run = make_run(tmp_path / "run", run_name=evil, versions={evil: evil}, hardware={"cpu": evil})
    add_evaluation(
        run,
        checkpoint=evil,
        split=evil,
        worst_classes=[{"class": evil, "mistaken_for": evil}],
        mistakes=[{"label": evil, "predicted": evil}],
    )
    with (run / "recipe.yaml").open("a") as file:
        file.write(f"\n# {evil}\n")
    page = write(run, make_run(tmp_path / "other"))
    assert not page.all("script")
    assert len(page.all("img")) == 4
    assert not [name for _, given in page.elements for name in given if name.startswith("on")]
    assert evil in page.text.replace("_ ", "_").replace("/ ", "/")


class TestFaults:
    def fails(self, capsys, *arguments: str) -> str:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("report: ")
        assert err.count("\n") == 1
        return err

    def test_no_such_run(self, tmp_path, capsys):
        assert "no such run" in self.fails(capsys, str(tmp_path / "none"))

    def test_no_runs_folder(self, tmp_path, capsys):
        assert "has no recipe.yaml" in self.fails(capsys, str(tmp_path))

    def test_in_its_first_epoch(self, tmp_path, capsys):
        run = make_run(tmp_path / "run")
        (run / "metrics.csv").unlink()
        assert "first epoch" in self.fails(capsys, str(run))

    def test_under_way(self, tmp_path, capsys):
        run = make_run(tmp_path / "run")
        (run / "summary.json").unlink()
        assert "after 6 of 30 epochs the run is under way" in self.fails(capsys, str(run))
        assert not (run / "report.html").exists()

    def test_continued_since(self, tmp_path, capsys):
        run = make_run(tmp_path / "run", epochs=5)
        assert "about 5 epochs, and metrics.csv has 6" in self.fails(capsys, str(run))

    @pytest.mark.parametrize("name", ["summary.json", "evaluation/evaluation.json", "compare.json"])
    @pytest.mark.parametrize("content", ['{"top1": 0.9', "[]", "[" * 100_000, "\x00\xff"], ids=range(4))
    def test_damaged_json(self, tmp_path, capsys, name, content):
        run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
        (run / "evaluation").mkdir()
        (run / name).write_text(content, encoding="latin-1")
        assert f"{name} is damaged" in self.fails(capsys, str(run), str(other))

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("summary.json", '{"top1": "high", "epochs": 6}'),
            ("summary.json", '{"epochs": 6, "versions": []}'),
            ("evaluation/evaluation.json", '{"top1": [1]}'),
            ("evaluation/evaluation.json", '{"sizes": 3}'),
            ("evaluation/evaluation.json", '{"mistakes": [{"confidence": "much"}]}'),
            ("evaluation/confusion.png", "no picture"),
            ("metrics.csv", "epoch,train_loss\n1,much\n"),
            ("metrics.csv", "epoch,train_loss\n"),
            ("metrics.csv", "1,2,3\n4,5,6,7\n"),
            ("metrics.npz", "PK not a zip"),
            ("recipe.yaml", "a: [1"),
            ("recipe.yaml", "just text"),
        ],
    )
    def test_damaged_files(self, tmp_path, capsys, name, content):
        run = make_run(tmp_path / "run")
        (run / "evaluation").mkdir()
        (run / name).write_text(content)
        assert f"{name} is damaged" in self.fails(capsys, str(run))

    def test_too_many_runs(self, pair, capsys):
        assert "9 runs were given; a page takes 1 to 8" in self.fails(capsys, *[str(pair[0])] * 9)

    def test_nowhere_to_write(self, pair, capsys, tmp_path):
        assert "is a folder" in self.fails(capsys, str(pair[0]), "-o", str(tmp_path))
        (tmp_path / "file").touch()
        assert "file" in self.fails(capsys, str(pair[0]), "-o", str(tmp_path / "file" / "page.html"))

    def test_interrupt(self, pair, monkeypatch):
        def interrupted(*given):
            raise KeyboardInterrupt

        monkeypatch.setattr("training.results.report.__main__.write_report", interrupted)
        assert main([str(pair[0])]) == 130


def test_the_command_says_where_the_page_lies(pair, capsys, tmp_path):
    assert main([str(pair[0]), str(pair[1])]) == 0
    assert capsys.readouterr().out == f"{pair[0] / 'report.html'}\n"
    assert main([str(pair[0]), "-o", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").stat().st_size > 10_000


@pytest.mark.filterwarnings("error")
def test_a_run_that_diverged(tmp_path):
    history = make_history()
    for row in history.epochs:
        row.update(train_loss=math.nan, eval_loss=math.inf, eval_top1=None, image_size=None, images_per_second=None)
    history.steps["loss"] = [math.nan] * len(history.steps["loss"])
    page = write(make_run(tmp_path / "run", history=history))
    assert "not measured" in page.text


class TestSettings:
    def test_keys_of_nested_sections(self):
        recipes = [{"data": {"a": 1, "b": [1, {"x": None, "y": 2}]}, "run_name": "p"}, {"data": {"a": 1, "b": []}}]
        (difference,) = differing_settings(recipes)
        assert (difference.key, difference.values) == ("data.b", (("[1, {y: 2}]", ""), ("[]", "")))

    def test_absent_sections(self):
        recipes = [{"algorithms": {"mixup": {"alpha": 1}}, "extra": {"a": 1}}, {"algorithms": None, "extra": {}}]
        assert [(d.key, [value for value, _ in d.values]) for d in differing_settings(recipes)] == [
            ("algorithms.mixup", ["on", "off"]),
            ("extra.a", ["1", "not set"]),
        ]

    def test_algorithms_that_are_off_in_all(self):
        assert differing_settings([{"algorithms": {"sam": None}}, {"algorithms": {}}, {}]) == []


class TestCurves:
    def test_phases_follow_size_and_batch(self):
        history = make_history()
        history.epochs[-1]["global_batch_size"] = 32
        phases = phases_of(history)
        assert [(p.first_epoch, p.last_epoch, p.image_size, p.global_batch_size) for p in phases] == [
            (1, 3, 16, 64),
            (4, 5, 32, 64),
            (6, 6, 32, 32),
        ]
        assert phases[0].images_per_second == pytest.approx((1000 + 500 + 1000 / 3) / 3)

    def test_time_parts_add_up(self):
        history = make_history()
        parts = time_parts(history, seconds=20.0, resumed=False)
        assert sum(part.seconds for part in parts) == pytest.approx(20.0)
        for row in history.epochs:
            row["data_wait_share"] = 0.25
        named = {part.name: part.seconds for part in time_parts(history, seconds=20.0, resumed=True)}
        assert named == {"training": pytest.approx(9.0), "training, waiting for data": pytest.approx(3.0)}

    def test_an_early_spike_does_not_flatten_the_rest(self):
        values = np.array([50.0, *np.linspace(1, 0.5, 19)])
        chart = Chart("c", "Loss", "nats", [Line(np.arange(20.0), values, 0, "loss")], str, from_zero=True)
        assert 1 < (cut_above(chart) or 0) < 2

    def test_labels_do_not_overlap(self):
        lines = [Line(np.arange(3.0), np.full(3, 1 + run / 1000), run, f"{run}", "ABCDEFGH"[run]) for run in range(8)]
        svg = chart_svg(Chart("c", "t", "u", lines, lambda value: f"{value:.2f}"))
        heights = sorted(float(y) for y in re.findall(r'<text[^>]*? y="([\d.]+)"[^>]*>[A-H] 1.0', svg))
        assert len(heights) == 8
        assert np.diff(heights).min() > 12

    def test_a_long_run_stays_small(self):
        steps = np.arange(500_000.0)
        line = Line(steps / 5000, np.sin(steps), 0, "rate")
        assert len(chart_svg(Chart("c", "t", "u", [line], str))) < 60_000


@pytest.mark.timeout(200)
def test_a_comparison_ends_with_its_report(overrides, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    short = [one for one in overrides if "progress_bar" not in one]
    assert cli.main(["-f", str(DIGITS), "--compare", *short, "logging.progress_bar=false"]) == 0
    path = tmp_path / "results" / "digits_medium" / "report.html"
    assert f"\nreport: {path}\n" in capsys.readouterr().out
    page = Page(path)
    assert ["algorithms.channels_last", "A on", "B off"] in rows(page)
    assert "speed-ups on" in page.text
    verdict = json.loads((path.parent / "compare.json").read_text())["verdict"]
    assert verdict in page.text
