"""OpenAI's CLIP (`ViT-B-32.pt`, a TorchScript archive or a state_dict) → a folder with the text tower.

    python -m defi.checkpoints.convert stage=clip source=ViT-B-32.pt tokenizer=<folder> output=ckpts/clip

The file holds no tokenizer: `tokenizer` is a Hugging Face folder or hub name of CLIP's (vocab.json,
merges.txt, tokenizer_config.json of openai/clip-vit-base-patch32).
"""

from collections.abc import Iterable, Mapping

from omegaconf import DictConfig
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection

from defi.checkpoints.account import Report, account, shapes
from defi.checkpoints.foreign import read_foreign
from defi.checkpoints.names import Names, both, join, split
from defi.errors import UserError, one_line
from defi.hub import local_only
from defi.text import CLIPText, TextConfig

TITLE = "OpenAI CLIP"
IMAGE_TOWER = ("visual.",)
OTHER = ("logit_scale", "input_resolution", "context_length", "vocab_size")
SPARE = {
    **dict.fromkeys(IMAGE_TOWER, "CLIP's image tower; instructions are text"),
    **dict.fromkeys(OTHER, "numbers of CLIP's training"),
}
PROJECTION = "text_projection"  # OpenAI multiplies from the right, transformers' Linear from the left
HEAD_WIDTH = 64


def recognises(names: Iterable[str]) -> bool:
    """Whether tensors of these names are OpenAI's CLIP."""
    return "token_embedding.weight" in names and "ln_final.weight" in names


def openai_names(layers: int) -> Names:
    """OpenAI's names of the text tower, and the parts of transformers' model that each is made of."""
    names: Names = {
        "token_embedding.weight": ("embeddings.token_embedding.weight",),
        "positional_embedding": ("embeddings.position_embedding.weight",),
        PROJECTION: ("text_projection.weight",),
    }
    names |= both("ln_final", "final_layer_norm")
    for i in range(layers):
        theirs, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = tuple(f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv")
            names[f"{theirs}.attn.in_proj_{kind}"] = parts
        names |= both(f"{theirs}.attn.out_proj", f"{ours}.self_attn.out_proj")
        names |= both(f"{theirs}.ln_1", f"{ours}.layer_norm1") | both(f"{theirs}.ln_2", f"{ours}.layer_norm2")
        names |= both(f"{theirs}.mlp.c_fc", f"{ours}.mlp.fc1") | both(
            f"{theirs}.mlp.c_proj", f"{ours}.mlp.fc2"
        )
    return names


def to_openai(model: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """The text tower under OpenAI's names."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    theirs = join(state, openai_names(model.config.num_hidden_layers))
    return theirs | {PROJECTION: theirs[PROJECTION].T}


def from_openai(
    model: CLIPTextModelWithProjection, tensors: Mapping[str, Tensor], *, source: object
) -> Report:
    """Load OpenAI's tensors into the text tower `model`, strictly."""
    report = account(tensors, shapes(to_openai(model)), source=source, spare=SPARE).demand()
    turned = {**tensors, PROJECTION: tensors[PROJECTION].T}
    ours = split(turned, openai_names(model.config.num_hidden_layers))
    own = model.state_dict()
    model.load_state_dict({name: ours.get(name.removeprefix("text_model."), own[name]) for name in own})
    return report


def text_sizes(tensors: Mapping[str, Tensor], *, source: object) -> CLIPTextConfig:
    """Sizes of the text tower, read off its tensors."""
    if not recognises(tensors):
        raise UserError(f"{source}: not OpenAI's CLIP (token_embedding.weight is missing); give ViT-B-32.pt")
    vocabulary, width = tensors["token_embedding.weight"].shape
    layers = {name.split(".")[2] for name in tensors if name.startswith("transformer.resblocks.")}
    first = "transformer.resblocks.0.mlp.c_fc.weight"
    for name in (first, "positional_embedding", PROJECTION):
        if name not in tensors:
            raise UserError(f"{source}: {name} is missing; give the complete ViT-B-32.pt")
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=tensors[first].shape[0],
        projection_dim=tensors[PROJECTION].shape[-1],
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=tensors["positional_embedding"].shape[0],
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )


def convert(cfg: DictConfig) -> tuple[CLIPText, Report]:
    """The text tower in the file `cfg.source`, with the tokenizer at `cfg.tokenizer`."""
    tensors = read_foreign(cfg.source)
    model = CLIPTextModelWithProjection(text_sizes(tensors, source=cfg.source))
    report = from_openai(model, tensors, source=cfg.source)
    if cfg.tokenizer is None:
        raise UserError(
            "tokenizer: missing; give the folder or hub name of CLIP's tokenizer (vocab.json, merges.txt)"
        )
    safe = {"local_files_only": local_only(cfg.tokenizer), "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.tokenizer, **safe)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{cfg.tokenizer}: no tokenizer here ({one_line(error)}); give CLIP's") from None
    if len(tokenizer) != model.config.vocab_size:
        raise UserError(
            f"{cfg.tokenizer}: knows {len(tokenizer)} tokens, {cfg.source} {model.config.vocab_size}; "
            "give CLIP's own"
        )
    return CLIPText(model, tokenizer, TextConfig()), report
