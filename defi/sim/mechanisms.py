"""The table's moving parts: slide, drawer, a button that toggles the LED, a switch that lights the bulb."""

from collections.abc import Sequence

from defi.errors import UserError
from defi.sim.bullet import Bullet, pybullet
from defi.sim.scene import TableConfig

FORCE = 4
JOINTS = ("base__slide", "base__drawer", "base__button", "base__switch")
BUTTON, SWITCH = 2, 3  # places in JOINTS


class Mechanisms:
    """State and logic of the four joints and two lights of the table `body`.

    `positions` holds the joints (slide, drawer, button, switch) as last read by `refresh`; `links` maps the
    table's link names to indices; `lightbulb` and `led` are 0 or 1.
    """

    def __init__(self, config: TableConfig, body: int, bullet: Bullet) -> None:
        self.config, self.body, self._bullet = config, body, bullet
        infos = [bullet.getJointInfo(body, joint) for joint in range(bullet.getNumJoints(body))]
        self.links = {info[12].decode(): info[0] for info in infos} | {"base_link": -1}
        index = {info[1].decode(): info[0] for info in infos}
        if not index.keys() >= set(JOINTS):
            raise UserError(f"{config.urdf}: needs the joints {', '.join(JOINTS)}; not a play table")
        self._joints = [index[name] for name in JOINTS]
        self._middle = [sum(infos[joint][8:10]) / 2 for joint in self._joints]
        for joint, name in zip(self._joints, JOINTS):
            mode = pybullet.POSITION_CONTROL if name == "base__button" else pybullet.VELOCITY_CONTROL
            bullet.setJointMotorControl2(body, joint, mode, force=FORCE)  # the target of either is 0
        self.lightbulb = self.led = 0
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
        self._set_lightbulb(int(lights[0]))
        self._set_led(int(lights[1]))
        self._button_on = bool(self.led)
        self._switch_on = False

    def update(self) -> None:
        """After each action: let the button and the switch work on their lights."""
        self.refresh()
        pressed = self._past_middle(BUTTON)
        if pressed and not self._was_pressed:
            self._button_on = not self._button_on
            self._set_led(int(self._button_on))
        self._was_pressed = pressed
        on = self._past_middle(SWITCH)
        if on != self._switch_on:
            self._set_lightbulb(int(on))
        self._switch_on = on

    def _set_lightbulb(self, on: int) -> None:
        self.lightbulb = on
        self._paint("light_link", self.config.bulb_color if on else self.config.off_color)

    def _set_led(self, on: int) -> None:
        self.led = on
        self._paint("led_link", self.config.led_color if on else self.config.off_color)

    def _paint(self, link: str, color: Sequence[float]) -> None:
        self._bullet.changeVisualShape(self.body, self.links[link], rgbaColor=color)
