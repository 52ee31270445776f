"""report.py: what it reads from a run's directory, and the page, driven in a browser."""

import base64
import io
import json
import math
import os
from contextlib import contextmanager

import numpy as np
import pytest
from helpers import json_lines, load_script, run_script, train
from pages import opened_page, until
from PIL import Image

from cachetrain.report import run as reading
from cachetrain.report.findings import findings
from cachetrain.report.run import read_run, read_samples, read_scalars, read_skipped, read_warnings, thinned
from cachetrain.sampling.render import sample_name, save_png

report = load_script("report.py")

PROMPTS = ["a red circle", "random caption"]
CFGS = (1, 4)
LAYERS = [f"down_blocks.{block}.attentions.0.transformer_blocks.0.attn{kind}" for block in (0, 1) for kind in (1, 2)]


def color(step, slot, cfg, run):
    return step // 2 % 256, 100 * slot + 10 * cfg, 200 * run


def write_run(directory, number=0, steps=(100, 200, 300), settings=None, sample_side=64):
    """A run's directory as the trainer leaves it; values follow from tag, step and `number`."""
    directory.mkdir()
    args = {"max_steps": "400", "learning_rate": 1e-3, "sample_cfgs": [1.0, 4.0], "revision": None}
    (directory / "args.json").write_text(json.dumps(args | (settings or {})))
    with open(directory / "metrics.jsonl", "w") as file:
        for step in range(10, 310, 10):
            line = {
                "01_Training/loss_raw": 1 / step + number,
                "01_Training/learning_rate": 1e-3,
                "04_Learning_Rate/group_0": 1e-3 * step / 300,
                "05_Performance/steps_per_second": 0.5,
                "05_Performance/images_per_second": 8.0,
                "05_Performance/data_wait_fraction": 0.01,
                **{f"02_Loss_Components/loss_raw_t{first:03d}-{first + 124:03d}": 1 / step for first in (0, 125)},
                **{f"11_Gradient_Stats/qk_rms/{layer}": 10.0**-i for i, layer in enumerate(LAYERS)},
            }
            if step % 100 == 0:
                line |= {"val/loss": 30 / step + number} | {f"val/loss_q{q}": q / step for q in (1, 2, 3, 4)}
            file.write(json.dumps({"step": step} | line) + "\n")
    for step in steps:
        (directory / f"checkpoint-{step:06d}").mkdir()
        for slot, prompt in enumerate(PROMPTS):
            for cfg in CFGS:
                image = Image.new("RGB", (sample_side, sample_side), color(step, slot, cfg, number))
                said = prompt if slot == 0 else f"caption of step {step}"
                path = directory / "samples" / f"step-{step:06d}" / sample_name(slot, prompt, cfg)
                save_png(image, path, prompt=said, seed=7, cfg=cfg, step=step)
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("output")
    first = write_run(root / "first")
    (first / "warnings.jsonl").write_text('{"step": 150, "time": "", "message": "up_blocks.1: faded"}\n')
    return [first, write_run(root / "second", 1, (100, 300), {"learning_rate": 2e-3})]


# ---- reading


def test_curves_are_those_of_the_metrics_file(runs):
    lines = json_lines(runs[0] / "metrics.jsonl")
    curves = read_run(runs[0])["curves"]
    assert curves.keys() == {tag for line in lines for tag in line} - {"step", "01_Training/loss"}  # equals loss_raw
    for tag, (steps, values) in curves.items():
        wanted = [(line["step"], pytest.approx(line[tag], rel=1e-4)) for line in lines if tag in line]
        assert list(zip(steps, values, strict=True)) == wanted


