"""DeFI in LeRobot, which finds this package by its name and imports it."""

try:
    import Step3_DeFI  # noqa: F401
except ImportError as error:
    fix = "install DeFI's repository beside it: pip install -e <repository>"
    raise ImportError(f"lerobot_policy_defi: DeFI is missing; {fix}") from error

from lerobot_policy_defi.configuration_defi import DeFIConfig

__all__ = ["DeFIConfig"]
