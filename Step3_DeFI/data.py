"""The policy's training data: a store, checked against the policy, or the recordings as they are."""

from omegaconf import DictConfig

from defi.calvin import TRAINING, VALIDATION
from defi.engine.weights import fingerprint
from defi.errors import UserError
from Step3_DeFI.plan import SampleRules
from Step3_DeFI.policy import DeFI
from Step3_DeFI.samples import CalvinSamples, PolicySamples
from Step3_DeFI.store import PolicyStore


def open_samples(section: DictConfig, policy: DeFI) -> dict[str, PolicySamples]:
    """`training`, and `held_out` where the section `data` names some.

    Raises:
        UserError: the section names both kinds of data or none, or they are missing, damaged or do not fit.
    """
    if (section.store is None) == (section.root is None):
        raise UserError(
            f"data.store={section.store}, data.root={section.root}: give one of them, a store made by "
            "Step3_DeFI.prepare or demonstrations in CALVIN's format"
        )
    places = {"training": section.store or f"{section.root}/{section.split}"}
    if section.held_out is not None:
        of_root = section.root is not None and section.held_out in (TRAINING, VALIDATION)
        places["held_out"] = f"{section.root}/{section.held_out}" if of_root else section.held_out
    # For the video loss the frames that follow a sample, of what is trained on.
    clips = {"training": policy.gfdm.config.clip_frames} if policy.config.finetune.video_loss else {}
    if section.store is not None:
        return {name: open_store(place, policy, clips.get(name)) for name, place in places.items()}
    rules, size = SampleRules.of(section, policy.config.chunk), policy.image_size
    return {
        name: CalvinSamples(place, rules, image_size=size, clip=clips.get(name))
        for name, place in places.items()
    }


def open_store(folder: str, policy: DeFI, clip: range | None) -> PolicyStore:
    """A store that this policy can learn from, with a video `clip` of each sample where one is wanted.

    Raises:
        UserError: it was made for another policy or stage-1 checkpoint; what differs is named.
    """
    store, config = PolicyStore(folder), policy.config
    made, finetune = store.manifest, config.finetune.mode
    if made.kind == "features" and finetune != "none":
        raise UserError(
            f"{folder}: stored features have no gradient for gfdm.finetune={finetune}; prepare a store with "
            "store.kind=latents, or leave finetune at none"
        )
    wanted: dict[str, object] = {"chunk": config.chunk, "image_size": policy.image_size}
    if made.kind == "features":
        wanted |= {"feature_noise": config.feature_noise, "gfdm_precision": config.video_precision}
    if made.kind != "images":
        wanted["stage1_weights"] = fingerprint(policy.sources["gfdm"])
    for name, value in wanted.items():
        if (found := getattr(made, name)) != value:
            raise UserError(
                f"{folder}: prepared with {name}={found}, the policy has {value}; prepare it again"
            )
    kept = None if store.video is None else (store.video.shape[1], made.video_stride)
    if clip is not None and kept != (len(clip), clip.step):
        raise UserError(
            f"{folder}: holds no videos of {len(clip)} frames, {clip.step} apart, for gfdm.video_loss; "
            f"prepare it with store.videos=true gfdm.frame_step={clip.step}, or leave video_loss at 0"
        )
    return store
