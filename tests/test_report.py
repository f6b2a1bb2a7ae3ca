"""The report: right numbers, self-contained, escaped, whole or not there."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nni_plugin.report import Report, Target, before_after, latency_notes, write_report
from nni_plugin.report_plots import plot_history, plot_widths

METRICS = {
    "method": "taylor-fo",
    "model": "resnet20",
    "dataset": "digits",
    "seed": 7,
    "baseline": {"top1": 98.5, "macs": 40_000_000, "params": 270_000, "latency_ms": {"64": 32.0, "1": 2.0}},
    "pruned": {"top1": 98.0, "macs": 20_000_000, "params": 135_000, "latency_ms": {"64": 16.0, "1": 1.0}},
    "top1_before_finetune": 90.0,
    "removed": {"channels": 168, "blocks": 0},
    "seconds": {"score": 1.25, "finetune": 44.0},
}
HISTORY = [
    {"epoch": 1, "phase": "train", "top1": 90.0, "kept": 1.0, "macs_ratio": 1.0},
    {"epoch": 2, "phase": "prune", "top1": 95.0, "kept": 0.8, "macs_ratio": 0.7},
    {"epoch": 3, "phase": "fine-tune", "top1": 98.0, "kept": 0.6, "macs_ratio": 0.5},
]
REPORT = Report(
    title="resnet20 on digits",
    metrics=METRICS,
    command="nni-plugin prune --model resnet20 --seed 7",
    history=HISTORY,
    widths=[("conv1", 8, 16), ("layer1.0.conv1", 16, 16)],
    targets=[Target("MACs kept (share)", 0.5, 0.4991, 0.4992), Target("loss change", None, 0.01, None)],
    machine={"CPU": "Some CPU", "torch": "2.14.1"},
    parity="Masked and compact differ by 1e-7.",
    load_code='nni_plugin.from_pretrained("out")',
    device="cpu",
    macs_target=0.5,
    notes=["A note."],
    date="2031-02-03 04:05 UTC",
)
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.texts))


def written(tmp_path: Path, report: Report) -> tuple[str, Page]:
    path = tmp_path / "report.html"
    write_report(path, report)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_before_after_numbers():
    rows = {row.quantity: (row.before, row.after, row.change) for row in before_after(METRICS)}
    assert rows == {
        "Top-1 (%)": ("98.50", "98.00", "\u22120.50 points"),
        "Top-1 before fine-tuning (%)": ("98.50", "90.00", "\u22128.50 points"),
        "MACs (M, per image)": ("40.00", "20.00", "0.500"),
        "Parameters (M)": ("0.2700", "0.1350", "0.500"),
        "Latency at batch 1 (ms)": ("2.000", "1.000", "0.500"),
        "Throughput at batch 1 (images/s)": ("500", "1\u202f000", "2.000"),
        "Latency at batch 64 (ms)": ("32.00", "16.00", "0.500"),
        "Throughput at batch 64 (images/s)": ("2\u202f000", "4\u202f000", "2.000"),
    }
    assert list(rows)[-4:-2] == ["Latency at batch 1 (ms)", "Throughput at batch 1 (images/s)"]


def test_ratio_measured_in_turns_goes_before_the_quotient():
    rows = {row.quantity: row.change for row in before_after(METRICS | {"latency_ratio": {"1": 0.8}})}
    assert rows["Latency at batch 1 (ms)"] == "0.800"
    assert rows["Throughput at batch 1 (images/s)"] == "1.250"
    assert rows["Latency at batch 64 (ms)"] == "0.500"


def test_a_change_measured_in_turns_is_said_to_be(tmp_path):
    said = "timed in turns, and need not be the quotient of the two columns"
    assert said in written(tmp_path, replace(REPORT, metrics=METRICS | {"latency_ratio": {"1": 0.5}}))[1].text
    assert said not in written(tmp_path, REPORT)[1].text


def sized(macs: float, ms: float) -> dict:
    before = {"macs": 1000, "latency_ms": {"1": 2.0}}
    return {"baseline": before, "pruned": {"macs": round(1000 * macs), "latency_ms": {"1": 2.0 * ms}}}


@pytest.mark.parametrize(
    ("macs", "latency", "said"),
    [
        (0.6, 0.95, "latency at batch 1 only to 0.950"),
        (0.6, 0.91, "latency at batch 1 only to 0.910"),
        (0.6, 0.89, None),
        (0.5, 1.2, "latency at batch 1 to 1.200"),
        (0.9, 0.98, "latency at batch 1 only to 0.980"),
        (0.95, 1.0, None),  # too little went for a clock to see
        (1.0, 1.1, None),
    ],
)
def test_macs_that_fell_without_the_latency_are_said_with_both_figures(macs, latency, said):
    notes = latency_notes(sized(macs, latency))
    assert len(notes) == (said is not None)
    if said:
        assert f"MACs fell to {macs:.3f} of the dense network, {said}:" in notes[0]


def test_each_batch_size_is_looked_at_and_turns_go_before_the_quotient():
    metrics = METRICS | {"latency_ratio": {"1": 0.97, "64": 0.55}}
    [note] = latency_notes(metrics)
    assert "MACs fell to 0.500" in note
    assert "batch 1 only to 0.970" in note
    assert latency_notes(METRICS) == []
    assert latency_notes({"baseline": {"macs": 0}, "pruned": {}}) == latency_notes({}) == []


def test_no_cause_is_told_of_a_time_that_is_uncertain():
    certain = sized(0.6, 0.95) | {"latency_ratio": {"1": 0.95}, "latency_ratio_iqr": {"1": 0.02}}
    [note] = latency_notes(certain)
    assert "took little time" in note
    [note] = latency_notes(certain | {"latency_ratio_iqr": {"1": 0.31}})
    assert "took little time" not in note
    assert "0.950 of the dense network's, is uncertain" in note
    assert "interquartile range of 0.310" in note


def test_a_report_says_that_latency_did_not_follow(tmp_path):
    write_report(tmp_path / "report.html", replace(REPORT, metrics=METRICS | {"latency_ratio": {"1": 0.97}}))
    html = (tmp_path / "report.html").read_text()
    assert "<li>MACs fell to 0.500 of the dense network, latency at batch 1 only to 0.970:" in html
    assert "<li>A note.</li>" in html


def test_missing_values_are_dashes_and_equal_accuracy_has_no_minus():
    rows = before_after({"baseline": {"top1": 98.0}, "pruned": {"top1": 97.999}})
    assert rows[0].change == "+0.00 points"
    assert (rows[1].before, rows[1].change) == ("\u2013", "\u2013")


def test_page_shows_everything(tmp_path):
    html, page = written(tmp_path, REPORT)
    for text in (
        "resnet20 on digits", "taylor-fo", "digits", "2031-02-03 04:05 UTC", "168 channels", "A note.",
        "50.0\u00a0% of the MACs", "98.50\u00a0% to 98.00\u00a0%", "0.4991", "0.4992", "loss change",
        "Some CPU", "Masked and compact differ by 1e-7.", 'nni_plugin.from_pretrained("out")',
        "nni-plugin prune --model resnet20 --seed 7", "Seed 7", "layer1.0.conv1", "8 / 16",
        "test top-1 (%)", "before pruning", "MACs asked for", "score\u00a01.2\u00a0s",
    ):  # fmt: skip
        assert text in page.text, text
    assert "blocks" not in page.text.split("Before and after")[0]  # none were removed
    assert page.tags.count("svg") == 2
    assert len(html) < 100_000


def test_page_asks_for_nothing_from_outside(tmp_path):
    html, page = written(tmp_path, REPORT)
    assert not {"script", "link", "img", "iframe", "object", "image", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in {"src", "srcset", "data", "action"}
        assert not name.startswith("on")
        if name.endswith("href"):
            assert value.startswith("#")
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s<>]+", html)) <= namespaces


def test_names_in_the_page_are_unique_and_references_resolve(tmp_path):
    _, page = written(tmp_path, REPORT)
    names = [value for name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    used = {value[1:] for name, value in page.attributes if name.endswith("href")}
    used |= {m for _, value in page.attributes for m in re.findall(r"url\(#([^)]*)\)", value)}
    assert used <= set(names)


def test_figures_follow_the_colours_of_the_page(tmp_path):
    html, _ = written(tmp_path, REPORT)
    figures = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert "currentColor" in figures
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", figures)) == set()
    for name in set(re.findall(r"var\((--\w+)\)", html)):
        assert len(re.findall(rf"{name}: #", html)) == 3, name  # light, dark, print


def test_everything_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>&$a_b$'
    report = replace(
        REPORT, title=evil, metrics=METRICS | {"model": evil}, command=evil, parity=evil, load_code=evil,
        widths=[(evil, 1, 2)], notes=[evil], machine={evil: evil}, device=evil,
        targets=[Target(evil, 1, 1, 1)], history=[row | {"phase": evil} for row in HISTORY],
    )  # fmt: skip
    html, page = written(tmp_path, report)
    assert "script" not in page.tags
    assert "<script" not in html
    assert page.text.count(evil) >= 10


def test_long_runs_stay_small_and_say_what_is_left_out(tmp_path):
    history = [{"step": i, "kept": 1 - i / 30_000, "loss": 1.0} for i in range(20_000)]
    for i in range(999, 20_000, 1000):
        history[i]["top1"] = 90 + i / 4000
    widths = [(f"stages.{i}.blocks.{i}.a_rather_long_name.conv", i + 1, 300) for i in range(150)]
    html, page = written(tmp_path, replace(REPORT, history=history, widths=widths))
    assert len(html.encode()) < 300_000
    assert "20 of 20000 rows" in page.text
    assert "80 of 150 layers" in page.text
    assert "minibatch" in page.text
    assert all(name in page.text for name, _, _ in widths)


def test_figure_of_widths_shows_the_most_cut_in_order():
    widths = [(f"layer{i}", 100 - i, 100) for i in range(100)]
    svg, shown = plot_widths(widths)
    assert shown == 80
    assert "layer19<" not in svg
    assert svg.index("layer20<") < svg.index("layer99<")
    assert plot_widths([]) == ("", 0)


def test_history_without_two_points_gives_no_figure():
    assert plot_history([{"epoch": 1, "top1": 90.0}]) == ""
    assert plot_history([]) == ""
    svg = plot_history([{"epoch": 1, "top1": 90.0}, {"epoch": 2, "top1": float("nan")}, {"epoch": 3, "top1": 91.0}])
    assert svg.startswith("<svg")
    assert "kept (%)" not in svg


def test_same_report_same_bytes(tmp_path):
    assert written(tmp_path, REPORT)[0] == written(tmp_path, REPORT)[0]


def test_little_is_enough(tmp_path):
    _, page = written(tmp_path, Report(title="bare", metrics={}))
    assert "Accuracy over time" not in page.text
    assert "Run it again" not in page.text


def test_without_matplotlib_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_report(tmp_path / "report.html", REPORT) is False
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "svg" not in page.tags
    assert 'pip install "nni-plugin[plots]"' in page.text
    assert "layer1.0.conv1" in page.text  # the numbers are there all the same


def test_a_failed_write_keeps_the_earlier_file(monkeypatch, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("earlier")

    def replace_file(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nni_plugin.report.os.replace", replace_file)
    with pytest.raises(OSError, match="No space left"):
        write_report(path, REPORT)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "earlier"
