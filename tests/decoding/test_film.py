"""The film of an answer: what it records against a literal version, its page as text, and in a real browser."""

import random
import re
from html.parser import HTMLParser

import browser
import pytest
import torch

from blockwise.decoding import decode, film
from blockwise.decoding.settings import Settings

SCRIPT = "generate"
MASK, ENDS = 4, [1, 7]
PROMPT = [10, 11, 12, 13, 14]
HOSTILE = "</title></script><script>document.title='broken'</script>\"'&amp;<b>"


# ---------------------------------------------------------------- what is recorded


@torch.no_grad()
def test_each_step_has_the_tokens_and_probabilities_of_a_pass_over_the_canvas_before_it(model):
    settings = Settings(24, 8, 9)  # 3, 3 and 2 tokens a step
    answer = film.record(model, PROMPT, settings)
    assert [token.id for token in answer.tokens] == decode.decode(model, [PROMPT], settings)[0][0].tolist()
    assert answer.steps == 9 and answer.before == 0
    for step in range(1, 10):
        before = [token.id if token.step < step else MASK for token in answer.tokens]
        chances = model(torch.tensor([PROMPT + before])).logits[0, len(PROMPT) :].softmax(dim=-1)
        new = {i: token for i, token in enumerate(answer.tokens) if token.step == step}
        assert len(new) == (2 if step % 3 == 0 else 3) and {i // 8 for i in new} == {(step - 1) // 3}
        for i, token in new.items():
            assert token.id == chances[i].argmax()
            assert token.confidence == pytest.approx(chances[i].max().item(), rel=1e-4)


OPTIONS = {
    "temperature": 1.0, "remasking": "random", "cfg_scale": 1.0, "threshold": 0.02, "suppress_end": True,
    "cache": "dual", "factor": 3.95, "suffix": 0, "block_length": 6,
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_a_film_changes_no_token_and_no_draw(model, name):
    sizes = {"gen_length": 16, "block_length": 8, "steps": 16}
    settings, seed = Settings(**sizes | {name: OPTIONS[name]}), torch.Generator().manual_seed
    wanted, passes = decode.decode(model, [PROMPT], settings, (120, 293), seed(3))
    answer = film.record(model, PROMPT, settings, (120, 293), seed(3))
    assert [token.id for token in answer.tokens] == wanted[0].tolist()
    assert answer.steps == passes // (2 if name == "cfg_scale" else 1)
    assert {token.step for token in answer.tokens} == {*range(1, answer.steps + 1)}
    assert all(0 < token.confidence <= 1 for token in answer.tokens)


def test_what_no_step_wrote_has_no_confidence(model):
    """Behind the end with stop_at_end, and what is given around gaps."""
    exact = decode.decode(model, [PROMPT], Settings(32, 4, 32))[0][0].tolist()
    answer = film.record(model, PROMPT, Settings(32, 4, 32, stop_at_end=True), [exact[6]])
    stop = (exact.index(exact[6]) // 4 + 1) * 4
    assert 0 < stop < 32 and answer.steps == stop
    assert [token.confidence is None for token in answer.tokens] == [i >= stop for i in range(32)]
    assert all(token.step == stop and token.id == model.config.eos_token_id for token in answer.tokens[stop:])

    gaps = [MASK, 20, 21, MASK, MASK, 22]
    answer = film.record(model, PROMPT, Settings(16, 4, 16), gaps=gaps)
    assert answer.before == 1 and answer.steps == 3
    (wanted,) = decode.infill(model, [PROMPT + gaps], Settings(16, 4, 16))
    assert [token.id for token in answer.tokens] == wanted[len(PROMPT) :]
    given = [token == MASK for token in gaps]
    assert [token.step > 0 for token in answer.tokens] == given
    assert [token.confidence is not None for token in answer.tokens] == given


def test_blocks_that_are_counted_from_the_start_of_the_prompt(model):
    model.config.block_diffusion_size, model.config.block_diffusion_from = 4, "sample"
    try:
        answer = film.record(model, PROMPT, Settings(16, 4, 16))
        wanted = decode.decode(model, [PROMPT], Settings(16, 4, 16))[0][0].tolist()
    finally:
        del model.config.block_diffusion_size, model.config.block_diffusion_from
    assert [token.id for token in answer.tokens] == wanted and answer.before == 1
    order = [(answer.before + i) // 4 for i, _ in sorted(enumerate(answer.tokens), key=lambda entry: entry[1].step)]
    assert order == sorted(order) and {token.step for token in answer.tokens} <= {*range(1, 21)}


# ---------------------------------------------------------------- the page


class Boxes(HTMLParser):
    """The texts of a page by kind of element, and its boxes: (text, classes, step), as a browser would read them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.boxes, self.open = [], {}, [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("br", "meta", "input"):
            self.open.append(tag)
        if tag == "span" and "data-step" in dict(attrs):
            self.boxes.append(["", dict(attrs)["class"].split(), int(dict(attrs)["data-step"])])
            self.open[-1] = "box"

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data
        if self.open and self.open[-1] == "box":
            self.boxes[-1][0] += data


@pytest.fixture(scope="module")
def hostile_film(tokenizer):
    """A tokenizer with a token that would end the page's script, and a film of 512 steps with it and other texts."""
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([HOSTILE, "a\n\n", "\x1b\x00"])
    ids = tokenizer(f"Ada\n\thas 3{HOSTILE}a\n\n\x1b\x00 pens", add_special_tokens=False)["input_ids"] + [7, 20, 1]
    ids, rng = ids + [1] * (512 - len(ids)), random.Random(0)
    steps = [start + step for start in range(0, 512, 32) for step in rng.sample(range(1, 33), 32)]
    tokens = [film.Token(token, step, rng.random() ** 0.3) for token, step in zip(ids, steps)]
    return film.Film(tokens, 0), tokenizer


@pytest.fixture(scope="module")
def page(hostile_film):
    answer, tokenizer = hostile_film
    return film.page(answer, tokenizer, ENDS, Settings(512, 32, 512, threshold=0.5), HOSTILE, f"models/{HOSTILE}")


def test_a_page_of_512_steps_is_small_and_holds_no_element_of_prompt_or_tokens(page, hostile_film):
    answer, tokenizer = hostile_film
    assert len(page.encode()) < 100_000
    found = Boxes(page)
    assert found.tags.count("script") == found.tags.count("title") == 1 and "b" not in found.tags
    assert HOSTILE in found.texts["h1"] and HOSTILE in found.texts["title"] and "broken" not in found.texts["script"]
    assert "gen_length 512, block_length 32, steps 512, threshold 0.5" in found.texts["p"]
    assert "temperature" not in page and not re.search(r"https?:|src=|href=|url\(|@import|\bfetch\b", page)
    assert found.tags.count("div") == 2 + 512 // 32
    texts = [text for text, _, _ in found.boxes]
    assert len(texts) == 512 and HOSTILE in texts and {"⏎", "⇥", "a⏎⏎", "␛␀", "␣", "<|eot_id|>"} <= {*texts}
    end = texts.index("<|eot_id|>")
    dim = [i for i, (_, kinds, _) in enumerate(found.boxes) if "dim" in kinds]
    assert dim == [*range(end, 512)] and texts[end + 2 :] == ["∎"] * (510 - end)
    for (_, kinds, step), token in zip(found.boxes, answer.tokens):
        level = sum(token.confidence >= edge for edge in (0.5, 0.75, 0.9, 0.99))
        assert kinds[1] == f"level{level}" and step == token.step


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    if not browser.PATH:
        pytest.skip("no Chromium on this machine; with one (apt-get install chromium-headless-shell) this test runs")
    with browser.browser(tmp_path_factory.mktemp("browser")) as window:
        yield window


STATE = """tokens.map(token => [getComputedStyle(token).color === "rgba(0, 0, 0, 0)",
    getComputedStyle(token).outlineStyle === "solid", token.textContent])"""


def test_a_browser_shows_what_each_step_left(model, tokenizer, window, tmp_path):
    """Against the frames of decoding itself: which boxes are grey, which are new, and what stands in the others."""
    settings = Settings(16, 4, 8)
    frames = [ids[0].tolist() for ids, _ in decode.stream(model, [PROMPT], settings)][:8]
    text = film.page(film.record(model, PROMPT, settings), tokenizer, [], settings, "Ada has 3 pens.", "base")
    (tmp_path / "film.html").write_text(text, encoding="utf-8")
    window.open((tmp_path / "film.html").as_uri(), prefers_reduced_motion="reduce")
    before, seen = [MASK] * 16, ["Home", *["ArrowRight"] * 8, "ArrowRight"]
    for key, ids in zip(seen, [before, *frames, frames[-1]]):
        window.press(key)
        for (grey, new, shown), now, old in zip(window.run(STATE), ids, before, strict=True):
            letters = tokenizer.decode([now])
            assert grey == (now == MASK) and (new == (now != old) or key == seen[-1])
            assert grey or letters.isspace() or shown == letters
        before = ids
    assert window.run('find("count").textContent') == "step 8 of 8"
    for press, step in (("ArrowLeft", 7), ("Home", 0), ("End", 8)):
        window.press(press)
        assert window.run('[now, find("slider").valueAsNumber]') == [step, step]
    window.run('find("slider").value = 3; find("slider").dispatchEvent(new Event("input"))')
    assert window.run('[now, document.querySelectorAll(".block.now .number")[0].textContent]') == [3, "block 2"]
    assert not window.errors() and len(window.requests()) == 1


def test_a_browser_plays_and_pauses(page, window, tmp_path):
    (tmp_path / "film.html").write_text(page, encoding="utf-8")
    window.open((tmp_path / "film.html").as_uri())
    wait = "new Promise(done => { const look = () => now >= %d ? done(now) : setTimeout(look, 5); look(); })"
    assert window.run('find("play").textContent') == "Pause"  # it plays by itself
    assert window.run(wait % 3) >= 3
    window.press(" ")
    stopped = window.run("now")
    assert window.run('[find("play").textContent, timer]') == ["Play", None]
    assert window.run("new Promise(done => setTimeout(() => done(now), 150))") == stopped
    window.press("End")
    window.press(" ")  # at the end it begins anew
    assert window.run(wait % 1) < 100 and window.run('find("play").textContent') == "Pause"
    window.open((tmp_path / "film.html").as_uri(), prefers_reduced_motion="reduce")
    assert window.run("[now, timer]") == [0, None]


def test_a_browser_shows_hostile_texts_light_and_dark_and_on_a_phone(page, window, tmp_path):
    """To look at its pictures: pytest --basetemp=FOLDER, then FOLDER/*/*.png."""
    (tmp_path / "film.html").write_text(page, encoding="utf-8")
    backs = []
    for scheme, width in (("light", 900), ("dark", 900), ("light", 375), ("dark", 375)):
        media = {"prefers_color_scheme": scheme, "prefers_reduced_motion": "reduce"}
        window.open((tmp_path / "film.html").as_uri(), width, **media)
        window.run("show(40)")
        window.screenshot(tmp_path / f"{scheme}-{width}.png")
        assert window.run("document.documentElement.scrollWidth") <= width
        assert "broken" not in window.run("document.title").replace(HOSTILE[:60], "")
        backs.append(window.run("getComputedStyle(document.body).backgroundColor"))
        colours = window.run(
            '[...document.querySelectorAll("#legend .t")].map(e => getComputedStyle(e).backgroundColor)'
        )
        assert len(colours) == len({*colours}) == 6  # masked and five levels
        assert not window.errors() and len(window.requests()) == 1
    assert backs[0] == backs[2] != backs[1] == backs[3]


# ---------------------------------------------------------------- generate.py --film

SHORT = ("--gen_length", 16, "--block_length", 8, "--steps", 16)


@pytest.mark.parametrize("gaps", [(), ("--infill", "Eva has [MASK:3] shells.")])
def test_generate_writes_a_film_of_the_answer_that_it_prints(base, tmp_path, call, gaps):
    asked = ("--model", base, "--prompt", "Ada has <3> pens.", *gaps, *SHORT)
    code, plain, err = call(*asked)
    assert code == 0, err
    code, out, err = call(*asked, "--film", tmp_path / "film.html")
    assert code == 0 and out == plain, err
    found = Boxes((tmp_path / "film.html").read_text(encoding="utf-8"))
    assert found.texts["h1"] == "Ada has <3> pens." and str(base) in found.texts["p"]
    assert max(step for *_, step in found.boxes) == (3 if gaps else 16)
    if gaps:
        shown = "".join(text for text, *_ in found.boxes).replace("␣", " ")
        assert shown.startswith("Eva has ") and shown.endswith(" shells.")


def test_films_that_cannot_be_written_are_refused(base, tmp_path, call):
    (tmp_path / "film.html").write_text("precious")
    for film_, said in (("film.html", "already exists; remove it"), ("no/film.html", "is not a folder")):
        code, out, err = call("--model", base, "--prompt", "a", "--film", tmp_path / film_, *SHORT)
        assert code == 1 and not out and f"error: --film {tmp_path / film_}" in err and said in err
    assert (tmp_path / "film.html").read_text() == "precious"
    code, _, err = call("--model", base, "--prompts", "a", "--output", "b", "--film", tmp_path / "b.html")
    assert code == 2 and "--film shows the answer to one --prompt" in err