def test_what_a_real_run_leaves_is_read(shapes, model_t5, tmp_path):
    flags = ["--max_steps", 4, "--batch_size", 4, "--save_steps", 2, "--sample_prompt", "a star", "--sample_steps", 2]
    lines, _ = train(shapes, model_t5, tmp_path / "run", *flags, "--sampler_steps", 1, "--vae_scaling_factor", 0.5)
    found = read_run(tmp_path / "run")
    assert (found["state"], found["checkpoints"]) == ("complete, 4 steps", [2, 4])
    assert found["curves"].keys() == {tag for line in lines for tag in line} - {
        "step",
        "01_Training/loss",
    }  # equals loss_raw
    [sample] = found["samples"]
    assert (sample["name"], sample["cfgs"], list(sample["pictures"])) == ("00-a-star", [1.0, 4.0, 7.0], [2, 4])
    assert all(picture["text"]["prompt"] == "a star" for row in sample["pictures"].values() for picture in row)
    [warning] = found["warnings"]
    assert warning["step"] == 0 and "--vae_scaling_factor 0.5" in warning["message"]
    assert found["settings"]["batch_size"] == 4


def test_a_line_that_is_still_being_written_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": null}\n{"step": 2, "lo')
    steps, values = read_scalars(path)["loss"]
    assert list(steps) == [1] and math.isnan(values[0])
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, \n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: "):
        read_scalars(path)


def test_a_long_curve_keeps_its_spikes_its_gaps_and_its_ends():
    values = np.random.default_rng(0).random(50_000)
    values[31_234], values[40_001], values[22_222] = 1e3, -5.0, math.nan
    steps, kept = thinned(range(0, 500_000, 10), values)
    assert len(steps) <= reading.MAX_POINTS
    assert {312_340: 1e3, 400_010: -5.0, 222_220: None}.items() <= dict(zip(steps, kept, strict=True)).items()
    assert (steps[0], steps[-1]) == (0, 499_990) and steps == sorted(steps)
    assert all(
        value is None or value == pytest.approx(values[step // 10], rel=1e-4)
        for step, value in zip(steps, kept, strict=True)
    )


def test_warnings_are_in_order_and_what_redone_steps_said_again_is_there_once(tmp_path):
    path = tmp_path / "warnings.jsonl"
    told = [(30, "b"), (10, "a"), (30, "b"), (30, "c")]
    path.write_text("".join(json.dumps({"step": step, "message": text}) + "\n" for step, text in told))
    assert [(line["step"], line["message"]) for line in read_warnings(path)] == [(10, "a"), (30, "b"), (30, "c")]


def test_skipped_steps_are_counted_whatever_the_names_of_their_files(tmp_path):
    path = tmp_path / "quarantine.tsv"
    path.write_bytes(
        b"7\tloss nan\ta\nb.img\ta.txt\n7\tloss nan\t\xe2\x80\xa8.img\tb.txt\n3\tloss inf\t\xff.img\tc.txt\n"
    )
    assert read_skipped(path) == [3, 7]
    assert read_skipped(tmp_path / "none.tsv") == []


def test_samples_are_those_of_the_files_scaled_down_where_they_are_large(runs, tmp_path):
    first, second = read_samples(runs[0] / "samples")
    assert (first["name"], first["cfgs"], list(first["pictures"])) == ("00-a-red-circle", [1.0, 4.0], [100, 200, 300])
    assert second["pictures"][200][0]["text"]["prompt"] == "caption of step 200"
    data = base64.b64decode(second["pictures"][200][1]["src"].partition(",")[2])
    assert data == (runs[0] / "samples/step-000200/01-random-caption_cfg4.png").read_bytes()
    (large, _) = read_samples(write_run(tmp_path / "large", steps=[100], sample_side=700) / "samples")
    with Image.open(io.BytesIO(base64.b64decode(large["pictures"][100][1]["src"].partition(",")[2]))) as image:
        assert image.size == (reading.MAX_SIDE, reading.MAX_SIDE)
        assert np.abs(np.asarray(image)[5, 5] - np.array(color(100, 0, 4, 0))).max() <= 3


def test_of_many_steps_some_are_shown_with_both_ends_and_a_broken_picture_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_STEPS", 4)
    directory = write_run(tmp_path / "run", steps=range(10, 110, 10)) / "samples"
    (directory / "step-000100" / sample_name(0, PROMPTS[0], 1)).write_bytes(b"\x89PNG broken")
    first, _ = read_samples(directory)
    assert list(first["pictures"]) == [10, 40, 70, 100]
    assert first["pictures"][100][0] is None and first["pictures"][100][1] is not None


def test_two_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "run")
    assert run_script("report.py", tmp_path / "a" / "run", tmp_path / "b" / "run") == 0
    page = (tmp_path / "a" / "run" / "report_run.html").read_text()
    data = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert [run["name"] for run in data["runs"]] == [run["path"] for run in data["runs"]]


def test_what_is_no_run_is_refused_with_what_to_pass(tmp_path):
    with pytest.raises(ValueError, match=r"no args\.json.*--output_dir"):
        read_run(tmp_path)


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "args.json").write_text('{"max_steps": "2e"}')
    assert run_script("report.py", run) == 0
    assert read_run(run)["state"] == "ended, step 0 (--max_steps 2e)"


