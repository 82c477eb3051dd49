"""What the policy sees: robot and objects drawn by SAPIEN, pasted onto a photo of the real place.

Pictures are drawn when they are asked for and at no other time.
"""

from typing import Any

import numpy as np
from PIL import Image

from defi.benchmarks.simpler.episodes import Episode
from defi.benchmarks.simpler.scene import DATA, Scene, asset, sapien, sapien_pose
from defi.errors import reading

DOWN, FROM_LEFT, FROM_RIGHT = (0.0, 0.0, -1.0), (-1.0, -0.5, -1.0), (1.0, 1.0, -1.0)
BESIDE = [((-1.0, 1.0, -0.05), 0.5), ((-1.0, -1.0, -0.05), 0.5)]
Light = tuple[tuple[float, float, float], float]
# The ambient light, and the direction and strength of others; all white. "cabinet": as in the photos of it.
LIGHTS: dict[str, tuple[float, list[Light]]] = {
    "table": (0.3, [(DOWN, 2.2), (FROM_LEFT, 0.7), (FROM_RIGHT, 0.7)]),
    "table, brighter": (0.3, [(DOWN, 3.6), (FROM_LEFT, 1.3), (FROM_RIGHT, 1.3)]),
    "table, darker": (0.3, [(FROM_RIGHT, 0.8), (DOWN, 0.8)]),
    "sink": (0.3, [(DOWN, 0.3)]),
    "cabinet": (1.0, [((-float(np.cos(np.radians(75))), 0.0, -float(np.sin(np.radians(75)))), 1.0)]),
    "room": (0.3, [((-0.2, 0.0, -1.0), 1.0), *BESIDE]),
    "room, brighter": (0.3, [((-0.2, 0.0, -1.0), 2.0), *BESIDE]),
    "room, darker": (0.3, [((-0.2, 0.0, -1.0), 0.5), *BESIDE]),
}

SAMPLES, DEPTH, DENOISER = 32, 8, "optix"  # of ray tracing, as officially; the denoiser is NVIDIA's


def trace_rays() -> None:
    """Cameras made from here on trace rays."""
    render = sapien().render
    render.set_camera_shader_dir("rt")
    render.set_ray_tracing_samples_per_pixel(SAMPLES)
    render.set_ray_tracing_path_depth(DEPTH)
    render.set_ray_tracing_denoiser(DENOISER)


class Eye:
    """The camera of a scene, its light, and the photo behind. traced: by rays, else rasterised.

    Raises:
        UserError: the photo is missing or damaged.
    """

    def __init__(self, scene: Scene, episode: Episode, *, traced: bool = False) -> None:
        self.scene = scene
        camera = scene.robot.camera
        self.name = camera.name
        render = sapien().render
        trace_rays() if traced else render.set_camera_shader_dir("default")
        self.camera = render.RenderCameraComponent(camera.width, camera.height)
        self.camera.set_perspective_parameters(
            camera.near, camera.far, camera.focal, camera.focal, *camera.centre, 0.0
        )
        scene.links[camera.link].entity.add_component(self.camera)
        self.camera.local_pose = sapien_pose((*camera.place, *camera.turn))
        self._light(episode.look.light)
        self._polish(bool(episode.photo))
        # The sink of the eggplant's task hides things, but the photo shows it.
        pasted_over = {"sink", "dummy_sink_target_plane"} if scene.sink is not None else set()
        shown = [body.entity for name, body in scene.objects.items() if name not in pasted_over]
        shown += [link.entity for link in scene.arm.links]
        shown += [link.entity for link in scene.cabinet.links] if scene.cabinet is not None else []
        self.shown = np.array([entity.per_scene_id for entity in shown])
        self.photo = self._read(episode.photo) if episode.photo else None

    def _light(self, kind: str) -> None:
        scene = self.scene
        own = "cabinet" if scene.cabinet is not None else "sink" if scene.sink is not None else "table"
        ambient, lights = LIGHTS[kind or own]
        scene.world.set_ambient_light([ambient] * 3)
        for place, (direction, strength) in enumerate(lights):
            shadow = kind.startswith("room") and place == 0
            scene.world.add_directional_light(direction, [strength] * 3, shadow, shadow_scale=5)

    def _polish(self, pasted: bool) -> None:
        """As officially: a shining robot, and matt objects in the second "move near"."""
        if self.scene.cabinet is None or not pasted:
            for link in self.scene.arm.links:
                for material in _materials(link.entity):
                    material.specular, material.roughness = 0.9, 0.3
        for body in self.scene.objects.values():
            for material in _materials(body.entity):
                if material.emission_texture is not None:  # baked light: the files' factor for it is 0
                    material.emission = [1.0] * 4
                if self.scene.task.name.endswith("near_v1"):
                    material.specular, material.roughness, material.metallic = 0.0, 1.0, 0.0

    def picture(self) -> np.ndarray:
        """Of this moment: uint8 [H, W, 3]."""
        self.scene.world.update_render()
        self.camera.take_picture()
        drawn = self.camera.get_picture("Color")[..., :3]
        picture = (np.clip(drawn, 0, 1) * 255).astype(np.uint8)
        if self.photo is None:
            return picture
        seen = self.camera.get_picture("Segmentation")[..., 1]
        return np.where(np.isin(seen, self.shown)[..., None], picture, self.photo)

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
