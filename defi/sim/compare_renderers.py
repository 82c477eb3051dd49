"""One picture of a scene of CALVIN by every renderer that works here, and how far two of them differ."""

from concurrent.futures.process import BrokenProcessPool

import numpy as np
from jaxtyping import UInt8

from defi.errors import UserError
from defi.sim.renderers import Renderer, devices, find_renderer
from defi.sim.scene import SceneConfig
from defi.sim.world import World

FAR = 20  # levels of 255: clearly another colour

Pictures = dict[str, UInt8[np.ndarray, "H W 3"]]


def _draw(calvin_root: str, scene: str, backend: str) -> Pictures:
    """Both cameras' pictures of a scene at rest, in this process."""
    with World(SceneConfig.from_calvin(calvin_root, scene), renderer=backend) as world:
        world.reset()
        return world.render()


def draw_with_each(calvin_root: str, scene: str) -> dict[Renderer, Pictures]:
    """The pictures by each kind of renderer, first by the one that a rollout takes.

    Raises:
        UserError: no EGL device works here, or one that was found cannot draw the scene.
    """
    pictures = {}
    for kind in dict.fromkeys([find_renderer("egl").kind, *(["mesa"] if devices("mesa") else []), "cpu"]):
        renderer = find_renderer(kind)
        with renderer.process() as process:
            try:
                pictures[renderer] = process.submit(_draw, calvin_root, scene, renderer.backend).result()
            except BrokenProcessPool:
                raise UserError(f"{renderer}: crashes drawing scene {scene}; update its driver") from None
    return pictures


def describe_difference(first: Pictures, second: Pictures) -> str:
    """Per camera the mean difference, and the share of pixels with a colour further apart than `FAR`."""
    views = []
    for name, picture in first.items():
        apart = np.abs(picture.astype(int) - second[name])
        share = (apart.max(axis=-1) > FAR).mean()
        view = f"{name.removeprefix('rgb_')} view by {apart.mean():.1f} of 255 in the mean"
        views.append(f"{view}, {share:.0%} of its pixels by more than {FAR}")
    return "; ".join(views)
