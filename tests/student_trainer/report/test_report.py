"""What a report says of runs that helped, did not, or cannot tell; and that its page says the same."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from student_trainer.cli import main
from student_trainer.report.build import draw_losses, format_table, make_report, write_report
from student_trainer.report.drawing import draw_png, draw_svg, make_locator
from student_trainer.report.page import look_up, render
from student_trainer.training.results import Results
from tests.support.made_up import NUM_SEQUENCES, make_results, seeds

CASES = {
    "helped": {"runs/a": make_results(tasks=True)},
    "barely helped": {"runs/a": make_results(distilled=3.97)},
    "did not help": {"runs/a": make_results(distilled=4.2)},
    "unclear": {"runs/a": make_results(distilled=3.999)},
    "no control": {"runs/a": make_results(control=None)},
    "something is wrong": {"runs/a": make_results(shuffled=3.4)},
    "diverged": {"runs/a": make_results(distilled=math.nan)},
    "several": {
        **{
            f"a{name}": run
            for name, run in seeds([0.5, 0.55, 0.45], shuffled=5.0, tasks=True).items()
        },
        **{f"b{n}": r for n, r in seeds([0.3, 0.4], settings={"targets": "top_k:8"}).items()},
    },
}


def said(report: dict[str, Any]) -> str:
    return " ".join(report["sentences"])


@pytest.mark.parametrize("verdict", CASES)
def test_each_case_has_its_verdict(verdict: str):
    assert make_report(CASES[verdict])["verdict"] == verdict


def test_one_run_has_its_numbers_at_the_top():
    report = make_report({"runs/a": make_results(shuffled=5.0, waiting=0.25)})
    assert report["gain"] == pytest.approx(0.6)
    assert report["gap_closed"] == pytest.approx(0.6)
    assert report["shuffled_excess"] == pytest.approx(1.6)
    assert report["waiting_fraction"] == pytest.approx(0.25)
    assert report["received_bytes"] == round(31.25 * report["trained_tokens"])
    assert report["held_out_rows"] == NUM_SEQUENCES * 15
    assert report["curves"]["distilled"][-1] == (100, pytest.approx(3.4))
    assert {"seed 0"} == {"seed " + str(one["seed"]) for one in report["groups"][0]["runs"]}
    assert "gain" in format_table(report)


def test_tasks_are_in_a_table_and_in_report_json():
    report = make_report({"runs/a": make_results(tasks=True, teacher=None, shuffled=math.inf)})
    first, _, last = report["tasks"]
    assert (first["task"], first["metric"], first["higher_is_better"]) == ("sciq", "acc", True)
    assert first["distilled"] == {"value": pytest.approx(0.66), "stderr": 0.013}
    assert first["teacher"] is None
    assert last["shuffled"] == {"value": None, "stderr": None}  # which JSON could not hold
    table = format_table(report).splitlines()
    titles = table.index("task      metric             distilled       control         shuffled")
    assert table[titles + 1 :] == [
        "sciq      acc ↑              0.66 ± 0.013    0.6 ± 0.013     -",
        "sciq      acc_norm ↑         0.6222 ± 0.012  0.5556 ± 0.012  -",
        "wikitext  word_perplexity ↓  29.96           54.6            -",
    ]
    assert "tasks" not in {line.split()[0] for line in table if line}
    (group,) = make_report(seeds([0.5, 0.6], tasks=True))["groups"]
    assert group["tasks"][0]["distilled"]["mean"] == pytest.approx(0.655)
    assert group["tasks"][0]["distilled"]["stderr"] is None
    assert "Tasks of lm-eval." not in render(make_report({"a": make_results()}))


def test_a_single_seed_is_reported_to_prove_little():
    assert "single seed" in said(make_report(CASES["helped"]))
    assert "single seed" not in said(make_report(seeds([0.5, 0.55, 0.45])))


def test_a_gain_within_what_the_held_out_text_resolves_is_not_called_one():
    words = said(make_report(CASES["unclear"]))
    assert "Cannot tell" in words
    assert "Distillation helped" not in words


def test_a_gain_that_is_certain_and_small_barely_helped():
    """In nats it may look like something; what there was to gain decides, where that is known."""
    found = make_report({"a": make_results(teacher=1.0, distilled=3.946)})
    assert found["gain"] > 2 * found["gain_error"]
    assert found["gap_closed"] == pytest.approx(0.018)
    assert found["verdict"] == "barely helped"
    assert "barely helped" in said(found)
    assert "closed 1.8% of the distance to the teacher, and less than 5% is not worth one" in said(
        found
    )
    assert make_report(seeds([0.03, 0.031, 0.032], noise=0.001))["verdict"] == "barely helped"
    unknown = {"teacher": None, "unknown": "not recorded", "noise": 0.01}
    for loss, verdict in ((3.985, "barely helped"), (3.97, "helped")):
        assert make_report({"a": make_results(distilled=loss, **unknown)})["verdict"] == verdict


def test_a_gain_with_less_agreement_than_labels_alone_barely_helped():
    for agreement, verdict in ((0.40, "barely helped"), (0.47, "helped")):  # 0.47: within the error
        found = make_report({"a": make_results(agreement=agreement)})
        assert found["verdict"] == verdict
    found = make_report({"a": make_results(agreement=0.40)})
    assert "agrees with the teacher on 40.0% of the tokens, the control on 48.0%" in said(found)


def test_several_seeds_have_mean_spread_and_interval():
    report = make_report(seeds([0.5, 0.6, 0.4]))
    gain = report["groups"][0]["statistics"]["gain"]
    assert gain["mean"] == pytest.approx(0.5)
    assert gain["spread"] == pytest.approx(0.1)
    # Student's t with two degrees of freedom: 4.303 * 0.1 / sqrt(3).
    assert (gain["low"], gain["high"]) == (
        pytest.approx(0.2516, abs=1e-3),
        pytest.approx(0.7484, abs=1e-3),
    )
    assert "positive in 3 of 3" in said(report)
    assert report["verdict"] == "helped"
    assert "gain" not in report  # of which run would it be?


def test_a_gain_smaller_than_its_spread_is_noise():
    report = make_report(seeds([0.5, -0.4, 0.2]))
    assert report["verdict"] == "unclear"
    assert "smaller than its own spread" in said(report)


def test_two_seeds_that_might_be_chance_are_not_called_certain():
    report = make_report(seeds([0.2, 0.5]))
    assert report["verdict"] == "unclear"
    assert "too few" in said(report)
    assert make_report(seeds([0.40, 0.42]))["verdict"] == "helped"


def test_a_loss_on_every_seed_did_not_help():
    report = make_report(seeds([-0.5, -0.6, -0.4]))
    assert report["verdict"] == "did not help"
    assert "further away" in said(report)


def test_the_same_seed_again_is_counted_once():
    runs = {**seeds([0.5, 0.6]), "again": make_results(seed=0, distilled=3.5)}
    report = make_report(runs)
    assert report["groups"][0]["statistics"]["gain"]["num"] == 2
    assert "counted once" in said(report)


def test_shuffled_targets_as_good_as_the_right_ones_are_called_wrong():
    words = make_report({"a": make_results(shuffled=3.4)})["sentences"]
    assert words[0].startswith("Something is wrong")
    assert "does not come from what the teacher knows" in words[0]
    words = make_report({"a": make_results(distilled=4.0, shuffled=4.0, noise=0.3)})["sentences"]
    assert "student-trainer check" in words[0]


def test_shuffled_targets_between_the_two_are_reported():
    assert "beat labels alone" in said(make_report({"a": make_results(shuffled=3.7)}))
    assert "as it must be" in said(make_report({"a": make_results(shuffled=5.0)}))


def test_a_student_better_than_its_teacher_is_reported():
    report = make_report({"a": make_results(distilled=2.9)})
    assert report["gap_closed"] == pytest.approx(1.1)
    assert "better than its teacher" in said(report)


def test_a_teacher_no_better_than_the_control_leaves_no_gap():
    report = make_report({"a": make_results(teacher=4.0)})
    assert report["gap_closed"] is None
    assert "no gap" in said(report)
    assert "gap_closed" not in [one["name"] for one in report["groups"][0]["pictures"]]


def test_a_teacher_of_unknown_loss_is_reported_as_such():
    report = make_report({"a": make_results(teacher=None, unknown="the text was not recorded")})
    assert report["teacher_loss"] is None
    assert "the text was not recorded" in said(report)
    part = make_report({"a": make_results(unknown="the record holds samples")})
    assert "agrees with the teacher" in said(part)
    assert "is not known: the record holds samples." in said(part)


def test_more_time_for_the_same_steps_and_waiting_are_reported():
    slow = make_results(waiting=0.5)
    distilled = slow.students["distilled"].model_copy(update={"seconds": 24.0, "waiting_s": 12.0})
    slow = slow.model_copy(update={"students": {**slow.students, "distilled": distilled}})
    words = said(make_report({"a": slow}))
    assert "2.0 times as long" in words
    assert "50% of its time waiting" in words


def test_settings_that_differ_are_compared_side_by_side():
    report = make_report(CASES["several"])
    assert [group["label"] for group in report["groups"]] == [
        "targets sampled, kd_weight 1.0, ce_weight 0.0",
        "targets top_k:8, kd_weight 0.7, ce_weight 0.3",  # by default
    ]
    assert "Lowest loss on held-out text: targets sampled" in said(report)
    # What is about the machine makes no other setting.
    same = {
        "a": make_results(),
        "b": make_results(seed=1, settings={"device": "cpu", "ahead": "3"}),
    }
    assert len(make_report(same)["groups"]) == 1


def test_losses_on_different_texts_are_not_compared():
    report = make_report({"a": make_results(), "b": make_results(held_out_digest="0" * 32)})
    assert "cannot be compared" in said(report)
    assert [group["label"] for group in report["groups"]] == [
        "held_out eeeeeeee",
        "held_out 00000000",
    ]


def test_a_setting_that_diverged_is_not_the_best():
    nan = make_results(distilled=math.nan, control=None, settings={"learning_rate": 1.0})
    report = make_report({"a": nan, "b": make_results()})
    assert "Lowest loss on held-out text: learning_rate 0.0003" in said(report)
    assert "All settings diverged" in said(
        make_report({"a": nan, "b": nan.model_copy(update={"data_digest": "0"})})
    )


@pytest.mark.parametrize("verdict", ["helped", "diverged"])
def test_the_first_picture_is_drawn_for_where_a_page_is_too_much(verdict: str, tmp_path: Path):
    draw_losses(tmp_path / "loss.png", make_report(CASES[verdict]))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (3.0, 4.1, [3.0, 3.25, 3.5, 3.75, 4.0]),
        (0.0, 0.053, [0, 0.02, 0.04]),
        (-0.2, 1.06, [0, 0.5, 1.0]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]):
    placed = make_locator().tick_values(low, high)
    inside = {round(float(tick), 9) for tick in placed if low - 1e-9 <= tick <= high + 1e-9}
    assert sorted(inside) == pytest.approx(expected)


def test_the_same_picture_is_the_same_svg():
    for picture in make_report(CASES["helped"])["groups"][0]["pictures"]:
        assert draw_svg(picture, "key") == draw_svg(picture, "key")


@pytest.mark.parametrize("points", [[], [(1.0, math.nan)], [(1e300, -1e300), (math.inf, 1e308)]])
def test_values_that_cannot_be_drawn_do_not_break_a_picture(points: list[tuple[float, float]]):
    pictures = make_report(CASES["helped"])["groups"][0]["pictures"]
    for picture in pictures:
        for line in picture.get("lines", []):
            line["points"], line["seeds"] = points, [{"seed": 0, "points": points}]
            line.pop("counts", None)
        for bar in picture.get("bars", []):
            bar["value"] = points[0][1] if points else 0.0
        assert draw_svg(picture, "key").startswith("<svg")
        assert draw_png(picture).startswith(b"\x89PNG")


def test_a_picture_follows_the_colours_of_the_page():
    """Light and dark are in page.css: an SVG has no colour of its own."""
    page = render(make_report(CASES["several"]))
    svgs = "".join(re.findall(r"<svg .*?</svg>", page, re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", svgs)
    style = page.partition("</style>")[0]
    for name in re.findall(r"var\(--(\w+)\)", svgs):
        assert style.count(f"--{name}:") == 2
    assert "prefers-color-scheme: dark" in style


# The page.


class Shown(HTMLParser):
    """Everything on the page that has a key, and everything that would need a network."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: list[tuple[str, str]] = []
        self.shapes: list[tuple[str, dict[str, str]]] = []
        self.fetched: list[str] = []
        self.figures = self.captions = self.unnamed_pictures = 0
        self.text = ""
        self._key: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.figures += tag == "figure"
        self.captions += tag == "figcaption"
        if tag == "svg" and "aria-hidden" not in found:
            self.unnamed_pictures += not (found.get("role") == "img" and found.get("aria-label"))
        if tag in ("script", "iframe", "object", "img"):
            self.fetched.append(tag)
        for name in ("src", "href", "xlink:href"):
            if name in found and not found[name].startswith(("#", "data:")):
                self.fetched.append(found[name])
        if "data-key" in found:
            if tag == "span":
                self._key = found["data-key"]
            else:
                self.shapes.append((tag, found))

    def handle_endtag(self, tag: str) -> None:
        self._key = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._key is not None:
            self.numbers.append((self._key, data))


