"""Published results on CALVIN, ABC→D, to stand beside ours."""

from dataclasses import dataclass

LEADERBOARD = "MINT-SJTU/Evo-SOTA.io, 14 July 2026, self-reported"


@dataclass(frozen=True)
class Published:
    """An average chain length over 1000 sequences. `limit`: control steps per task, None where not stated."""

    method: str
    average: float
    source: str
    limit: int | None = None


CALVIN_ABC_D = (
    Published("MMaDA-VLA", 4.78, LEADERBOARD),
    Published("Xiaomi-Robotics-0", 4.75, LEADERBOARD),
    Published("π-RL (with reinforcement learning)", 4.71, LEADERBOARD),
    Published("AVA-VLA", 4.65, LEADERBOARD),
    Published("FLOWER", 4.53, LEADERBOARD),
    Published("DeFI", 4.51, "arXiv 2604.16391; the released settings have 720 steps"),
    Published("VLA-Adapter-Pro", 4.50, LEADERBOARD),
    Published("HARP-VLA", 4.48, LEADERBOARD),
    Published("DreamVLA", 4.44, LEADERBOARD),
    Published("X-VLA", 4.43, LEADERBOARD, 720),
    Published("UnifiedVLA", 4.41, LEADERBOARD),
    Published("VPP", 4.33, LEADERBOARD, 360),
    Published("Seer", 4.28, LEADERBOARD),
    Published("UP-VLA", 4.08, LEADERBOARD),
    Published("MoDE", 4.01, LEADERBOARD),
    Published("Moto", 3.10, LEADERBOARD),
    Published("GR-1", 3.06, LEADERBOARD),
)
