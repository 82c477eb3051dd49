"""The table's moving parts: slide, drawer, a button that toggles the LED, a switch that lights the bulb."""

from collections.abc import Sequence

import pybullet

from defi.sim.scene import TableConfig

FORCE = 4
JOINTS = ("base__slide", "base__drawer", "base__button", "base__switch")


class Mechanisms:
    """State and logic of the four joints and two lights of the table `body`.

    `positions` holds the joints (slide, drawer, button, switch) as last read by `refresh`.
    """

    def __init__(self, config: TableConfig, body: int, client: int) -> None:
        self.config, self.body, self.client = config, body, client
        infos = [
            pybullet.getJointInfo(body, joint, physicsClientId=client)
            for joint in range(pybullet.getNumJoints(body, physicsClientId=client))
        ]
        index = {info[1].decode(): info[0] for info in infos}
        self.links = {info[12].decode(): info[0] for info in infos} | {"base_link": -1}
        self._joints = [index[name] for name in JOINTS]
        self._middle = [sum(infos[joint][8:10]) / 2 for joint in self._joints]
        slide, drawer, button, switch = self._joints
        for joint in (slide, drawer):
            self._motor(joint, pybullet.VELOCITY_CONTROL)
        self._motor(button, pybullet.POSITION_CONTROL, targetPosition=0)
        self._motor(switch, pybullet.VELOCITY_CONTROL)
        self.lightbulb = self.led = 0
        self._button_on = self._switch_on = False
        self.refresh()
        self._was_pressed = self._pressed(2)

    def _motor(self, joint: int, mode: int, **target: float) -> None:
        pybullet.setJointMotorControl2(
            self.body, joint, mode, force=FORCE, physicsClientId=self.client, **target
        )

    def refresh(self) -> None:
        """Read the joints."""
        states = pybullet.getJointStates(self.body, self._joints, physicsClientId=self.client)
        self.positions = [state[0] for state in states]

    def _pressed(self, joint: int) -> bool:
        return self.positions[joint] > self._middle[joint]

    def reset(self, joints: Sequence[float] = (0, 0, 0, 0), lights: Sequence[float] = (0, 0)) -> None:
        """Set the joints and lights (bulb, LED). Whether the button *was* pressed survives."""
        for joint, value in zip(self._joints, joints):
            pybullet.resetJointState(self.body, joint, value, physicsClientId=self.client)
        self._set_lightbulb(int(lights[0]))
        self._set_led(int(lights[1]))
        self._button_on = bool(self.led)
        self._switch_on = False

    def update(self) -> None:
        """After each action: let the button and the switch work on their lights."""
        self.refresh()
        pressed = self._pressed(2)
        if pressed and not self._was_pressed:
            self._button_on = not self._button_on
            self._set_led(int(self._button_on))
        self._was_pressed = pressed
        on = self._pressed(3)
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
        pybullet.changeVisualShape(self.body, self.links[link], rgbaColor=color, physicsClientId=self.client)