def number_of(shown: str) -> tuple[float, float]:
    """A number as it is shown, and how far off rounding may have put it."""
    text = shown.replace(",", "").removesuffix("%")
    scale = 0.01 if shown.endswith("%") else 1.0
    mantissa, _, exponent = text.partition("e")
    digits = len(mantissa.partition(".")[2])
    return float(text) * scale, 0.501 * 10 ** (int(exponent or 0) - digits) * scale


@pytest.mark.parametrize("verdict", CASES)
def test_every_number_on_the_page_is_the_one_in_report_json(verdict: str, tmp_path: Path):
    page, beside = write_report(tmp_path / "report.html", make_report(CASES[verdict]))
    report = json.loads(beside.read_text())
    shown = Shown(page.read_text())
    assert len(shown.numbers) > 40
    for key, text in shown.numbers:
        value = look_up(report, key)
        if value is None:
            assert text == "-", key
        elif isinstance(value, bool):
            assert text == ("yes" if value else "no"), key
        elif isinstance(value, str):
            assert text == value, key
        elif isinstance(value, int):
            assert text == f"{value:,}", key
        else:
            found, off = number_of(text)
            assert found == pytest.approx(value, abs=off), key
    for sentence in [*report["sentences"], *(s for g in report["groups"] for s in g["sentences"])]:
        assert sentence in shown.text


