"""Frozen text towers: CLIP for stage 1 and the sentence embedding, T5 for the latent actions.

A tower comes from a Hugging Face folder or hub name (`pretrained`), or is random with a tokenizer built here,
which needs no download. Each distinct string is encoded once: a data set has few instructions.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging
from typing_extensions import Self

from defi.hub import from_pretrained, load_model

transformers_logging.disable_progress_bar()  # a bar per small file hides what a command has to say

WORDS = Path(__file__).parent / "assets" / "words.txt"
POSITIONS = 256  # the longest text that a random CLIP tower reads, in tokens (a byte each outside of `WORDS`)


@dataclass
class TextConfig:
    """One tower. With `pretrained` (folder or hub name) only `tokens` is read besides it.

    tokens: T, special tokens included. Of CLIP the length of the token states. T5 reads texts of any length;
        when acting, they are padded to a multiple of it.
    keep_end: what CLIP makes of texts longer than T. False: token states of the text truncated at T, as
        published. True: the last of them is that of the full text's end, which has seen all of it.
    width, layers, heads: of the random tower. projection: width P of the sentence embedding (CLIP only).
    seed: of the random weights. cache: how many distinct strings are remembered.
    """

    pretrained: str | None = None
    tokens: int = 20
    keep_end: bool = False
    width: int = 64
    layers: int = 2
    heads: int = 4
    projection: int = 64
    seed: int = 0
    cache: int = 20_000


def build_tokenizer(*, bos: str | None = None, eos: str, pad: str, tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer for any text: common words are one token, everything else falls back to bytes.

    WordPiece over byte-level characters: every byte is a piece, at the start of a word and within it, so no
    text is unknown, and nothing has to be trained or downloaded.
    """
    special = list(filter(None, dict.fromkeys([pad, bos, eos])))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = WORDS.read_text(encoding="utf-8").split()
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=eos, max_input_chars_per_word=1_000_000))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if bos else f"$A {eos}",
        special_tokens=[(token, vocabulary[token]) for token in special],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=tokens,
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 would add a third
    )