@pytest.mark.parametrize(
    ("max_steps", "locked", "state"),
    [
        ("400", True, "running, step 300 of 400"),
        ("400", False, "stopped, step 300 of 400"),
        ("300", False, "complete, 300 steps"),
        ("2e", True, "running, step 300 (--max_steps 2e)"),
    ],
)
def test_state_tells_whether_the_run_goes_on(max_steps, locked, state, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "is_locked", lambda directory: locked)
    assert read_run(write_run(tmp_path / "run", settings={"max_steps": max_steps}))["state"] == state


# ---- findings


def curve(values):
    return list(range(25, 25 * len(values) + 25, 25)), list(values)


NOISE = np.random.default_rng(1).normal(1, 0.05, 100)
HEALTHY = {
    "01_Training/loss_raw": curve(np.linspace(1, 0.4, 100) * NOISE),
    "01_Training/clipped_fraction": curve(np.linspace(1, 0, 100)),
    "05_Performance/data_wait_fraction": curve([0.3, *[0.01] * 99]),
    "07_Noise_Analysis/latent_std_c0": curve(0.7 * NOISE),
    "07_Noise_Analysis/latent_std_c1": curve(1.3 * NOISE),
    "val/loss": curve([1, 0.5, 0.51, 0.45]),
}


def levels(**changed):
    tags = {tag.partition("/")[2]: tag for tag in HEALTHY}
    scalars = HEALTHY | {tags[name]: curve(values) for name, values in changed.items()}
    return [(finding["level"], finding["text"]) for finding in findings(scalars, 0)]


def test_a_healthy_run_has_nothing_but_good_to_say():
    assert levels() == [("good", "val/loss fell from 1 (step 25) to 0.45 (step 100), the lowest so far")]