@pytest.mark.parametrize("verdict", CASES)
def test_every_line_and_bar_is_drawn_where_report_json_says(verdict: str):
    report = json.loads(json.dumps(make_report(CASES[verdict])))
    shapes = Shown(render(report)).shapes
    assert shapes
    by_picture: dict[str, list[tuple[float, float]]] = {}
    for tag, found in shapes:
        key = found["data-key"]
        picture = re.match(r"groups\.\d+\.pictures\.\d+", key)
        assert picture is not None
        value = look_up(report, key)
        pairs = by_picture.setdefault(picture.group(), [])
        assert tag == "path"
        points = [tuple(map(float, xy)) for xy in re.findall(r"[ML] (\S+) (\S+)", found["d"])]
        if key.endswith(".points"):
            assert len(points) == len(value)
            pairs += [(y, point[1]) for (_, y), point in zip(value, points, strict=True)]
        elif ".levels." in key:
            pairs += [(value, y) for _, y in points]
        else:
            xs = [x for x, _ in points]
            pairs.append((value, max(xs) - min(xs)))
    for pairs in by_picture.values():
        # One straight line from numbers to places, for all that is in a picture.
        (low, at_low), (high, at_high) = min(pairs), max(pairs)
        for value, place in pairs:
            share = 0.0 if high == low else (value - low) / (high - low)
            assert place == pytest.approx(at_low + share * (at_high - at_low), abs=0.02)


