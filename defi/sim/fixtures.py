"""What is fixed to the table: slide, drawer, a button that toggles the LED, a switch that lights the bulb."""

from collections.abc import Sequence

from defi.errors import reading
from defi.sim.bullet import Bullet, pybullet
from defi.sim.scene import TableConfig

FORCE = 4
JOINTS = ("base__slide", "base__drawer", "base__button", "base__switch")
BUTTON, SWITCH = 2, 3  # places in JOINTS
LIGHT_LINKS = {"lightbulb": "light_link", "led": "led_link"}


class Fixtures:
    """Loads the table; state and logic of its four joints and two lights.

    `positions` holds the joints (slide, drawer, button, switch) as last read by `refresh`; `links` maps the
    table's link names to indices; `lights` (lightbulb, led) are 0 or 1.
    """

    def __init__(self, config: TableConfig, bullet: Bullet, scale: float) -> None:
        self.config, self._bullet = config, bullet
        self.body = bullet.load(config.urdf, config.position, config.euler, globalScaling=scale)
        infos = bullet.joints(self.body)
        self.links = {info[12].decode(): info[0] for info in infos} | {"base_link": -1}
        index = {info[1].decode(): info[0] for info in infos}
        with reading(config.urdf, "it is not a play table"):
            self._joints = [index[name] for name in JOINTS]
        self._middle = [sum(infos[joint][8:10]) / 2 for joint in self._joints]
        for joint, name in zip(self._joints, JOINTS):
            mode = pybullet.POSITION_CONTROL if name == "base__button" else pybullet.VELOCITY_CONTROL
            bullet.setJointMotorControl2(self.body, joint, mode, force=FORCE)  # the target of either is 0
        self.lights = dict.fromkeys(LIGHT_LINKS, 0)
        self._button_on = self._switch_on = False
        self.refresh()
        self._was_pressed = self._past_middle(BUTTON)

    def refresh(self) -> None:
        """Read the joints."""
        self.positions = [state[0] for state in self._bullet.getJointStates(self.body, self._joints)]

    def _past_middle(self, joint: int) -> bool:
        return self.positions[joint] > self._middle[joint]

    def reset(self, joints: Sequence[float] = (0, 0, 0, 0), lights: Sequence[float] = (0, 0)) -> None:
        """Set the joints and lights (bulb, LED). Whether the button *was* pressed survives."""
        for joint, position in zip(self._joints, joints):
            self._bullet.resetJointState(self.body, joint, position)
        for name, on in zip(self.lights, lights):
            self._set_light(name, int(on))
        self._button_on = bool(self.lights["led"])
        self._switch_on = False

    def update(self) -> None:
        """After each action: let the button and the switch work on their lights."""
        self.refresh()
        pressed, on = self._past_middle(BUTTON), self._past_middle(SWITCH)
        if pressed and not self._was_pressed:
            self._button_on = not self._button_on
            self._set_light("led", int(self._button_on))
        if on != self._switch_on:
            self._set_light("lightbulb", int(on))
        self._was_pressed, self._switch_on = pressed, on

    def _set_light(self, name: str, on: int) -> None:
        self.lights[name] = on
        color = self.config.light_colors[name] if on else self.config.off_color
        self._bullet.changeVisualShape(self.body, self.links[LIGHT_LINKS[name]], rgbaColor=color)
