"""OpenAI's CLIP (`ViT-B-32.pt`, a TorchScript archive or a state_dict) → a folder with the text tower.

    python -m defi.checkpoints.convert stage=clip source=ViT-B-32.pt tokenizer=<folder> output=ckpts/clip

The file holds no tokenizer: `tokenizer` is a Hugging Face folder or hub name of CLIP's (vocab.json,
merges.txt, tokenizer_config.json of openai/clip-vit-base-patch32).
"""

from collections.abc import Mapping

from omegaconf import DictConfig
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from defi.checkpoints.files import read_published
from defi.checkpoints.matching import LoadingReport, Names, compare
from defi.errors import UserError, reading
from defi.hub import from_pretrained
from defi.text import CLIPText, TextConfig

TITLE = "OpenAI CLIP"
MARK = "token_embedding.weight"
OTHER = ("logit_scale", "input_resolution", "context_length", "vocab_size")
UNNEEDED = {
    "visual.": "CLIP's image tower; instructions are text",
    **dict.fromkeys(OTHER, "numbers of CLIP's training"),
}
PROJECTION = "text_projection"  # OpenAI multiplies from the right, transformers' Linear from the left
HEAD_WIDTH = 64

_LAYERS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QKV = {
    f"transformer.resblocks.*.attn.in_proj_{kind}": tuple(
        f"encoder.layers.*.self_attn.{part}_proj.{kind}" for part in "qkv"
    )
    for kind in ("weight", "bias")
}
OPENAI = Names(
    {
        "token_embedding": "embeddings.token_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        PROJECTION: "text_projection.weight",
        "ln_final": "final_layer_norm",
        **{f"transformer.resblocks.*.{theirs}": f"encoder.layers.*.{hf}" for theirs, hf in _LAYERS.items()},
        **_QKV,
    }
)
"""OpenAI's names of the text tower, and transformers'."""


def to_openai(model: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """The text tower under OpenAI's names."""
    theirs = OPENAI.join({name.removeprefix("text_model."): t for name, t in model.state_dict().items()})
    return theirs | {PROJECTION: theirs[PROJECTION].T}


def from_openai(
    model: CLIPTextModelWithProjection, tensors: Mapping[str, Tensor], *, source: object
) -> LoadingReport:
    """Load OpenAI's tensors into the text tower `model`, strictly."""
    report = compare(tensors, to_openai(model), source=source, unneeded=UNNEEDED).check()
    ours = OPENAI.split({**tensors, PROJECTION: tensors[PROJECTION].T})
    own = model.state_dict()
    model.load_state_dict({name: ours.get(name.removeprefix("text_model."), own[name]) for name in own})
    return report


def text_sizes(tensors: Mapping[str, Tensor], *, source: object) -> CLIPTextConfig:
    """Sizes of the text tower, read off its tensors."""
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")}
    with reading(str(source), "give the complete ViT-B-32.pt"):
        vocabulary, width = tensors[MARK].shape
        return CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
            projection_dim=tensors[PROJECTION].shape[-1],
            num_hidden_layers=len(layers),
            num_attention_heads=max(1, width // HEAD_WIDTH),
            max_position_embeddings=len(tensors["positional_embedding"]),
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )


def convert(cfg: DictConfig) -> tuple[CLIPText, LoadingReport]:
    """The text tower in the file `cfg.source`, with the tokenizer at `cfg.tokenizer`."""
    tensors = read_published(cfg.source, MARK, TITLE)
    model = CLIPTextModelWithProjection(text_sizes(tensors, source=cfg.source))
    report = from_openai(model, tensors, source=cfg.source)
    if cfg.tokenizer is None:
        raise UserError("tokenizer=: missing; give the folder or hub name of CLIP's (vocab.json, merges.txt)")
    tokenizer = from_pretrained(AutoTokenizer, cfg.tokenizer)
    if len(tokenizer) != model.config.vocab_size:
        count, expected = len(tokenizer), model.config.vocab_size
        raise UserError(
            f"{cfg.tokenizer}: has {count} tokens, {cfg.source} has {expected}; give CLIP's own tokenizer"
        )
    return CLIPText(model, tokenizer, TextConfig()), report
