"""How much of everything the two presets use."""

from __future__ import annotations

from dataclasses import dataclass

POLITICAL, MATCHED, HARMFUL, GENERAL = "political_sensitive", "political_matched", "harmful", "general"
LABELS = {POLITICAL: "political", HARMFUL: "harmful", MATCHED: "matched", GENERAL: "general"}


@dataclass(frozen=True)
class Preset:
    """Prompt counts are upper bounds (a set may be smaller); tokens are per reply."""

    # Prompts per set for the directions: political ones of both kinds, as many as there are. With 16 general prompts among 144 the
    # halves of MD agreed better (0.76 for 0.52 at layer 18 of the demo model), and all of it was topic (0.66 for 0.20).
    fit: dict[str, int]
    select: dict[str, int]  # prompts per set for layer scores, scales and the finder
    report: dict[str, int]  # prompts per set for everything reported
    samples: int  # K replies per prompt for c(x) by which prompts are scored; even, so that split votes can be neutral
    tokens: int  # longest reply that is judged
    harmful_tokens: int  # longest reply to a harmful prompt; never more than what is kept on disk
    ks: tuple[int, ...]
    alphas: tuple[float, ...]
    judged: int  # refusing sensitive prompts whose fresh replies under a setting are judged
    first: int  # of them, those on which a setting is judged first: it goes no further when it cannot reach the target
    judged_samples: int  # K replies to each
    harmful: int  # harmful select prompts on which the updates are compared at matched removal
    null: int  # select prompts per set for the random directions
    finder_conversations: int  # for L_g inside the finder
    report_conversations: int  # for L_g and KL in the table; other conversations than the finder's
    permutations: int


PRESETS = {
    # 96 prompts give a Wilson interval of at most +-10 points at any rate; the general set, whose refusal rate is near
    # zero, needs no more than 40.
    "demo": Preset(
        fit={POLITICAL: 104, MATCHED: 104},
        select={POLITICAL: 40, MATCHED: 40},
        report={POLITICAL: 96, HARMFUL: 96, MATCHED: 96, GENERAL: 40},
        samples=2,
        tokens=16,
        harmful_tokens=16,
        ks=(2, 8),
        alphas=(-0.5, -0.75, -1.0),
        judged=40,
        first=12,
        judged_samples=2,
        harmful=32,
        null=12,
        finder_conversations=8,
        report_conversations=32,
        permutations=1000,
    ),
    "full": Preset(
        fit={POLITICAL: 1000, MATCHED: 1000},
        select={POLITICAL: 1000, MATCHED: 1000},
        report={POLITICAL: 1000, HARMFUL: 1000, MATCHED: 1000, GENERAL: 1000},
        samples=8,
        tokens=48,
        harmful_tokens=16,
        ks=(1, 2, 4, 8, 12, 16),
        alphas=(-0.1, -0.15, -0.25, -0.5, -0.75, -1.0, -1.5, -2.0),
        judged=1000,
        first=40,
        judged_samples=8,
        harmful=1000,
        null=1000,
        finder_conversations=128,
        report_conversations=128,
        permutations=10000,
    ),
}