@pytest.mark.parametrize("verdict", CASES)
def test_the_page_needs_no_network_and_every_picture_has_words(verdict: str):
    page = render(make_report(CASES[verdict]))
    shown = Shown(page)
    assert shown.fetched == []
    assert not re.search(r"https?:|@import|url\(", page)
    assert shown.figures == shown.captions > 2
    assert shown.unnamed_pictures == 0


def test_what_a_run_is_called_cannot_break_the_page():
    name = '<script>alert("1")</script>&'
    page = render(make_report({name: make_results(settings={"targets": "top_k:8"})}))
    assert "<script" not in page
    assert name in Shown(page).text


# The command.


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    found = []
    for name, results in seeds([0.5, 0.55]).items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        results.save(folder)
        found.append(str(folder))
    return found


def test_report_makes_the_page_of_one_run_in_its_folder(folders: list[str], capsys):
    assert main(["report", folders[0]]) == 0
    assert "Distillation helped" in capsys.readouterr().out
    report = json.loads(Path(folders[0], "report.json").read_text())
    assert report["gain"] == pytest.approx(0.5)
    assert Path(folders[0], "report.html").is_file()


def test_report_compares_several_and_prints_json(folders: list[str], tmp_path: Path, capsys):
    assert main(["report", *folders, "--output", str(tmp_path / "both.html"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "both.json").read_text())
    assert printed["groups"][0]["seeds"] == [0, 1]


def test_report_refuses_what_is_no_finished_run(folders: list[str], tmp_path: Path, capsys):
    page = str(tmp_path / "page.html")
    cases = [
        ([str(tmp_path / "nothing")], 1, "is not a folder"),
        ([str(tmp_path)], 1, "has no results.json"),
        ([folders[0], f"{folders[0]}/.", "--output", page], 1, "given twice"),
        ([folders[0], "--output", str(tmp_path / "page.json")], 1, "report.html"),
        ([folders[0], "--output", f"{folders[0]}/results.html"], 1, "report.html"),
        ([], 2, ""),
    ]
    for arguments, code, words in cases:
        try:
            found = main(["report", *arguments])
        except SystemExit as error:
            found = error.code
        assert found == code, arguments
        assert words in capsys.readouterr().err
    Path(folders[0], "results.json").write_text('{"format": 2}')
    assert main(["report", folders[0]]) == 1
    assert "results.json is damaged, or of another version" in capsys.readouterr().err


def test_results_come_back_as_they_were_saved(tmp_path: Path):
    saved = make_results(distilled=math.nan, shuffled=5.0)
    path = saved.save(tmp_path)
    assert path.name == "results.json"
    assert [one.name for one in tmp_path.iterdir()] == ["results.json"]
    loaded = Results.load(tmp_path)
    assert math.isnan(loaded.students["distilled"].scores.loss or 0.0)
    assert loaded.model_dump_json() == saved.model_dump_json()
