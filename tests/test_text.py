"""The text towers: any text, one forward per distinct string, frozen, saved as Hugging Face folders."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

from defi import hub
from defi.errors import UserError
from defi.text import CLIPText, T5Text, TextConfig

CONFIG = TextConfig(tokens=12, width=32, layers=2, heads=2, projection=24, seed=3)
TEXTS = ["push the red block to the left", "", "étalez 日本語 🤖", "open the drawer", "word " * 50]


@pytest.fixture
def clip() -> CLIPText:
    return CLIPText.from_config(CONFIG)


@pytest.fixture
def t5() -> T5Text:
    return T5Text.from_config(CONFIG)


def test_any_text_has_its_own_tokens(clip: CLIPText) -> None:
    """No text is unknown, different texts differ, and common words are one token each."""
    ids = [tuple(clip.tokenizer(text)["input_ids"]) for text in ["日本", "日木", "zyx", "zyy", "a.b", "a b"]]
    assert len(set(ids)) == len(ids)
    assert len(clip.tokenizer("open the drawer")["input_ids"]) == 5
    assert clip.tokenizer("Open THE drawer") == clip.tokenizer("open the drawer")


def test_shapes_and_truncation(clip: CLIPText) -> None:
    assert clip.tokens(TEXTS).shape == (5, 12, 32)
    assert clip.sentence(TEXTS).shape == (5, 24)


LONG = ["put " + "the red block " * 5 + "to the " + side for side in ("left", "right")]


@pytest.mark.parametrize("keep_end", [False, True])
def test_long_texts_that_differ_late(keep_end: bool) -> None:
    """The token states are cut, or end with the state of the whole text; the sentence is always whole."""
    clip = CLIPText.from_config(replace(CONFIG, keep_end=keep_end))
    a, b = clip.tokens(LONG)
    assert torch.equal(a[:-1], b[:-1]) and torch.equal(a[-1], b[-1]) is not keep_end
    assert clip.truncation_note([*LONG, "open the drawer", ""]).startswith("2 of 4") is not keep_end
    sentences = clip.sentence(LONG)
    assert (sentences[0] - sentences[1]).norm() > 0.05 * sentences[0].norm()
    batch = clip.tokenizer(LONG[0], return_tensors="pt")
    whole = clip.model(**batch)
    torch.testing.assert_close(sentences[0], whole.text_embeds[0])
    if keep_end:
        torch.testing.assert_close(a[-1], whole.last_hidden_state[0, -1])


def test_texts_beyond_the_towers_positions_are_truncated_and_noted(clip: CLIPText) -> None:
    endless = ["block " * clip.longest + side for side in ("left", "right")]
    assert torch.equal(*clip.sentence(endless))
    for keep_end in (False, True):
        clip.config = replace(CONFIG, keep_end=keep_end)
        note = clip.truncation_note(["open the drawer", *endless])
        assert note.startswith("2 of 3 instructions are truncated")
    exactly = "block " * (clip.longest - 2)  # and the two marks
    assert clip.truncation_note([exactly]) == ""


@pytest.mark.parametrize("tower", [CLIPText, T5Text])
@pytest.mark.parametrize("around", [torch.autocast("cpu", torch.bfloat16), torch.inference_mode()])
def test_what_is_remembered_does_not_depend_on_what_surrounds_it(tower, around) -> None:
    """A text seen under autocast or in inference mode serves training in float32 as if encoded anew."""

    def read(text: CLIPText | T5Text) -> torch.Tensor:
        return text(TEXTS)[0] if tower is T5Text else text.tokens(TEXTS)

    fresh, text = read(tower.from_config(CONFIG)), tower.from_config(CONFIG)
    with around:
        inside = read(text).clone()
    again = read(text)
    assert inside.dtype == again.dtype == torch.float32
    assert torch.equal(inside, fresh) and torch.equal(again, fresh)
    (again * torch.ones(32, requires_grad=True)).sum().backward()  # may be kept for a gradient


def test_each_distinct_string_is_encoded_once(clip: CLIPText, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = clip._encode
    monkeypatch.setattr(clip, "_encode", lambda text: (seen.append(text), encode(text))[1])
    first = clip.tokens(["a", "b", "a"])
    assert torch.equal(clip.tokens(["b", "a"]), first[[1, 0]])
    clip.sentence(["a", "c"])
    assert seen == ["a", "b", "c"]


def test_the_cache_forgets_the_oldest() -> None:
    clip = CLIPText.from_config(replace(CONFIG, cache=2))
    assert clip.tokens(["a", "b", "c"]).shape[0] == 3
    assert list(clip._cache) == ["b", "c"]


def test_sentence_is_the_projected_end_state(clip: CLIPText) -> None:
    batch = clip.tokenizer(["open the drawer"], return_tensors="pt")
    end = clip.model.text_model(**batch).last_hidden_state[:, -1]
    torch.testing.assert_close(clip.sentence(["open the drawer"]), clip.model.text_projection(end))


def test_padding_does_not_change_t5(t5: T5Text) -> None:
    alone, _ = t5(["open the drawer"])
    states, mask = t5(["open the drawer", "push the red block to the left"])
    assert mask.sum(1).tolist() == [alone.shape[1], states.shape[1]]
    torch.testing.assert_close(states[0, : alone.shape[1]], alone[0])
    assert states[0, alone.shape[1] :].abs().max() == 0


def test_t5_reads_texts_of_any_length_as_they_are(t5: T5Text) -> None:
    states, mask = t5(["Open the drawer!", "", "block " * 600])
    assert mask.sum(1).tolist() == [5, 1, 601] and states.shape[1] == 601
    assert not torch.equal(t5(["open the drawer!"])[0], t5(["open the drawer"])[0])


def test_lengths_are_rounded_up_for_acting(t5: T5Text) -> None:
    short, long = ["open the drawer"], ["block " * 30]
    assert [t5(texts, full_length=True)[0].shape[1] for texts in (short, long)] == [12, 36]
    assert torch.equal(t5(short, full_length=True)[0][:, :4], t5(short)[0])


@pytest.mark.parametrize(
    ("tower", "model"), [(CLIPText, CLIPTextModelWithProjection), (T5Text, T5EncoderModel)]
)
def test_saved_as_a_hugging_face_folder(tower, model, tmp_path: Path) -> None:
    ours = tower.from_config(CONFIG)
    ours.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())  # as transformers 4 wants them
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    again = tower.load(tmp_path, CONFIG)
    named = tower.from_config(replace(CONFIG, pretrained=str(tmp_path)))
    outputs = [(t.tokens if tower is CLIPText else t)(TEXTS) for t in (ours, again, named)]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    assert model.from_pretrained(tmp_path).config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path))
    assert not list(tmp_path.rglob("*.bin"))


def test_seeded_and_frozen(clip: CLIPText) -> None:
    state = torch.random.get_rng_state()
    again = CLIPText.from_config(CONFIG)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(again.tokens(TEXTS), clip.tokens(TEXTS))
    other = CLIPText.from_config(replace(CONFIG, seed=4))
    assert not torch.equal(other.tokens(TEXTS), clip.tokens(TEXTS))
    assert not any(p.requires_grad for p in clip.parameters())
    assert not clip.train().model.training and not clip.tokens(TEXTS).requires_grad


def test_missing_and_incomplete_folders_are_named(tmp_path: Path, clip: CLIPText) -> None:
    with pytest.raises(UserError, match="nothing: no such folder"):
        CLIPText.load(tmp_path / "nothing", CONFIG)
    clip.save(tmp_path)
    T5Text.from_config(CONFIG).model.save_pretrained(tmp_path)  # other weights in the same place
    with pytest.raises(UserError, match=str(tmp_path)):
        CLIPText.load(tmp_path, CONFIG)


def test_a_server_out_of_reach_is_asked_once_and_a_folder_never(
    tmp_path: Path, clip: CLIPText, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Unreachable:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "get_session", Unreachable)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    hub._answers.cache_clear()
    clip.save(tmp_path)
    CLIPText.load(tmp_path, CONFIG)
    assert asked == []
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(UserError, match="^nobody/nothing: cannot be read .*CLIPTextModelWithProjection"):
            CLIPText.from_config(TextConfig(pretrained="nobody/nothing"))
    assert len(asked) == 1 and time.monotonic() - start < 30
    hub._answers.cache_clear()


@pytest.mark.parametrize("source", ["ckpts/nothing", "/nowhere/clip", "tests/nothing"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda: pytest.fail("asked the server"))
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    with pytest.raises(UserError, match=f"{source}: no such folder; python -m defi.download"):
        hub.local_only(source)


def test_texts_that_are_truncated_are_noted() -> None:
    """How many do not fit, and which reach the video model as another one; what fits is not mentioned."""
    clip = CLIPText.from_config(TextConfig(tokens=8, keep_end=False))
    long = "put the red block to the very far {} now"
    assert clip.truncation_note(["lift it", "Lift it", "lift it"]) == ""
    note = clip.truncation_note(["lift it", long.format("left"), long.format("right"), "x" * 30, "lift it"])
    assert note.startswith("3 of 4 instructions are truncated at 8 tokens")
    assert note.endswith(
        f"2 of them are equal to another, the first: {long.format('left')!r} = {long.format('right')!r}"
    )
    kept = CLIPText.from_config(TextConfig(tokens=8, keep_end=True))
    assert kept.truncation_note([long.format("left"), long.format("right")]) == ""
    note = kept.truncation_note(["x" * 300, "x" * 301, "y"])
    assert note.startswith("2 of 3 instructions are truncated at 256 tokens")