class _Tower(nn.Module):
    """What the two towers share: frozen, one forward per distinct string, saved as a Hugging Face folder."""

    architecture: ClassVar[Any]  # the model's class
    marks: ClassVar[dict[str, str]]  # special tokens of a random one
    _sizes: Callable[..., PretrainedConfig]  # TextConfig and numbers of the tokens -> configuration of one
    _encode: Callable[[str], tuple[Tensor, Tensor]]

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, config: TextConfig) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.config = config
        self._cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @classmethod
    def from_config(cls, config: TextConfig) -> Self:
        """The pretrained tower the config names, or the random one it describes."""
        if config.pretrained:
            return cls.load(config.pretrained, config)
        tokenizer = build_tokenizer(**cls.marks, tokens=config.tokens)
        numbers = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in cls.marks}
        sizes = cls._sizes(config, vocab_size=len(tokenizer), **numbers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return cls(cls.architecture(sizes), tokenizer, config)

    @classmethod
    def load(cls, folder: Path | str, config: TextConfig, *, tokenizer: Path | None = None) -> Self:
        """A tower that `save` wrote (or a hub name), used with the settings of `config` (T, cache).

        tokenizer: its folder, where it does not lie beside the tower.
        """
        model = load_model(cls.architecture, folder)
        return cls(model, from_pretrained(AutoTokenizer, tokenizer or folder), config)

    def train(self, mode: bool = True) -> Self:
        """Frozen: dropout stays off whatever the surrounding model does."""
        return super().train(False)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        self._cache.clear()
        return super()._apply(fn, recurse)

    def save(self, folder: Path) -> None:
        """Write weights, config and tokenizer as one Hugging Face folder, for transformers 4 and 5."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        values = json.loads((file := folder / "tokenizer_config.json").read_text())
        values["model_input_names"] = self.tokenizer.model_input_names
        if values.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
            values["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(values, indent=2))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _cached(self, texts: list[str]) -> list[tuple[Tensor, Tensor]]:
        """The encodings of `texts`; new ones are encoded and remembered, oldest out first.

        Each text goes through the tower alone, in the tower's own precision whatever mode surrounds its first
        use: else its rounding would depend on earlier texts, and a resumed run would differ.
        """
        with torch.autocast(self._device.type, enabled=False):
            known = {text: self._cache.get(text) or self._encode(text) for text in dict.fromkeys(texts)}
        for text in known:
            self._cache[text] = known[text]
            self._cache.move_to_end(text)
        while len(self._cache) > self.config.cache:
            self._cache.popitem(last=False)
        return [known[text] for text in texts]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def width(self) -> int:
        """D, the width of the states."""
        return self.model.config.hidden_size  # T5 calls it d_model as well


class CLIPText(_Tower):
    """CLIP text tower (ViT-B/32 at full size): token states for video, a sentence for a policy.

    The token states are those of the first T tokens; the sentence is of all that the tower has positions for
    (77 tokens in the published one).
    """

    architecture = CLIPTextModelWithProjection
    marks = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"}

    @staticmethod
    def _sizes(config: TextConfig, **tokens: int) -> PretrainedConfig:
        return CLIPTextConfig(
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.projection,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=max(POSITIONS, config.tokens),
            **tokens,
        )

    @property
    def projection(self) -> int:
        """P, the width of the sentence embedding."""
        return self.model.config.projection_dim

    @property
    def longest(self) -> int:
        """The longest text that the tower reads to its end, in tokens."""
        return self.model.config.max_position_embeddings

    def truncation_note(self, texts: Iterable[str]) -> str:
        """A note on instructions that do not fit, and on those that become equal by it; "" if all fit.

        What is longer than T tokens does not fit, with `keep_end` what is longer than the tower's positions.
        """
        distinct = list(dict.fromkeys(texts))
        limit = self.longest if self.config.keep_end else self.config.tokens
        ids = dict(zip(distinct, self._ids(distinct, limit)))  # on all cores: there may be 100,000
        truncated = {text for text in distinct if len(ids[text]) > limit}
        if not truncated:
            return ""
        alike: dict[tuple[int, ...], list[str]] = {}
        for text in distinct:
            alike.setdefault(tuple(ids[text][:-1][: limit - 1]), []).append(text)  # the last is the end mark
        same = [group for group in alike.values() if len(group) > 1 and truncated.intersection(group)]
        note = f"{len(truncated)} of {len(distinct)} instructions are truncated at {limit} tokens (text.clip)"
        if same:
            first = " = ".join(map(repr, same[0][:2]))
            note += f"; {sum(map(len, same))} of them are equal to another, the first: {first}"
        return note

    def _ids(self, texts: list[str], limit: int) -> list[list[int]]:
        """Tokens of texts, one more than the limit at most."""
        return self.tokenizer(texts, truncation=True, max_length=limit + 1)["input_ids"] if texts else []

    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        states, sentence, _ = self._read(text, self.config.tokens)
        if len(self._ids([text], self.config.tokens)[0]) > self.config.tokens:
            complete, sentence, end = self._read(text, self.longest)
            if self.config.keep_end:
                states = torch.cat([states[:-1], complete[end : end + 1]])
        return states, sentence

    def _read(self, text: str, length: int) -> tuple[Tensor, Tensor, int]:
        """States of a text, truncated and padded to `length` tokens; its sentence; place of its end."""
        batch = self.tokenizer(
            [text], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self._device)
        output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return output.last_hidden_state[0], output.text_embeds[0], int(batch["attention_mask"].sum()) - 1

    def tokens(self, texts: list[str]) -> Float[Tensor, "B T D"]:
        """Last hidden states after the final LayerNorm, truncated or padded to T tokens (see `keep_end`)."""
        return torch.stack([states for states, _ in self._cached(texts)])

    def sentence(self, texts: list[str]) -> Float[Tensor, "B P"]:
        """The end-of-text state through the text projection, not normalised."""
        return torch.stack([sentence for _, sentence in self._cached(texts)])


class T5Text(_Tower):
    """T5 encoder (T5-base at full size): the states that the latent-action encoder attends to."""

    architecture = T5EncoderModel
    marks = {"eos": "</s>", "pad": "<pad>"}

    @staticmethod
    def _sizes(config: TextConfig, **tokens: int) -> PretrainedConfig:
        return T5Config(
            d_model=config.width,
            d_kv=config.width // config.heads,
            d_ff=4 * config.width,
            num_layers=config.layers,
            num_heads=config.heads,
            **tokens,
        )

    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        states, mask = self._encode_together([text], dropout=False)
        return states[0], mask[0]

    def forward(
        self, texts: list[str], *, full_length: bool = False, together: bool = False, dropout: bool = False
    ) -> tuple[Float[Tensor, "B T D"], Bool[Tensor, "B T"]]:
        """States padded with zeros to the longest text of the batch, and the mask: true at tokens.

        full_length: pad to a multiple of the configured T, so that shapes, and with them the rounding of what
            follows, do not depend on the other texts of the batch.
        together: encode the texts again as one padded batch, whose padding has states of its own.
        dropout: do the same with T5's dropout on.
        """
        if together or dropout:
            return self._encode_together(texts, dropout=dropout)
        encoded = zip(*self._cached(texts))
        states, mask = (nn.utils.rnn.pad_sequence(list(each), batch_first=True) for each in encoded)
        if full_length:
            missing = -mask.shape[1] % self.config.tokens
            states, mask = F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        return states, mask

    @torch.no_grad()
    def _encode_together(self, texts: list[str], *, dropout: bool) -> tuple[Tensor, Tensor]:
        batch = self.tokenizer(texts, padding=True, verbose=False, return_tensors="pt").to(self._device)
        self.model.train(dropout)
        try:
            return self.model(**batch).last_hidden_state, batch["attention_mask"].bool()
        finally:
            self.model.eval()
