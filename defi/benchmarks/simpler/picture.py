"""What the policy sees: robot and objects drawn by SAPIEN, pasted onto a photo of the real place.

Pictures are drawn when they are asked for and at no other time.
"""

from typing import Any

import numpy as np
from PIL import Image

from defi.benchmarks.simpler.episodes import Episode
from defi.benchmarks.simpler.scene import DATA, Scene, asset, sapien, sapien_pose
from defi.errors import reading

# Direction and strength; white.
LIGHTS: dict[str, tuple[float, list[tuple[tuple[float, float, float], float]]]] = {
    "table": (0.3, [((0, 0, -1), 2.2), ((-1, -0.5, -1), 0.7), ((1, 1, -1), 0.7)]),
    "sink": (0.3, [((0, 0, -1), 0.3)]),
    "cabinet": (1.0, [((-np.cos(np.radians(75)), 0, -np.sin(np.radians(75))), 1.0)]),
}


class Eye:
    """The camera of a scene, its light, and the photo behind."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        camera = scene.robot.camera
        self.name = camera.name
        self.camera = sapien().render.RenderCameraComponent(camera.width, camera.height)
        self.camera.set_perspective_parameters(
            camera.near, camera.far, camera.focal, camera.focal, *camera.centre, 0.0
        )
        scene.links[camera.link].entity.add_component(self.camera)
        self.camera.local_pose = sapien_pose((*camera.place, *camera.turn))
        self._light()
        self._polish()
        # The sink of the eggplant's task hides things, but the photo shows it.
        pasted_over = {"sink", "dummy_sink_target_plane"} if scene.sink is not None else set()
        shown = [body.entity for name, body in scene.objects.items() if name not in pasted_over]
        shown += [link.entity for link in scene.arm.links]
        shown += [link.entity for link in scene.cabinet.links] if scene.cabinet is not None else []
        self.shown = np.array([entity.per_scene_id for entity in shown])
        self.photo: tuple[str, np.ndarray] | None = None

    def _light(self) -> None:
        place = (
            "cabinet"
            if self.scene.cabinet is not None
            else "sink"
            if self.scene.sink is not None
            else "table"
        )
        ambient, lights = LIGHTS[place]
        self.scene.world.set_ambient_light([ambient] * 3)
        for direction, strength in lights:
            self.scene.world.add_directional_light(direction, [strength] * 3, shadow=False)

    def _polish(self) -> None:
        """As officially: a shining robot, and matt objects in the second "move near"."""
        if self.scene.cabinet is None:
            for link in self.scene.arm.links:
                for material in _materials(link.entity):
                    material.specular, material.roughness = 0.9, 0.3
        for body in self.scene.objects.values():
            for material in _materials(body.entity):
                if material.emission_texture is not None:  # baked light: the files' factor for it is 0
                    material.emission = [1.0] * 4
                if self.scene.task.name.endswith("near_v1"):
                    material.specular, material.roughness, material.metallic = 0.0, 1.0, 0.0

    def picture(self, episode: Episode) -> np.ndarray:
        """Of this moment: uint8 [H, W, 3].

        Raises:
            UserError: the photo is missing or damaged.
        """
        self.scene.world.update_render()
        self.camera.take_picture()
        drawn = self.camera.get_picture("Color")[..., :3]
        picture = (np.clip(drawn, 0, 1) * 255).astype(np.uint8)
        if not episode.photo:
            return picture
        if self.photo is None or self.photo[0] != episode.photo:
            self.photo = (episode.photo, self._read(episode.photo))
        seen = self.camera.get_picture("Segmentation")[..., 1]
        return np.where(np.isin(seen, self.shown)[..., None], picture, self.photo[1])

    def _read(self, name: str) -> np.ndarray:
        file = asset(self.scene.root, f"{DATA}/real_inpainting/{name}.png")
        with reading(file, "fetch SimplerEnv again"):
            photo = np.asarray(Image.open(file).convert("RGB"))
        return resized(photo, self.camera.width, self.camera.height)


def _materials(entity: Any) -> list[Any]:
    body = entity.find_component_by_type(sapien().render.RenderBodyComponent)
    return [part.material for shape in body.render_shapes for part in shape.parts] if body is not None else []


def resized(photo: np.ndarray, width: int, height: int) -> np.ndarray:
    """A photo uint8 [h, w, 3] at another size, bilinear as OpenCV does it, rounded down."""
    (above, below, down), (left, right, across) = (
        _between(photo.shape[0], height),
        _between(photo.shape[1], width),
    )
    rows = photo[:, left] * (1 - across)[None, :, None] + photo[:, right] * across[None, :, None]
    whole = rows[above] * (1 - down)[:, None, None] + rows[below] * down[:, None, None]
    return whole.astype(np.uint8)


def _between(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new pixel the two old ones beside it, and the second one's share."""
    place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    first = place.astype(int)
    return first, np.minimum(first + 1, old - 1), place - first