@pytest.mark.parametrize(
    ("changed", "level", "words"),
    [
        ({"loss": [1, 0.5, *[0.6] * 5]}, "note", "has not improved in the 5 validations since"),
        ({"loss": [1, 0.99, 0.995]}, "note", "has hardly fallen: 1 at step 25, at best 0.99 at step 50"),
        ({"loss": [1, 0.5, 0.7]}, "bad", "is rising: 0.5 at step 50, 0.7 at step 75"),
        ({"loss": [1, 1.5, 1.2]}, "bad", "has not fallen below its first value, 1 at step 25"),
        ({"loss_raw": np.r_[np.linspace(1, 0.4, 50), np.linspace(0.4, 0.8, 50)] * NOISE}, "bad", "has risen again"),
        ({"clipped_fraction": [1] * 100}, "note", "100% of the recent steps were clipped"),
        ({"data_wait_fraction": [0.2] * 100}, "bad", "20% of the recent time was spent waiting for data"),
        ({"latent_std_c0": 5 * NOISE, "latent_std_c1": 7 * NOISE}, "bad", "--vae_scaling_factor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_found_and_nothing_else(changed, level, words):
    found = [finding for finding in levels(**changed) if finding[0] != "good"]
    assert [own for own, _ in found] == [level] and words in found[0][1]


def test_without_validation_the_training_loss_is_judged_and_skipped_steps_are_counted():
    scalars = {tag: values for tag, values in HEALTHY.items() if tag != "val/loss"}
    assert findings(scalars, 0)[0]["level"] == "good" and "use --val_split to see" in findings(scalars, 0)[0]["text"]
    assert "not finite: 3 steps; look at" in findings(scalars, 3)[-1]["text"]
    flat = {"01_Training/loss_raw": curve(NOISE)}
    assert [finding["level"] for finding in findings(flat, 0)] == ["note"]


# ---- the page


@contextmanager
def opened(browser, directories, tmp_path, width=1280, **options):
    """Writes the page, opens it from disk and yields it; it must ask for nothing and raise no error."""
    target = tmp_path / "page.html"
    assert run_script("report.py", *directories, "--out", target) == 0
    options["viewport"] = {"width": width, "height": 800}
    opening = opened_page(browser, target.as_uri(), "#settings > *", state="attached", silent=True, **options)
    with opening as (page, requests):
        yield page
    assert requests[0] == target.as_uri()
    assert [url for url in requests[1:] if not url.startswith("data:")] == []


def figure(page, title):
    return page.locator("figure.chart", has=page.get_by_role("heading", name=title, exact=True))


def legend(page, title):
    return figure(page, title).locator(".legend button").all_text_contents()


def point(page, title, share):
    """Screen position in a chart, at a share of its steps."""
    chart = figure(page, title).locator("> svg")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    return box["x"] + 54 + share * (box["width"] - 62), box["y"] + box["height"] / 2


def pixels(page, places):
    """RGB of the middle of each picture with such an index among the samples, as the screen shows it."""
    pictures = page.locator(".strip img")
    for i in places:
        pictures.nth(i).evaluate("img => img.decode()")  # it may still show the picture before
    shots = [Image.open(io.BytesIO(pictures.nth(i).screenshot())).convert("RGB") for i in places]
    return [shot.getpixel((shot.width // 2, shot.height // 2)) for shot in shots]


def test_page_tells_state_findings_warnings_and_settings(browser, runs, tmp_path):
    with opened(browser, runs[:1], tmp_path) as page:
        assert page.text_content("h1") == "first"
        rows = page.locator("#glance tr").all_text_contents()
        assert rows[0] == "statestopped, step 300 of 400"
        assert "val/loss0.1, the lowest" in rows and "images per second8" in rows
        assert "time0 h 10 min" in rows  # 300 steps, 0.5 a second
        assert page.locator("#findings li").all_text_contents() == [
            "val/loss fell from 0.3 (step 100) to 0.1 (step 300), the lowest so far"
        ]
        assert page.locator("#warnings li").all_text_contents() == ["step 150up_blocks.1: faded"]
        settings = page.locator("#settings dl div").all_text_contents()
        assert settings == ["learning_rate0.001", "max_steps400", "revision–", "sample_cfgs1 4"]


def test_slider_shows_each_steps_pictures_and_play_runs_through_all(browser, runs, tmp_path):
    with opened(browser, runs[:1], tmp_path) as page:
        for index, step in enumerate((100, 200, 300)):
            page.locator("#slider").evaluate("(e, i) => { e.value = i; e.dispatchEvent(new Event('input')) }", index)
            assert page.text_content("#step") == f"step {step}"
            expected = [color(step, slot, cfg, 0) for slot in (0, 1) for cfg in CFGS]
            assert pixels(page, range(4)) == expected
            assert page.locator(".caption:visible").all_text_contents() == [f"caption of step {step}"]
        page.evaluate("""() => {
            const step = document.querySelector("#step");
            window.seen = [];
            new MutationObserver(() => seen.push(step.textContent)).observe(step, { childList: true });
        }""")
        page.click("#play")
        until(page, "seen.length >= 5")
        page.click("#play")
        assert page.evaluate("seen.slice(0, 5)") == ["step 100", "step 200", "step 300", "step 100", "step 200"]
        assert page.text_content("#play") == "Play"


def test_hovering_a_chart_reads_the_logged_values_of_that_step_in_all_charts(browser, runs, tmp_path):
    with opened(browser, runs[:1], tmp_path) as page:
        assert legend(page, "Loss") == ["plain (raw)0.003333"]  # the last
        page.mouse.move(*point(page, "Loss", 200 / 300))
        assert legend(page, "Loss") == ["plain (raw)0.005"]
        assert legend(page, "Validation loss") == ["optimized loss0.15"]
        names = ["q1 least noise", "q2", "q3", "q4 most noise"]
        wanted = [f"{name}{q / 200:g}" for q, name in enumerate(names, 1)]
        assert legend(page, "Validation by quarter of the timesteps") == wanted
        assert legend(page, "Query and key gradients, each attention layer") == [
            "self-attentionlowest 0.01 down_blocks.1.attentions.0.attn1",
            "text attentionlowest 0.001 down_blocks.1.attentions.0.attn2",
        ]


def test_curve_is_drawn_where_its_axis_says(browser, runs, tmp_path):
    """The learning rate is a straight line from 0 to 0.001: its pixels against the labels of the axes."""
    with opened(browser, runs[:1], tmp_path) as page:
        chart = figure(page, "Learning rate").locator("> svg")
        labels = chart.locator("> text").evaluate_all(
            "all => all.map(e => [e.textContent, +e.getAttribute('x'), +e.getAttribute('y') - 4])"
        )
        heights = {float(text): y for text, _, y in labels if y < 205}
        path = chart.locator("path.curve").first.get_attribute("d")
        places = [tuple(map(float, pair.split())) for pair in path[1:].split("L")]
        assert len(places) == 30
        slope = (heights[0.001] - heights[0]) / 0.001
        for step, (x, y) in zip(range(10, 310, 10), places, strict=True):
            assert y == pytest.approx(heights[0] + slope * 1e-3 * step / 300, abs=0.3)
            assert x - places[0][0] == pytest.approx((places[-1][0] - places[0][0]) * (step - 10) / 290, abs=0.2)


def test_drag_zooms_all_charts_and_double_click_shows_the_whole_run(browser, runs, tmp_path):
    with opened(browser, runs[:1], tmp_path) as page:
        last = "figure.chart:has(h3:text-is('Loss')) > svg > text >> nth=-1"
        assert page.text_content(last) == "300"
        page.mouse.move(*point(page, "Validation loss", 0.25))
        page.mouse.down()
        page.mouse.move(*point(page, "Validation loss", 0.5))
        page.mouse.up()
        assert 140 <= int(page.text_content(last)) <= 150
        assert page.is_visible("#whole")
        page.mouse.dblclick(*point(page, "Loss", 0.5))
        assert page.text_content(last) == "300" and not page.is_visible("#whole")
        page.mouse.click(*point(page, "Loss", 0.35))
        assert page.text_content("#step") == "step 100"


def test_warnings_are_marked_in_the_charts_at_their_step(browser, runs, tmp_path):
    with opened(browser, runs[:1], tmp_path) as page:
        marks = figure(page, "Loss").locator(".mark title").all_text_contents()
        assert marks == ["step 150: up_blocks.1: faded"]
        at = float(figure(page, "Loss").locator("line.warning").first.get_attribute("x1"))
        width = figure(page, "Loss").locator("> svg").bounding_box()["width"]
        assert at == pytest.approx(54 + (width - 62) / 2, abs=0.5)


def test_any_scalar_can_be_chosen_and_a_curve_hidden(browser, runs, tmp_path):
    with opened(browser, runs[:1], tmp_path) as page:
        tags = page.locator("#tag option").all_text_contents()
        assert tags == list(read_run(runs[0])["curves"])
        page.select_option("#tag", "01_Training/learning_rate")
        assert page.locator("#any .legend").text_content() == "01_Training/learning_rate0.001"
        curves = figure(page, "Loss by timestep").locator("path.curve:not(.faint)")
        assert curves.count() == 2
        figure(page, "Loss by timestep").locator(".legend button").first.click()
        assert curves.count() == 1


def test_two_runs_are_compared_in_curves_samples_and_settings(browser, runs, tmp_path):
    with opened(browser, runs, tmp_path) as page:
        assert page.text_content("h1") == "first and second"
        assert legend(page, "Loss") == ["plain (raw)0.003333 | 1.003"]
        curves = figure(page, "Loss").locator("path.curve:not(.faint)")
        assert curves.count() == 2 and "dashed" in curves.nth(1).get_attribute("class")
        assert page.locator("#settings table tbody tr").all_text_contents() == ["learning_rate0.0010.002"]
        page.locator("#slider").evaluate("e => { e.value = 1; e.dispatchEvent(new Event('input')) }")
        wanted = [
            color(step, slot, cfg, run) for slot in (0, 1) for run, step in enumerate((200, 100)) for cfg in CFGS
        ]
        assert pixels(page, range(8)) == wanted
        captions = page.locator(".caption").all_text_contents()
        assert captions[:2] == ["first", "second · step 100"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_page_fits_its_width_and_can_be_read_in_both_schemes(scheme, width, browser, runs, tmp_path):
    with opened(browser, runs, tmp_path, width, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        words = page.locator("h1, p, td, dt, dd, li, button, figcaption, legend")
        colors = words.evaluate_all("all => all.map(e => getComputedStyle(e).color)")
        paper = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert min(contrast(text, paper) for text in set(colors)) > 4.5  # WCAG 2.1, 1.4.3


def contrast(one, other):
    """Contrast ratio of two CSS colors, as WCAG 2.1 defines it."""
    lights = []
    for text in (one, other):
        channels = np.array([float(part) for part in text[text.index("(") + 1 : -1].split(",")[:3]]) / 255
        linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(lights) / min(lights)


def test_markup_in_names_prompts_and_messages_is_shown_as_text(browser, tmp_path):
    hostile = "</script><img src=x onerror=alert(1)><b>"
    run = write_run(tmp_path / "<b>run", settings={"<i>key": hostile})
    (run / "warnings.jsonl").write_text(json.dumps({"step": 1, "message": hostile}) + "\n")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 310, f"11_Gradient_Stats/qk_rms/{hostile}": 1.0}) + "\n")
    image = Image.new("RGB", (64, 64))
    save_png(image, run / "samples/step-000300/02-x_cfg1.png", prompt=hostile)
    with opened(browser, [run], tmp_path) as page:
        assert page.locator("b, i, img[src=x]").all_text_contents() == ["step 1"]  # our own
        assert hostile in page.locator("h3").all_text_contents()
        assert page.locator("#warnings li").all_text_contents() == [f"step 1{hostile}"]


# Directories that are no runs of this project


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_settings_that_are_no_json_object_are_named(text, tmp_path):
    (write_run(tmp_path / "run") / "args.json").write_text(text)
    with pytest.raises(ValueError, match=r"run/args\.json"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "7",
        '{"loss": 1}',
        '{"step": "x", "loss": 1}',
        '{"step": true, "loss": 1}',
        '{"step": 1e3, "loss": 1}',
        '{"step": 99999999999999999999, "loss": 1}',
        *(f'{{"step": 1, "loss": {value}}}' for value in ('"x"', "[1]", "{}", "true")),
        "\xff",
    ],
)
def test_metrics_of_another_program_are_named(line, tmp_path):
    path = write_run(tmp_path / "run") / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_run(tmp_path / "run")


def test_what_json_lacks_and_names_of_other_programs_do_not_end_the_report(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "args.json").write_text(
        '{"noise_gamma": Infinity, "max_steps": "' + "9" * 5000 + '", "a": ["\\ud83d", NaN]}'
    )
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1e999}\n{"step": 2, "loss": ' + "9" * 400 + "}\n")
    (run / "warnings.jsonl").write_text('{"step": 1}\n{"step": 2, "message": [1]}\n')
    (run / "quarantine.tsv").write_bytes(b"7\n8\tloss nan\t\xff\n9999999999999999999999\tx\n" + "٣\tx\n".encode())
    for name in ("a_cfg1.2.3.png", "a_cfg.png", "a_cfg٣.png"):
        (run / "samples" / "step-000300" / name).touch()
    os.mkfifo(run / "samples" / "step-000300" / "a_cfg5.png")
    for name in ("step-" + "9" * 100, "step-٣"):
        (run / "samples" / name).mkdir()
    assert run_script("report.py", run) == 0
    assert read_skipped(run / "quarantine.tsv") == [8]


def test_samples_of_any_cfg_are_found(tmp_path):
    for cfg in (0, 1e-05, 1.5, 1000):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "step-000001" / sample_name(0, "a", cfg))
    (found,) = read_samples(tmp_path)
    assert found["cfgs"] == [0, 1e-05, 1.5, 1000] and all(found["pictures"][1])
